//! Plans as bytes: fields in declared order, integers little-endian, sequences and strings with their length in front.

/// Bytes that are no plan of this version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The bytes end too early.
    #[error("the plan is cut off")]
    CutOff,
    /// There are bytes after the end.
    #[error("the plan has bytes after its end")]
    Trailing,
    /// A value that this version does not know.
    #[error("the plan has a value that this version does not know: {0}")]
    Unknown(u64),
    /// Written by another version.
    #[error("the plan has version {0}; this build speaks {VERSION}")]
    Version(u16),
}

/// Version of the bytes; raised with every change of a plan's fields.
pub(crate) const VERSION: u16 = 3;

/// A value that goes into a plan's bytes.
pub(crate) trait Wire: Sized {
    fn put(&self, out: &mut Vec<u8>);
    fn take(input: &mut &[u8]) -> Result<Self, DecodeError>;
}

/// A whole plan as bytes: a version, then the value.
pub(crate) fn encode<T: Wire>(value: &T) -> Vec<u8> {
    let mut out = Vec::with_capacity(4096);
    VERSION.put(&mut out);
    value.put(&mut out);
    out
}

/// The opposite of [`encode`].
pub(crate) fn decode<T: Wire>(mut input: &[u8]) -> Result<T, DecodeError> {
    match u16::take(&mut input)? {
        VERSION => {}
        other => return Err(DecodeError::Version(other)),
    }
    let value = T::take(&mut input)?;
    if input.is_empty() { Ok(value) } else { Err(DecodeError::Trailing) }
}

fn take_bytes<'a>(input: &mut &'a [u8], count: usize) -> Result<&'a [u8], DecodeError> {
    let (taken, rest) = input.split_at_checked(count).ok_or(DecodeError::CutOff)?;
    *input = rest;
    Ok(taken)
}

macro_rules! wire_integers {
    ($($integer:ty),*) => {$(
        impl Wire for $integer {
            fn put(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.to_le_bytes());
            }
            fn take(input: &mut &[u8]) -> Result<Self, DecodeError> {
                let bytes = take_bytes(input, size_of::<$integer>())?;
                Ok(Self::from_le_bytes(bytes.try_into().map_err(|_| DecodeError::CutOff)?))
            }
        }
    )*};
}
wire_integers!(u16, u32, u64, i32, i64);

impl Wire for bool {
    fn put(&self, out: &mut Vec<u8>) {
        out.push(u8::from(*self));
    }
    fn take(input: &mut &[u8]) -> Result<Self, DecodeError> {
        match take_bytes(input, 1)? {
            [0] => Ok(false),
            [1] => Ok(true),
            other => Err(DecodeError::Unknown(other[0].into())),
        }
    }
}

fn put_length(length: usize, out: &mut Vec<u8>) {
    u32::try_from(length).expect("a plan's parts are far below 4 GiB").put(out);
}

fn take_length(input: &mut &[u8]) -> Result<usize, DecodeError> {
    usize::try_from(u32::take(input)?).map_err(|_| DecodeError::CutOff)
}

/// Raw bytes; one copy instead of one value at a time.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Bytes(pub Vec<u8>);

impl Wire for Bytes {
    fn put(&self, out: &mut Vec<u8>) {
        put_length(self.0.len(), out);
        out.extend_from_slice(&self.0);
    }
    fn take(input: &mut &[u8]) -> Result<Self, DecodeError> {
        let length = take_length(input)?;
        Ok(Self(take_bytes(input, length)?.to_vec()))
    }
}

impl Wire for String {
    fn put(&self, out: &mut Vec<u8>) {
        put_length(self.len(), out);
        out.extend_from_slice(self.as_bytes());
    }
    fn take(input: &mut &[u8]) -> Result<Self, DecodeError> {
        String::from_utf8(Bytes::take(input)?.0).map_err(|_| DecodeError::Unknown(0))
    }
}

impl Wire for std::ffi::CString {
    fn put(&self, out: &mut Vec<u8>) {
        put_length(self.as_bytes().len(), out);
        out.extend_from_slice(self.as_bytes());
    }
    fn take(input: &mut &[u8]) -> Result<Self, DecodeError> {
        Self::new(Bytes::take(input)?.0).map_err(|_| DecodeError::Unknown(0))
    }
}

impl<T: Wire> Wire for Vec<T> {
    fn put(&self, out: &mut Vec<u8>) {
        put_length(self.len(), out);
        self.iter().for_each(|item| item.put(out));
    }
    fn take(input: &mut &[u8]) -> Result<Self, DecodeError> {
        let length = take_length(input)?;
        // Every item takes a byte at least: a false length cannot reserve more than what was sent.
        let mut items = Self::with_capacity(length.min(input.len()));
        for _ in 0..length {
            items.push(T::take(input)?);
        }
        Ok(items)
    }
}

impl<T: Wire> Wire for Option<T> {
    fn put(&self, out: &mut Vec<u8>) {
        self.is_some().put(out);
        self.iter().for_each(|item| item.put(out));
    }
    fn take(input: &mut &[u8]) -> Result<Self, DecodeError> {
        if bool::take(input)? { T::take(input).map(Some) } else { Ok(None) }
    }
}

impl<A: Wire, B: Wire> Wire for (A, B) {
    fn put(&self, out: &mut Vec<u8>) {
        self.0.put(out);
        self.1.put(out);
    }
    fn take(input: &mut &[u8]) -> Result<Self, DecodeError> {
        Ok((A::take(input)?, B::take(input)?))
    }
}

/// Implements [`Wire`] for structs, field by field.
macro_rules! wire_struct {
    ($($name:ident { $($field:ident),* $(,)? })*) => {$(
        impl $crate::wire::Wire for $name {
            fn put(&self, out: &mut Vec<u8>) {
                $(self.$field.put(out);)*
            }
            fn take(input: &mut &[u8]) -> Result<Self, $crate::wire::DecodeError> {
                Ok(Self { $($field: $crate::wire::Wire::take(input)?),* })
            }
        }
    )*};
}

/// Implements [`Wire`] for enums without fields, by number.
macro_rules! wire_enum {
    ($($name:ident { $($variant:ident = $number:literal),* $(,)? })*) => {$(
        impl $crate::wire::Wire for $name {
            fn put(&self, out: &mut Vec<u8>) {
                let number: u16 = match self { $(Self::$variant => $number),* };
                number.put(out);
            }
            fn take(input: &mut &[u8]) -> Result<Self, $crate::wire::DecodeError> {
                match u16::take(input)? {
                    $($number => Ok(Self::$variant),)*
                    other => Err($crate::wire::DecodeError::Unknown(other.into())),
                }
            }
        }
    )*};
}

pub(crate) use {wire_enum, wire_struct};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_survive() {
        let value = (Some(vec![(7u32, "näme".to_owned())]), Bytes(vec![1, 2, 3]));
        let bytes = encode(&value);
        assert_eq!(decode::<(Option<Vec<(u32, String)>>, Bytes)>(&bytes), Ok(value));
    }

    #[test]
    fn broken_bytes_are_refused() {
        let bytes = encode(&vec!["one".to_owned(), "two".to_owned()]);
        for end in 0..bytes.len() {
            assert!(decode::<Vec<String>>(&bytes[..end]).is_err(), "cut at {end}");
        }
        assert_eq!(decode::<Vec<String>>(&[&bytes[..], &[0]].concat()), Err(DecodeError::Trailing));
        assert_eq!(decode::<u64>(&[9, 0]), Err(DecodeError::Version(9)));
    }
}
