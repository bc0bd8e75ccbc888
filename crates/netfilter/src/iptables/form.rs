//! Whether two texts say the same of a chain: what was written, and what `iptables-save` makes of it.

use std::borrow::Cow;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

/// What the kernel counts probabilities in (kernel: `net/netfilter/xt_statistic.c`).
const PROBABILITY_ONE: f64 = 2_147_483_648.0;

/// What a chain says, in short: the same for chains whose rules say the same in the same order. Of rules that say the same
/// by other options it may differ.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Print(u64);

impl Print {
    /// That of a chain with these rules.
    pub(super) fn of(rules: &[String]) -> Print {
        rules.iter().fold(Print::default(), |print, rule| print.then(rule))
    }

    /// That of the same chain with one rule more at its end.
    pub(super) fn then(self, rule: &str) -> Print {
        let mut hasher = DefaultHasher::new();
        (self.0, options(rule)).hash(&mut hasher);
        Print(hasher.finish())
    }
}

/// The options of a rule in some order, as one form has them. Matches (`-m`) are left out: their options follow, but for
/// `-m tcp` and the like, which says nothing more than `-p tcp`.
fn options(rule: &str) -> Vec<Vec<Cow<'_, str>>> {
    let mut options: Vec<Vec<Cow<'_, str>>> = Vec::new();
    let mut negates = false;
    for (word, is_quoted) in words(rule) {
        if word == "!" && !is_quoted {
            negates = true;
        } else if word.starts_with('-') && !is_quoted {
            let negation = std::mem::take(&mut negates).then_some("!");
            options.push(negation.into_iter().chain([word]).map(Cow::Borrowed).collect());
        } else {
            // A word before all options is one by itself.
            match options.last_mut() {
                Some(option) => option.push(word.into()),
                None => options.push(vec![word.into()]),
            }
        }
    }
    options.retain(|option| option[0] != "-m" && !is_added(option));
    options.iter_mut().for_each(|option| normalise(option));
    options.sort_unstable();
    options
}

/// What is shown where nothing was said: that the source is what counts (`-m recent`), and all of it.
fn is_added(option: &[Cow<'_, str>]) -> bool {
    const WHOLE: [&str; 2] = ["255.255.255.255", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"];
    match option {
        [name] => name == "--rsource",
        [name, mask] => name == "--mask" && WHOLE.contains(&&**mask),
        _ => false,
    }
}

fn normalise(option: &mut [Cow<'_, str>]) {
    let [name, value] = option else { return };
    if name == "--probability"
        && let Ok(probability) = value.parse::<f64>()
    {
        *value = (probability * PROBABILITY_ONE).round().to_string().into();
    }
}

/// Words of a rule without their quotes, and whether they had some.
fn words(rule: &str) -> impl Iterator<Item = (&str, bool)> {
    rule.split('"').enumerate().flat_map(|(number, part)| {
        let is_quoted = number % 2 == 1;
        let (whole, parted) = if is_quoted { (Some(part), "") } else { (None, part) };
        whole.into_iter().chain(parted.split_whitespace()).map(move |word| (word, is_quoted))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(written: &str, saved: &str, is_same: bool) {
        let [written, saved] = [written, saved].map(|rule| Print::default().then(rule));
        assert_eq!(written == saved, is_same);
    }

    #[test]
    fn what_iptables_save_makes_of_a_rule_says_the_same() {
        for (written, saved) in [
            (
                "! -s 10.244.0.0/16 -d 10.96.0.10/32 -p udp -m comment --comment \"d/dns:dns cluster IP\" -m udp --dport 53 -j M",
                "! -s 10.244.0.0/16 -d 10.96.0.10/32 -p udp -m comment --comment \"d/dns:dns cluster IP\" -m udp --dport 53 -j M",
            ),
            (
                "-m statistic --mode random --probability 0.3333333333 -j S",
                "-m statistic --mode random --probability 0.33333333349 -j S",
            ),
            (
                "-s 10.0.0.1/32 -m comment --comment d/dns:dns -j M",
                "-s 10.0.0.1/32 -m comment --comment \"d/dns:dns\" -j M",
            ),
            (
                "-m comment --comment d/dns:dns -p tcp -j DNAT --to-destination 10.0.0.1:80",
                "-p tcp -m comment --comment d/dns:dns -m tcp -j DNAT --to-destination 10.0.0.1:80",
            ),
            (
                "-m recent --rcheck --seconds 10800 --reap --name S -j S",
                "-m recent --rcheck --seconds 10800 --reap --name S --mask 255.255.255.255 --rsource -j S",
            ),
        ] {
            check(written, saved, true);
        }
    }

    #[test]
    fn another_word_is_another_rule() {
        check("-s 10.0.0.1/32 -j M", "-s 10.0.0.2/32 -j M", false);
        check("! -s 10.0.0.1/32 -j M", "-s 10.0.0.1/32 -j M", false);
        check("-s 10.0.0.1/32 ! -d 10.0.0.2/32", "! -s 10.0.0.1/32 -d 10.0.0.2/32", false);
        check("-m comment --comment \"a -j M\"", "-m comment --comment a -j M", false);
        check("--probability 0.5 -j S", "--probability 0.25 -j S", false);
        let rules = ["-j A", "-j B"].map(str::to_owned);
        let turned = ["-j B", "-j A"].map(str::to_owned);
        assert_ne!(Print::of(&rules), Print::of(&turned));
        assert_ne!(Print::of(&rules), Print::of(&rules[..1]));
    }
}
