//! Quantities (`100m`, `1.5Gi`, `2e3`) as exact numbers.

/// A quantity in billionths (the smallest suffix is `n`), so that every legal quantity is exact.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Nano(pub i128);

const UNIT: i128 = 1_000_000_000;

impl Nano {
    /// Reads a quantity as the API server does; `None` when it is malformed. What exceeds 2^63-1 is capped, what is
    /// finer than a billionth is rounded up.
    pub fn parse(text: &str) -> Option<Nano> {
        let split = text.find(|c: char| !(c.is_ascii_digit() || matches!(c, '.' | '+' | '-'))).unwrap_or(text.len());
        let (number, suffix) = text.split_at(split);
        let (numerator, denominator) = multiplier(suffix)?;
        let (mantissa, decimals) = mantissa(number)?;
        let scaled = mantissa.checked_mul(numerator)?.checked_mul(UNIT)?;
        let divisor = 10i128.checked_pow(decimals)?.checked_mul(denominator)?;
        let limit = i128::from(i64::MAX) * UNIT;
        Some(Nano(div_away(scaled, divisor).clamp(-limit, limit)))
    }

    /// Whole units (bytes, cores, counts), rounded up.
    pub fn units(self) -> i64 {
        i64::try_from(div_away(self.0, UNIT)).unwrap_or(i64::MAX)
    }

    /// Thousandths (milli-CPU), rounded up.
    pub fn millis(self) -> i64 {
        i64::try_from(div_away(self.0, UNIT / 1000)).unwrap_or(i64::MAX)
    }

    /// Whether it is a whole number of units.
    pub fn is_whole(self) -> bool {
        self.0 % UNIT == 0
    }
}

impl std::ops::Add for Nano {
    type Output = Nano;
    fn add(self, other: Nano) -> Nano {
        Nano(self.0.saturating_add(other.0))
    }
}

/// Division that rounds away from zero.
fn div_away(value: i128, divisor: i128) -> i128 {
    value / divisor + if value % divisor == 0 { 0 } else { value.signum() }
}

/// Digits without the point, and how many stood behind it.
fn mantissa(number: &str) -> Option<(i128, u32)> {
    let (sign, digits) = match number.as_bytes().first()? {
        b'-' => (-1, &number[1..]),
        b'+' => (1, &number[1..]),
        _ => (1, number),
    };
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let all = format!("{whole}{fraction}");
    if all.is_empty() || all.len() > 24 || !all.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    Some((sign * all.parse::<i128>().ok()?, u32::try_from(fraction.len()).ok()?))
}

/// What the suffix multiplies by, as a fraction.
fn multiplier(suffix: &str) -> Option<(i128, i128)> {
    let binary = |power: u32| Some((1i128 << (10 * power), 1));
    match suffix {
        "n" => Some((1, 1_000_000_000)),
        "u" => Some((1, 1_000_000)),
        "m" => Some((1, 1000)),
        "" => Some((1, 1)),
        "k" => Some((1000, 1)),
        "M" => Some((1_000_000, 1)),
        "G" => Some((1_000_000_000, 1)),
        "T" => Some((1_000_000_000_000, 1)),
        "P" => Some((1_000_000_000_000_000, 1)),
        "E" => Some((1_000_000_000_000_000_000, 1)),
        "Ki" => binary(1),
        "Mi" => binary(2),
        "Gi" => binary(3),
        "Ti" => binary(4),
        "Pi" => binary(5),
        "Ei" => binary(6),
        _ => exponent(suffix.strip_prefix(['e', 'E'])?),
    }
}

fn exponent(digits: &str) -> Option<(i128, i128)> {
    let power: i32 = digits.parse().ok().filter(|power| (-18..=18).contains(power))?;
    let factor = 10i128.pow(power.unsigned_abs());
    Some(if power < 0 { (1, factor) } else { (factor, 1) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_exact() {
        let cases = [
            ("1", Some(1_000)),
            ("100m", Some(100)),
            ("1.5", Some(1500)),
            (".5", Some(500)),
            ("2.", Some(2000)),
            ("1Ki", Some(1_024_000)),
            ("1.5Gi", Some(1_610_612_736_000)),
            ("2e3", Some(2_000_000)),
            ("2E3", Some(2_000_000)),
            ("1e-3", Some(1)),
            ("0.1m", Some(1)),
            ("-1", Some(-1000)),
            ("+1", Some(1000)),
            ("1E", Some(1_000_000_000_000_000_000_000)),
            ("", None),
            ("m", None),
            ("1x", None),
            ("1 Gi", None),
            ("1.2.3", None),
            ("128mb", None),
        ];
        for (text, millis) in cases {
            let found = Nano::parse(text).map(|nano| div_away(nano.0, UNIT / 1000));
            assert_eq!(found, millis, "{text}");
        }
        assert_eq!(Nano::parse("100Ei").unwrap().units(), i64::MAX);
    }
}
