//! Quantities of resources: `100m`, `1.5Gi`, `2e3`.

/// An amount in thousandths of the base unit, so that `100m` of CPU is exact.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Quantity {
    milli: i128,
}

/// The text is no quantity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no quantity; write a number with one of the suffixes m, k, M, G, T, P, E, Ki, Mi, Gi, Ti, Pi, Ei")]
pub struct ParseError(pub String);

/// Digits after the point that are looked at; a thousandth is the smallest amount there is, more is rounded up.
const FRACTION: usize = 9;

impl Quantity {
    /// So many of the base unit.
    pub fn from_units(units: i64) -> Self {
        Self { milli: i128::from(units) * 1000 }
    }

    /// So many thousandths of the base unit.
    pub fn from_milli(milli: i64) -> Self {
        Self { milli: i128::from(milli) }
    }

    /// Parses the API's form.
    ///
    /// # Errors
    /// Not a quantity.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        Self::parse_parts(text).ok_or_else(|| ParseError(text.to_owned()))
    }

    fn parse_parts(text: &str) -> Option<Self> {
        let (sign, digits) = match text.strip_prefix('-') {
            Some(rest) => (-1, rest),
            None => (1, text.strip_prefix('+').unwrap_or(text)),
        };
        let end = digits.find(|one: char| !one.is_ascii_digit() && one != '.').unwrap_or(digits.len());
        let (number, suffix) = digits.split_at(end);
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() && fraction.is_empty() || whole.len() > 19 {
            return None;
        }
        // The number in units of 10^-9.
        let kept: String = fraction.chars().chain(std::iter::repeat('0')).take(FRACTION).collect();
        let nano: i128 = format!("{whole}{kept}").parse().ok()?;
        let (multiply, divide) = scale(suffix)?;
        let scaled = nano.checked_mul(multiply)?;
        let divisor = divide * 1_000_000;
        let rounded = scaled / divisor + i128::from(scaled % divisor != 0);
        Some(Self { milli: sign * rounded })
    }

    /// In thousandths.
    pub fn milli(self) -> i64 {
        i64::try_from(self.milli).unwrap_or(if self.milli < 0 { i64::MIN } else { i64::MAX })
    }

    /// In whole units, rounded up.
    pub fn units(self) -> i64 {
        let rounded = self.milli.div_euclid(1000) + i128::from(self.milli.rem_euclid(1000) != 0);
        i64::try_from(rounded).unwrap_or(if rounded < 0 { i64::MIN } else { i64::MAX })
    }

    /// Whether it is nothing.
    pub fn is_zero(self) -> bool {
        self.milli == 0
    }
}

/// What a suffix multiplies and divides by.
fn scale(suffix: &str) -> Option<(i128, i128)> {
    let binary = |power: u32| Some((1i128 << (10 * power), 1));
    let decimal = |power: u32| Some((10i128.pow(power), 1));
    match suffix {
        "" => Some((1, 1)),
        "n" => Some((1, 1_000_000_000)),
        "u" => Some((1, 1_000_000)),
        "m" => Some((1, 1000)),
        "k" => decimal(3),
        "M" => decimal(6),
        "G" => decimal(9),
        "T" => decimal(12),
        "P" => decimal(15),
        "E" => decimal(18),
        "Ki" => binary(1),
        "Mi" => binary(2),
        "Gi" => binary(3),
        "Ti" => binary(4),
        "Pi" => binary(5),
        "Ei" => binary(6),
        exponent => {
            let power: i32 = exponent.strip_prefix(['e', 'E'])?.parse().ok()?;
            let size = 10i128.checked_pow(power.unsigned_abs().min(18))?;
            Some(if power < 0 { (1, size) } else { (size, 1) })
        }
    }
}

impl std::ops::Add for Quantity {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { milli: self.milli.saturating_add(other.milli) }
    }
}

impl std::iter::Sum for Quantity {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |sum, one| sum + one)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities() {
        for (text, milli) in [
            ("1", 1000),
            ("100m", 100),
            ("0.1", 100),
            ("1.5Gi", 1_610_612_736_000),
            ("2e3", 2_000_000),
            ("1E", 1_000_000_000_000_000_000_000),
            ("64Mi", 67_108_864_000),
            ("1u", 1),
            ("-1", -1000),
        ] {
            assert_eq!(Quantity::parse(text).map(|quantity| quantity.milli), Ok(milli), "{text}");
        }
        for text in ["", "m", "1.2.3", "1Zi", "ten", "1 Gi"] {
            assert!(Quantity::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn units_are_rounded_up() {
        assert_eq!(Quantity::parse("1500m").unwrap().units(), 2);
        assert_eq!(Quantity::parse("100m").unwrap().units(), 1);
    }
}
