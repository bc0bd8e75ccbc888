//! Values and their types (D-Bus Specification, "Type System").

use crate::BusError;

/// A value. What has no kind of its own here, as dictionaries, nobody of us speaks of.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// `b`
    Bool(bool),
    /// `y`
    Byte(u8),
    /// `n`
    I16(i16),
    /// `q`
    U16(u16),
    /// `i`
    I32(i32),
    /// `u`, and `h`: the number of a descriptor that came with the message.
    U32(u32),
    /// `x`
    I64(i64),
    /// `t`
    U64(u64),
    /// `d`
    F64(f64),
    /// `s`, and when read `o` and `g`.
    Text(String),
    /// `a`, with the type of its elements: it may have none.
    Array(String, Vec<Value>),
    /// `(…)`
    Struct(Vec<Value>),
    /// `v`
    Variant(Box<Value>),
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl Value {
    /// An array of texts.
    pub fn texts<'a>(texts: impl IntoIterator<Item = &'a str>) -> Self {
        Self::Array("s".to_owned(), texts.into_iter().map(Self::from).collect())
    }

    /// An array of bytes.
    pub fn bytes(bytes: &[u8]) -> Self {
        Self::Array("y".to_owned(), bytes.iter().copied().map(Self::Byte).collect())
    }

    /// It in a variant.
    pub fn variant(self) -> Self {
        Self::Variant(Box::new(self))
    }

    /// Its type.
    pub fn signature(&self) -> String {
        match self {
            Self::Bool(_) => "b".to_owned(),
            Self::Byte(_) => "y".to_owned(),
            Self::I16(_) => "n".to_owned(),
            Self::U16(_) => "q".to_owned(),
            Self::I32(_) => "i".to_owned(),
            Self::U32(_) => "u".to_owned(),
            Self::I64(_) => "x".to_owned(),
            Self::U64(_) => "t".to_owned(),
            Self::F64(_) => "d".to_owned(),
            Self::Text(_) => "s".to_owned(),
            Self::Array(of, _) => format!("a{of}"),
            Self::Struct(parts) => format!("({})", parts.iter().map(Self::signature).collect::<String>()),
            Self::Variant(_) => "v".to_owned(),
        }
    }

    /// The number in it, in a variant or not.
    ///
    /// # Errors
    /// It is something else.
    pub fn number(&self) -> Result<u64, BusError> {
        match self {
            Self::Byte(number) => Ok((*number).into()),
            Self::U16(number) => Ok((*number).into()),
            Self::U32(number) => Ok((*number).into()),
            Self::U64(number) => Ok(*number),
            Self::Variant(inner) => inner.number(),
            _ => Err(BusError::Malformed("a number was expected")),
        }
    }

    /// The truth in it, in a variant or not.
    ///
    /// # Errors
    /// It is something else.
    pub fn truth(&self) -> Result<bool, BusError> {
        match self {
            Self::Bool(truth) => Ok(*truth),
            Self::Variant(inner) => inner.truth(),
            _ => Err(BusError::Malformed("a truth was expected")),
        }
    }

    /// The text in it, in a variant or not.
    ///
    /// # Errors
    /// It is something else.
    pub fn text(&self) -> Result<&str, BusError> {
        match self {
            Self::Text(text) => Ok(text),
            Self::Variant(inner) => inner.text(),
            _ => Err(BusError::Malformed("a text was expected")),
        }
    }
}
