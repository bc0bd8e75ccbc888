//! Shell patterns for one label of a host name, as Go's `path.Match` has them. Pure.

/// Whether `text` matches `pattern`: `*`, `?`, `[a-z]`, `[^a-z]`, and `\\` before what is meant literally. A malformed
/// pattern matches nothing.
pub(crate) fn matches(pattern: &str, text: &str) -> bool {
    let (pattern, text): (Vec<char>, Vec<char>) = (pattern.chars().collect(), text.chars().collect());
    let (mut at, mut in_text) = (0, 0);
    // Where to go on if the last star has to take one character more.
    let mut retry: Option<(usize, usize)> = None;
    loop {
        if pattern.get(at) == Some(&'*') {
            at += 1;
            retry = Some((at, in_text));
            continue;
        }
        let step = match (pattern.get(at), text.get(in_text)) {
            (None, None) => return true,
            (Some(_), Some(character)) => one(&pattern[at..], *character),
            _ => None,
        };
        if let Some(taken) = step {
            at += taken;
            in_text += 1;
            continue;
        }
        match retry {
            Some((after_star, from)) if from < text.len() => {
                (at, in_text) = (after_star, from + 1);
                retry = Some((after_star, from + 1));
            }
            _ => return false,
        }
    }
}

/// How much of the pattern matches this one character.
fn one(pattern: &[char], character: char) -> Option<usize> {
    match pattern {
        ['?', ..] => Some(1),
        ['\\', literal, ..] => (*literal == character).then_some(2),
        ['[', class @ ..] => in_class(class, character),
        [literal, ..] => (*literal == character && character != '\\').then_some(1),
        [] => None,
    }
}

/// `class` is what follows the bracket. The answer counts both brackets.
fn in_class(class: &[char], character: char) -> Option<usize> {
    let negated = matches!(class.first(), Some('^'));
    let mut at = usize::from(negated);
    let (mut found, start) = (false, at);
    loop {
        match class.get(at)? {
            ']' if at > start => return (found != negated).then_some(at + 2),
            _ => {}
        }
        let (low, after) = bound(class, at)?;
        let (high, after) = match class.get(after)? {
            '-' => bound(class, after + 1)?,
            _ => (low, after),
        };
        found |= (low..=high).contains(&character);
        at = after;
    }
}

fn bound(class: &[char], at: usize) -> Option<(char, usize)> {
    match class.get(at)? {
        '-' | ']' => None,
        '\\' => Some((*class.get(at + 1)?, at + 2)),
        literal => Some((*literal, at + 1)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_go_matches() {
        for (pattern, text, expected) in [
            ("", "", true),
            ("abc", "abc", true),
            ("abc", "abd", false),
            ("*", "", true),
            ("*", "anything", true),
            ("a*c", "abbbc", true),
            ("a*c", "abbbd", false),
            ("*a*b*", "xaxxbx", true),
            ("a?c", "abc", true),
            ("a?", "a", false),
            ("[a-c]x", "bx", true),
            ("[^a-c]x", "bx", false),
            ("[^a-c]x", "dx", true),
            ("[a\\-c]", "-", true),
            ("\\*", "*", true),
            ("\\*", "x", false),
            ("[", "[", false),
            ("[a", "a", false),
            ("[]a]", "]", false),
            ("[-]", "-", false),
            ("a*", "a", true),
            ("*b", "ab", true),
        ] {
            assert_eq!(matches(pattern, text), expected, "{pattern:?} {text:?}");
        }
    }
}
