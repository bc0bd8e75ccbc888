//! A pod as Go prints it: upstream's kubelet numbers static pods by a hash of that text, and a node that changes from one
//! kubelet to the other keeps its static pods only if both find the same number. Pure.
//!
//! The text is what `spew` makes of upstream's own types (`k8s.io/utils/dump`, `ForHash`): types in parentheses, fields in
//! their order. `upstream_pod.txt` has those types, one a line: a name, then `Field:type`, or `Field=key:type` where the
//! key in the API is not the field's name in lower case; `-` is the object itself. What is not in it is text.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::OnceLock;

use k8s_openapi::api::core::v1::Pod;
use serde_json::{Map, Value};

/// The types of Kubernetes 1.37.
const TYPES: &str = include_str!("upstream_pod.txt");
const RESOURCES: &str = "core.ResourceList";

/// A field of a type.
struct Field {
    name: &'static str,
    /// Its key in the API; none if its fields are those of the object itself.
    key: Option<String>,
    kind: &'static str,
}

type Types = HashMap<&'static str, Vec<Field>>;

fn types() -> &'static Types {
    static TABLE: OnceLock<Types> = OnceLock::new();
    TABLE.get_or_init(|| {
        let fields = |line: &'static str| {
            let mut words = line.split(' ');
            Some((words.next()?, words.filter_map(field).collect()))
        };
        TYPES.lines().filter_map(fields).collect()
    })
}

fn field(word: &'static str) -> Option<Field> {
    let (name, kind) = word.split_once(':')?;
    let (name, key) = match name.split_once('=') {
        Some((name, "-")) => (name, None),
        Some((name, key)) => (name, Some(key.to_owned())),
        None => (name, Some(name[..1].to_ascii_lowercase() + &name[1..])),
    };
    Some(Field { name, key, kind })
}

/// The text for a pod with its defaults. Its status does not count.
pub(super) fn print(pod: &Pod) -> String {
    let mut value = serde_json::to_value(pod).unwrap_or_default();
    if let Some(fields) = value.as_object_mut() {
        // Once it is decoded, its type says what it is.
        fields.retain(|name, _| !["status", "kind", "apiVersion"].contains(&name.as_str()));
    }
    let mut out = String::new();
    write(&mut out, "*core.Pod", Some(&value), true);
    out
}

/// Writes a value, with its type in front if that is not known already.
fn write(out: &mut String, kind: &str, value: Option<&Value>, typed: bool) {
    let value = value.filter(|value| !value.is_null());
    if typed {
        out.extend(["(", kind, ")"]);
    }
    if let Some(inner) = kind.strip_prefix('*') {
        return match value {
            Some(value) => write(out, inner, Some(value), false),
            None => out.push_str("<nil>"),
        };
    }
    if let Some(item) = kind.strip_prefix("[]") {
        return list(out, value.and_then(Value::as_array), |out, one| write(out, item, Some(one), false));
    }
    match kind {
        "bool" => out.push_str(if value.and_then(Value::as_bool) == Some(true) { "true" } else { "false" }),
        "int32" | "int64" => number(out, value.and_then(Value::as_i64).unwrap_or(0)),
        "map[string]string" => {
            map(out, value.and_then(Value::as_object), |out, one| write(out, "string", Some(one), false))
        }
        RESOURCES => map(out, value.and_then(Value::as_object), |out, one| quantity(out, one.as_str(), true)),
        "resource.Quantity" => quantity(out, value.and_then(Value::as_str), false),
        "v1.Time" => out.push_str("{Time:(time.Time){wall:(uint64)0 ext:(int64)0 loc:(*time.Location)<nil>}}"),
        "intstr.IntOrString" => int_or_string(out, value),
        _ => match types().get(kind) {
            Some(fields) => structure(out, fields, value),
            None => out.push_str(value.and_then(Value::as_str).unwrap_or_default()),
        },
    }
}

fn number(out: &mut String, number: i64) {
    // Writing to a String cannot fail.
    let _ = write!(out, "{number}");
}

fn list(out: &mut String, items: Option<&Vec<Value>>, each: impl Fn(&mut String, &Value)) {
    let Some(items) = items else { return out.push_str("<nil>") };
    out.push('[');
    for (place, item) in items.iter().enumerate() {
        out.push_str(if place > 0 { " " } else { "" });
        each(out, item);
    }
    out.push(']');
}

fn map(out: &mut String, entries: Option<&Map<String, Value>>, each: impl Fn(&mut String, &Value)) {
    let Some(entries) = entries else { return out.push_str("<nil>") };
    let mut keys: Vec<&String> = entries.keys().collect();
    keys.sort();
    out.push_str("map[");
    for (place, key) in keys.into_iter().enumerate() {
        out.extend([if place > 0 { " " } else { "" }, key.as_str(), ":"]);
        each(out, &entries[key]);
    }
    out.push(']');
}

fn structure(out: &mut String, fields: &[Field], value: Option<&Value>) {
    out.push('{');
    for (place, Field { name, key, kind }) in fields.iter().enumerate() {
        out.extend([if place > 0 { " " } else { "" }, name, ":"]);
        let own = match key {
            Some(key) => value.and_then(|value| value.get(key)),
            None => value,
        };
        write(out, kind, own, true);
    }
    out.push('}');
}

fn int_or_string(out: &mut String, value: Option<&Value>) {
    let text = value.and_then(Value::as_str);
    let int = value.and_then(Value::as_i64).unwrap_or(0);
    let kind = i64::from(text.is_some());
    let _ = write!(out, "{{Type:(intstr.Type){kind} IntVal:(int32){int} StrVal:(string){}}}", text.unwrap_or_default());
}

/// A quantity as upstream keeps it (`ParseQuantity`): a number with a decimal scale, beside its text where that is the
/// shortest. With `limited`, as in lists of resources, nothing is smaller than a thousandth.
fn quantity(out: &mut String, text: Option<&str>, limited: bool) {
    let Kept { value, scale, big, text, format } = text.map(|text| Kept::of(text.trim(), limited)).unwrap_or_default();
    let _ = write!(out, "{{i:(resource.int64Amount){{value:(int64){value} scale:(resource.Scale){scale}}} ");
    let _ = match big {
        None => write!(out, "d:(resource.infDecAmount){{Dec:(*inf.Dec)<nil>}} "),
        Some((unscaled, places)) => write!(
            out,
            "d:(resource.infDecAmount){{Dec:(*inf.Dec){{unscaled:(big.Int){{neg:(bool)false abs:(big.nat)[{unscaled}]}} \
             scale:(inf.Scale){places}}}}} "
        ),
    };
    let _ = write!(out, "s:(string){text} Format:(resource.Format){format}}}");
}

/// What upstream keeps of a quantity.
#[derive(Debug, Default, PartialEq)]
struct Kept {
    value: i64,
    scale: i32,
    /// A number with so many decimal places, where the former is none.
    big: Option<(u64, i32)>,
    text: String,
    format: &'static str,
}

impl Kept {
    fn of(text: &str, limited: bool) -> Self {
        if text == "0" {
            return Self { text: text.to_owned(), format: "DecimalSI", ..Self::default() };
        }
        Self::parse(text, limited).unwrap_or_default()
    }

    fn parse(text: &str, limited: bool) -> Option<Self> {
        let digits = text.trim_start_matches(['-', '+']);
        let is_negative = text.starts_with('-');
        let stripped = digits.trim_start_matches('0');
        let end = stripped.find(|one: char| !one.is_ascii_digit()).unwrap_or(stripped.len());
        let (whole, rest) = stripped.split_at(end);
        let whole = if whole.is_empty() { "0" } else { whole };
        let (decimals, suffix) = match rest.strip_prefix('.') {
            Some(rest) => rest.split_at(rest.find(|one: char| !one.is_ascii_digit()).unwrap_or(rest.len())),
            None => ("", rest),
        };
        let (exponent, format) = exponent(suffix)?;
        let places = i32::try_from(decimals.len()).ok()?;
        let shifted = format!("{whole}{decimals}");
        let number: i64 = shifted.parse().ok()?;
        let sign = if is_negative { -1 } else { 1 };
        if format == "BinarySI" {
            if places > 0 {
                return Self::fraction(number, exponent, places, limited);
            }
            let value = number.checked_mul(1_i64.checked_shl(u32::try_from(exponent).ok()?)?)?;
            // Of its own text only if it is no multiple of eight, which could be shorter.
            let text = if number & 7 != 0 { text.to_owned() } else { String::new() };
            return Some(Self { value: sign * value, scale: 0, big: None, text, format });
        }
        let scale = exponent - places;
        let is_canonical = scale % 3 == 0 && !shifted.ends_with("000") && !shifted.starts_with('0');
        let kept = Self {
            value: sign * number,
            scale,
            big: None,
            text: if is_canonical { text.to_owned() } else { String::new() },
            format,
        };
        Some(if limited && scale < -3 { kept.in_thousandths() } else { kept })
    }

    /// A binary quantity with decimal places: `1.5Gi`.
    fn fraction(number: i64, exponent: i32, places: i32, limited: bool) -> Option<Self> {
        let unscaled = u64::try_from(number).ok()?.checked_mul(1_u64.checked_shl(u32::try_from(exponent).ok()?)?)?;
        let big = match places {
            places if limited && places < 3 => (unscaled.checked_mul(10_u64.pow(u32::try_from(3 - places).ok()?))?, 3),
            places if limited => (unscaled.div_ceil(10_u64.checked_pow(u32::try_from(places - 3).ok()?)?), 3),
            places => (unscaled, places),
        };
        Some(Self { big: Some(big), format: "BinarySI", ..Self::default() })
    }

    /// Rounded up.
    fn in_thousandths(self) -> Self {
        let lost = u32::try_from(-3 - self.scale).unwrap_or(0);
        let by = 10_i64.checked_pow(lost).unwrap_or(i64::MAX);
        let value = self.value / by + i64::from(self.value % by > 0);
        Self { value, scale: -3, text: String::new(), ..self }
    }
}

/// What a suffix means: a power of two or ten, and upstream's name for such suffixes.
fn exponent(suffix: &str) -> Option<(i32, &'static str)> {
    const BINARY: [&str; 6] = ["Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    const DECIMAL: [(&str, i32); 10] =
        [("n", -9), ("u", -6), ("m", -3), ("", 0), ("k", 3), ("M", 6), ("G", 9), ("T", 12), ("P", 15), ("E", 18)];
    if let Some(place) = BINARY.iter().position(|one| *one == suffix) {
        return Some((10 * (i32::try_from(place).ok()? + 1), "BinarySI"));
    }
    if let Some((_, power)) = DECIMAL.iter().find(|(one, _)| *one == suffix) {
        return Some((*power, "DecimalSI"));
    }
    let power = suffix.strip_prefix(['e', 'E'])?.parse().ok()?;
    Some((power, "DecimalExponent"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, limited: bool, value: i64, scale: i32, kept: &str, format: &'static str) {
        let expect = Kept { value, scale, big: None, text: kept.to_owned(), format };
        assert_eq!(Kept::of(text, limited), expect, "{text}");
    }

    /// The numbers are those of upstream's `ParseQuantity`.
    #[test]
    fn quantities_are_kept_as_upstream_does() {
        check("250m", true, 250, -3, "250m", "DecimalSI");
        check("100Mi", true, 104_857_600, 0, "100Mi", "BinarySI");
        check("64Mi", false, 67_108_864, 0, "", "BinarySI");
        check("0.5", true, 5, -1, "", "DecimalSI");
        check("1500M", true, 1500, 6, "1500M", "DecimalSI");
        check("1000", true, 1000, 0, "", "DecimalSI");
        check("100u", true, 1, -3, "", "DecimalSI");
        check("100u", false, 100, -6, "100u", "DecimalSI");
        check("2e3", true, 2, 3, "2e3", "DecimalExponent");
        check("0", true, 0, 0, "0", "DecimalSI");
        let fraction = |limited| Kept::of("1.5Gi", limited).big;
        assert_eq!((fraction(true), fraction(false)), (Some((1_610_612_736_000, 3)), Some((16_106_127_360, 1))));
    }
}
