//! The fields of an encoded message, without decoding them. See
//! <https://protobuf.dev/programming-guides/encoding/>.

use std::fmt;

/// Longest encoding of a varint, in bytes.
const VARINT_BYTES: usize = 10;

/// Bytes that are no message; prost would not decode them either.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Malformed;

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("failed to decode Protobuf message: its fields are malformed")
    }
}

/// One field of a message.
#[derive(Clone, Copy, Debug)]
pub(super) struct Field<'a> {
    pub(super) number: u32,
    pub(super) value: Value<'a>,
    /// The whole field, with its key.
    pub(super) raw: &'a [u8],
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Value<'a> {
    Varint,
    /// A message, a text, bytes or packed numbers.
    Delimited(&'a [u8]),
    /// Fixed 32 or 64 bits.
    Fixed,
    /// A group, which no message of ours has.
    Group,
}

/// Iterates over the fields of a message.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl<'a> Fields<'a> {
    /// The next field; none at the end of the message.
    pub(super) fn next(&mut self) -> Result<Option<Field<'a>>, Malformed> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let before = self.0;
        let (number, wire_type) = self.key()?;
        let value = match wire_type {
            3 => self.group(number)?,
            _ => self.simple(wire_type)?,
        };
        Ok(Some(Field { number, value, raw: &before[..before.len() - self.0.len()] }))
    }

    fn key(&mut self) -> Result<(u32, u8), Malformed> {
        let key = u32::try_from(self.varint()?).map_err(|_| Malformed)?;
        let number = key >> 3;
        if number == 0 {
            return Err(Malformed);
        }
        Ok((number, (key & 7) as u8))
    }

    fn simple(&mut self, wire_type: u8) -> Result<Value<'a>, Malformed> {
        match wire_type {
            0 => self.varint().map(|_| Value::Varint),
            1 => self.take(8).map(|_| Value::Fixed),
            2 => {
                let length = usize::try_from(self.varint()?).map_err(|_| Malformed)?;
                self.take(length).map(Value::Delimited)
            }
            5 => self.take(4).map(|_| Value::Fixed),
            _ => Err(Malformed),
        }
    }

    /// Passes a group and those within it, however deep, without recursion.
    fn group(&mut self, number: u32) -> Result<Value<'a>, Malformed> {
        let mut open = vec![number];
        while let Some(innermost) = open.last() {
            match self.key()? {
                (number, 3) => open.push(number),
                (number, 4) if number == *innermost => _ = open.pop(),
                (_, wire_type) => _ = self.simple(wire_type)?,
            }
        }
        Ok(Value::Group)
    }

    fn varint(&mut self) -> Result<u64, Malformed> {
        let mut value = 0;
        for (index, byte) in self.0.iter().enumerate().take(VARINT_BYTES) {
            // The tenth byte has room for one bit.
            if index == VARINT_BYTES - 1 && *byte > 1 {
                return Err(Malformed);
            }
            value |= u64::from(byte & 0x7f) << (7 * index);
            if *byte < 0x80 {
                self.0 = &self.0[index + 1..];
                return Ok(value);
            }
        }
        Err(Malformed)
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(Malformed)?;
        self.0 = rest;
        Ok(taken)
    }
}

/// The key of a length-delimited field.
pub(super) fn delimited_key(number: u32) -> u64 {
    u64::from(number << 3 | 2)
}
