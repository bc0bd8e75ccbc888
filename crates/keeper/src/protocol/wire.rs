//! The encoding of the protocol's values: little-endian integers, length-prefixed bytes, fields in declared order.
//!
//! Nothing here reads or writes a file; a decoder never allocates more than the bytes it was given justify.

/// Why bytes are not the value they should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The message ends inside a field.
    #[error("message ends {missing} bytes too early")]
    Truncated {
        /// How many bytes more the field needs.
        missing: usize,
    },
    /// Bytes are left over after the last field.
    #[error("message has {0} bytes after its last field")]
    Trailing(usize),
    /// An enumeration has a value that this version does not know.
    #[error("{kind} has no variant {value}")]
    Unknown {
        /// The enumeration.
        kind: &'static str,
        /// The value that was sent.
        value: u32,
    },
    /// A string is not UTF-8.
    #[error("string is not UTF-8")]
    NotUtf8,
    /// A frame is longer than [`super::BODY_MAX`].
    #[error("frame of {0} bytes is longer than the protocol allows")]
    TooLong(usize),
    /// A frame promised more file descriptors than came with it.
    #[error("frame needs {needed} file descriptors, {present} came with it")]
    MissingFds {
        /// What the frame's header says.
        needed: usize,
        /// What was received up to the end of the frame.
        present: usize,
    },
}

/// The unread rest of a message.
#[derive(Debug)]
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    /// All of `bytes` is unread.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// The next `n` bytes.
    ///
    /// # Errors
    /// When fewer are left.
    pub fn bytes(&mut self, n: usize) -> Result<&'a [u8], DecodeError> {
        let missing = n.saturating_sub(self.0.len());
        let (head, rest) = self.0.split_at_checked(n).ok_or(DecodeError::Truncated { missing })?;
        self.0 = rest;
        Ok(head)
    }

    /// How many bytes are left.
    #[must_use]
    pub fn left(&self) -> usize {
        self.0.len()
    }

    /// Checks that the message ended with its last field.
    ///
    /// # Errors
    /// When bytes are left.
    pub fn end(&self) -> Result<(), DecodeError> {
        match self.left() {
            0 => Ok(()),
            n => Err(DecodeError::Trailing(n)),
        }
    }
}

/// A value with a fixed place in a message.
pub trait Wire: Sized {
    /// Appends the value.
    fn put(&self, out: &mut Vec<u8>);
    /// Reads the value.
    ///
    /// # Errors
    /// When the bytes are not such a value.
    fn take(input: &mut Input<'_>) -> Result<Self, DecodeError>;
}

/// Encodes one value.
pub fn encode<T: Wire>(value: &T) -> Vec<u8> {
    let mut out = Vec::new();
    value.put(&mut out);
    out
}

/// Decodes one value that fills `bytes` exactly.
///
/// # Errors
/// When the bytes are not such a value, or more than it.
pub fn decode<T: Wire>(bytes: &[u8]) -> Result<T, DecodeError> {
    let mut input = Input::new(bytes);
    let value = T::take(&mut input)?;
    input.end()?;
    Ok(value)
}

macro_rules! integers {
    ($($int:ty),*) => {$(
        impl Wire for $int {
            fn put(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.to_le_bytes());
            }
            fn take(input: &mut Input<'_>) -> Result<Self, DecodeError> {
                let mut raw = [0; size_of::<$int>()];
                raw.copy_from_slice(input.bytes(size_of::<$int>())?);
                Ok(<$int>::from_le_bytes(raw))
            }
        }
    )*};
}
integers!(u8, u16, u32, u64, i32);

impl Wire for bool {
    fn put(&self, out: &mut Vec<u8>) {
        u8::from(*self).put(out);
    }
    fn take(input: &mut Input<'_>) -> Result<Self, DecodeError> {
        match u8::take(input)? {
            0 => Ok(false),
            1 => Ok(true),
            value => Err(DecodeError::Unknown { kind: "bool", value: value.into() }),
        }
    }
}

/// Bytes that the protocol does not look into.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Blob(pub Vec<u8>);

impl Wire for Blob {
    fn put(&self, out: &mut Vec<u8>) {
        put_length(self.0.len(), out);
        out.extend_from_slice(&self.0);
    }
    fn take(input: &mut Input<'_>) -> Result<Self, DecodeError> {
        let length = take_length(input)?;
        Ok(Self(input.bytes(length)?.to_vec()))
    }
}

impl Wire for String {
    fn put(&self, out: &mut Vec<u8>) {
        put_length(self.len(), out);
        out.extend_from_slice(self.as_bytes());
    }
    fn take(input: &mut Input<'_>) -> Result<Self, DecodeError> {
        String::from_utf8(Blob::take(input)?.0).map_err(|_| DecodeError::NotUtf8)
    }
}

impl<T: Wire> Wire for Vec<T> {
    fn put(&self, out: &mut Vec<u8>) {
        put_length(self.len(), out);
        self.iter().for_each(|item| item.put(out));
    }
    fn take(input: &mut Input<'_>) -> Result<Self, DecodeError> {
        let length = take_length(input)?;
        (0..length).map(|_| T::take(input)).collect()
    }
}

impl<T: Wire> Wire for Option<T> {
    fn put(&self, out: &mut Vec<u8>) {
        self.is_some().put(out);
        if let Some(value) = self {
            value.put(out);
        }
    }
    fn take(input: &mut Input<'_>) -> Result<Self, DecodeError> {
        Ok(if bool::take(input)? { Some(T::take(input)?) } else { None })
    }
}

impl<A: Wire, B: Wire> Wire for (A, B) {
    fn put(&self, out: &mut Vec<u8>) {
        self.0.put(out);
        self.1.put(out);
    }
    fn take(input: &mut Input<'_>) -> Result<Self, DecodeError> {
        Ok((A::take(input)?, B::take(input)?))
    }
}

fn put_length(length: usize, out: &mut Vec<u8>) {
    u32::try_from(length).expect("no message is as long as 4 GiB").put(out);
}

/// A length or count. Every item takes a byte at least, so a count above the bytes left is a lie.
fn take_length(input: &mut Input<'_>) -> Result<usize, DecodeError> {
    let length = u32::take(input)? as usize;
    match length.checked_sub(input.left()) {
        None | Some(0) => Ok(length),
        Some(missing) => Err(DecodeError::Truncated { missing }),
    }
}

/// Declares structs whose fields are encoded in declared order.
macro_rules! wire_struct {
    ($($(#[$meta:meta])* pub struct $name:ident { $($(#[$field_meta:meta])* pub $field:ident: $ty:ty,)* })*) => {$(
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub struct $name { $($(#[$field_meta])* pub $field: $ty,)* }

        impl $crate::protocol::wire::Wire for $name {
            fn put(&self, out: &mut Vec<u8>) {
                $($crate::protocol::wire::Wire::put(&self.$field, out);)*
            }
            fn take(
                input: &mut $crate::protocol::wire::Input<'_>,
            ) -> Result<Self, $crate::protocol::wire::DecodeError> {
                Ok(Self { $($field: $crate::protocol::wire::Wire::take(input)?,)* })
            }
        }
    )*};
}

/// Declares enumerations that travel as one byte.
macro_rules! wire_enum {
    ($($(#[$meta:meta])* pub enum $name:ident { $($(#[$variant_meta:meta])* $variant:ident = $value:literal,)* })*) => {$(
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum $name { $($(#[$variant_meta])* $variant = $value,)* }

        impl $crate::protocol::wire::Wire for $name {
            fn put(&self, out: &mut Vec<u8>) {
                out.push(*self as u8);
            }
            fn take(
                input: &mut $crate::protocol::wire::Input<'_>,
            ) -> Result<Self, $crate::protocol::wire::DecodeError> {
                match <u8 as $crate::protocol::wire::Wire>::take(input)? {
                    $($value => Ok(Self::$variant),)*
                    value => Err($crate::protocol::wire::DecodeError::Unknown {
                        kind: stringify!($name),
                        value: value.into(),
                    }),
                }
            }
        }
    )*};
}

/// Declares an enumeration of messages: a frame's kind and the body that belongs to it.
macro_rules! wire_messages {
    ($(#[$meta:meta])* pub enum $name:ident { $($(#[$variant_meta:meta])* $kind:literal => $variant:ident $(($body:ty))?,)* }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub enum $name { $($(#[$variant_meta])* $variant $(($body))?,)* }

        impl $name {
            /// The number of this message in a frame's header.
            #[must_use]
            pub fn kind(&self) -> u16 {
                match self { $(wire_messages!(@pattern $variant $($body)?) => $kind,)* }
            }

            /// Appends the body.
            pub fn put_body(&self, out: &mut Vec<u8>) {
                let _ = &out;
                match self { $(wire_messages!(@bind body $variant $($body)?) => wire_messages!(@put body out $($body)?),)* }
            }

            /// Reads the body of a frame of this kind; `None` when the kind belongs to another group of messages.
            ///
            /// # Errors
            /// When the body is not what the kind promises.
            pub fn take_body(
                kind: u16,
                input: &mut $crate::protocol::wire::Input<'_>,
            ) -> Result<Option<Self>, $crate::protocol::wire::DecodeError> {
                Ok(Some(match kind {
                    $($kind => wire_messages!(@take input $variant $($body)?),)*
                    _ => return Ok(None),
                }))
            }
        }
    };
    (@pattern $variant:ident) => { Self::$variant };
    (@pattern $variant:ident $body:ty) => { Self::$variant(_) };
    (@bind $bound:ident $variant:ident) => { Self::$variant };
    (@bind $bound:ident $variant:ident $body:ty) => { Self::$variant($bound) };
    (@put $bound:ident $out:ident) => { () };
    (@put $bound:ident $out:ident $body:ty) => { $crate::protocol::wire::Wire::put($bound, $out) };
    (@take $input:ident $variant:ident) => { Self::$variant };
    (@take $input:ident $variant:ident $body:ty) => {
        Self::$variant(<$body as $crate::protocol::wire::Wire>::take($input)?)
    };
}

pub(crate) use {wire_enum, wire_messages, wire_struct};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_survive_a_round_trip() {
        type Odd = (Vec<(String, u16)>, Option<Blob>);
        let value: Odd = (vec![("a".into(), 1), (String::new(), u16::MAX)], Some(Blob(vec![0, 255])));
        assert_eq!(decode::<Odd>(&encode(&value)), Ok(value));
    }

    #[test]
    fn a_count_that_lies_allocates_nothing() {
        assert!(matches!(decode::<Vec<u64>>(&u32::MAX.to_le_bytes()), Err(DecodeError::Truncated { .. })));
    }

    #[test]
    fn leftovers_and_odd_bools_are_refused() {
        assert_eq!(decode::<u8>(&[1, 2]), Err(DecodeError::Trailing(1)));
        assert_eq!(decode::<bool>(&[2]), Err(DecodeError::Unknown { kind: "bool", value: 2 }));
    }
}
