//! Contexts of SELinux as text: `user:role:type`, and where the policy has levels `:level`. Pure.

use std::fmt;

use cri::v1::SeLinuxOption;

/// A context in its parts. A level may have colons inside.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Context {
    pub(crate) user: String,
    pub(crate) role: String,
    pub(crate) kind: String,
    /// Empty where the policy has none.
    pub(crate) level: String,
}

impl Context {
    /// From text; none if it has no three parts.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let mut parts = text.splitn(4, ':').map(str::to_owned);
        let (user, role, kind) = (parts.next()?, parts.next()?, parts.next()?);
        let level = parts.next().unwrap_or_default();
        let whole = [&user, &role, &kind].iter().all(|part| !part.is_empty());
        whole.then_some(Self { user, role, kind, level })
    }

    /// With the parts that `options` name.
    pub(crate) fn with(&self, options: &SeLinuxOption) -> Self {
        let or = |option: &str, own: &str| if option.is_empty() { own.to_owned() } else { option.to_owned() };
        Self {
            user: or(&options.user, &self.user),
            role: or(&options.role, &self.role),
            kind: or(&options.r#type, &self.kind),
            level: or(&options.level, &self.level),
        }
    }
}

impl fmt::Display for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.user, self.role, self.kind)?;
        if self.level.is_empty() { Ok(()) } else { write!(f, ":{}", self.level) }
    }
}

/// Whether a level has the form that upstream's runtimes take: one sensitivity or a range of two, then categories and ranges
/// of them, as `s0:c1,c5.c9`.
pub(crate) fn is_level(text: &str) -> bool {
    let (sensitivities, categories) = text.split_once(':').map_or((text, None), |(first, rest)| (first, Some(rest)));
    let (low, high) = sensitivities.split_once('-').map_or((sensitivities, None), |(low, high)| (low, Some(high)));
    let number = |word: &str, letter: char, digits: usize| {
        let number = word.strip_prefix(letter).unwrap_or_default();
        (1..=digits).contains(&number.len()) && number.bytes().all(|byte| byte.is_ascii_digit())
    };
    let range = |range: &str| range.splitn(2, '.').all(|category| number(category, 'c', 4));
    number(low, 's', 1)
        && high.is_none_or(|high| number(high, 's', 1))
        && categories.is_none_or(|categories| categories.split(',').all(range))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contexts_are_read_and_written() {
        let text = "system_u:system_r:container_t:s0-s0:c0.c1023";
        let context = Context::parse(text).unwrap();
        assert_eq!((context.kind.as_str(), context.level.as_str()), ("container_t", "s0-s0:c0.c1023"));
        assert_eq!(context.to_string(), text);
        assert_eq!(Context::parse("a:b:c").unwrap().to_string(), "a:b:c");
        for wrong in ["", "a:b", "a::c", "::"] {
            assert_eq!(Context::parse(wrong), None, "{wrong}");
        }
        let options = SeLinuxOption { r#type: "spc_t".into(), level: "s0:c1,c2".into(), ..Default::default() };
        assert_eq!(context.with(&options).to_string(), "system_u:system_r:spc_t:s0:c1,c2");
    }

    #[test]
    fn levels_have_a_form() {
        for (level, expect) in [
            ("s0", true),
            ("s0-s1", true),
            ("s0:c4,c5", true),
            ("s0-s0:c1.c1023,c1", true),
            ("s0,c4,c5", false),
            ("s0:c4,", false),
            ("s10", false),
            ("s0:c12345", false),
            ("s0:c1.c2.c3", false),
            ("s0-", false),
            ("", false),
        ] {
            assert_eq!(is_level(level), expect, "{level}");
        }
    }
}
