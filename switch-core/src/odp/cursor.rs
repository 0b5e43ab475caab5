//! A place in the text that moves forward.

use super::error::{OdpError, OdpErrorKind};
use std::net::{Ipv4Addr, Ipv6Addr};

/// Deepest nesting of `encap`, `clone`, `sample` and the like, as in OVS (`MAX_ODP_NESTED`).
const MAX_DEPTH: usize = 32;

/// The low `bits` bits.
pub(super) const fn ones(bits: u32) -> u128 {
    if bits >= 128 { u128::MAX } else { (1 << bits) - 1 }
}

/// Whether `c` can be part of a port's name.
pub(super) fn is_port_char(c: char) -> bool {
    !c.is_whitespace() && !c.is_control() && !",()=/{}".contains(c)
}

pub(super) struct Cursor<'a> {
    text: &'a str,
    /// Byte offset, always at a character's start.
    at: usize,
    depth: usize,
}

impl<'a> Cursor<'a> {
    pub fn new(text: &'a str) -> Cursor<'a> {
        Cursor { text, at: 0, depth: 0 }
    }

    /// Byte offset of the next character.
    pub fn at(&self) -> usize {
        self.at
    }

    pub fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    pub fn is_end(&self) -> bool {
        self.at == self.text.len()
    }

    pub fn sees(&self, literal: &str) -> bool {
        self.rest().starts_with(literal)
    }

    /// Takes `literal` if it comes next.
    pub fn eat(&mut self, literal: &str) -> bool {
        let found = self.sees(literal);
        if found {
            self.at += literal.len();
        }
        found
    }

    pub fn expect(&mut self, literal: &str) -> Result<(), OdpError> {
        if self.eat(literal) { Ok(()) } else { Err(self.error(format!("'{literal}' expected"))) }
    }

    /// Takes characters as long as they are `wanted`.
    pub fn take_while(&mut self, wanted: impl Fn(char) -> bool) -> &'a str {
        let rest = self.rest();
        let taken = &rest[..rest.find(|c| !wanted(c)).unwrap_or(rest.len())];
        self.at += taken.len();
        taken
    }

    /// Takes a keyword or field name; empty if there is none.
    pub fn word(&mut self) -> &'a str {
        self.take_while(|c| c.is_ascii_alphanumeric() || c == '_')
    }

    /// Takes the commas and white space between two items, as freely as OVS does; tells whether there was white space.
    pub fn separators(&mut self) -> bool {
        self.take_while(|c| c == ',' || c.is_ascii_whitespace()).contains(|c: char| c != ',')
    }

    /// After an item of a parenthesised list: true at the end of the list, false if another item follows.
    pub fn list_ends(&mut self) -> Result<bool, OdpError> {
        if self.eat(")") {
            return Ok(true);
        }
        if !self.eat(",") {
            return Err(self.error("',' or ')' expected"));
        }
        self.take_while(|c| c.is_ascii_whitespace());
        Ok(false)
    }

    /// Whether `name:` comes next, as in the statistics of a dumped flow.
    pub fn sees_metadata(&self) -> bool {
        let rest = self.rest();
        let name = rest.find(|c: char| !(c.is_ascii_alphanumeric() || c == '-' || c == '_'));
        name.is_some_and(|end| end > 0 && rest[end..].starts_with(':'))
    }

    pub fn error(&self, message: impl Into<String>) -> OdpError {
        self.error_at(self.at, message)
    }

    pub fn error_at(&self, at: usize, message: impl Into<String>) -> OdpError {
        OdpError::new(OdpErrorKind::Syntax, self.text, at, message.into())
    }

    pub fn error_of(&self, kind: OdpErrorKind, at: usize, message: impl Into<String>) -> OdpError {
        OdpError::new(kind, self.text, at, message.into())
    }

    /// Goes one level deeper; the caller leaves it again by [`Cursor::leave`].
    pub fn enter(&mut self) -> Result<(), OdpError> {
        if self.depth == MAX_DEPTH {
            return Err(self.error(format!("nested more than {MAX_DEPTH} levels deep")));
        }
        self.depth += 1;
        Ok(())
    }

    pub fn leave(&mut self) {
        self.depth -= 1;
    }

    /// Takes everything up to the parenthesis that closes the one just taken, and that parenthesis.
    pub fn balanced(&mut self) -> Result<&'a str, OdpError> {
        let start = self.at;
        let mut open = 1;
        for (i, c) in self.rest().char_indices() {
            match c {
                '(' => open += 1,
                ')' => open -= 1,
                c if c.is_control() => return Err(self.error_at(start + i, "control character")),
                _ => {}
            }
            if open == 0 {
                self.at = start + i + 1;
                return Ok(&self.text[start..start + i]);
            }
        }
        Err(self.error_at(self.text.len(), "')' expected"))
    }

    /// A number below 2^`bits`, decimal or (`0x`) hexadecimal. A leading zero is refused: OVS would read it as octal.
    pub fn number(&mut self, bits: u32) -> Result<u128, OdpError> {
        let start = self.at;
        let (radix, digits) = if self.eat("0x") || self.eat("0X") {
            (16, self.take_while(|c| c.is_ascii_alphanumeric()))
        } else {
            (10, self.take_while(|c| c.is_ascii_alphanumeric()))
        };
        if digits.is_empty() || !digits.chars().all(|c| c.is_digit(radix)) {
            return Err(self.error_at(start, "a number expected"));
        }
        if radix == 10 && digits.len() > 1 && digits.starts_with('0') {
            return Err(self.error_at(start, "a decimal number must not begin with 0"));
        }
        match u128::from_str_radix(digits, radix) {
            Ok(value) if value <= ones(bits) => Ok(value),
            _ => Err(self.error_at(start, format!("does not fit in {bits} bits"))),
        }
    }

    /// `0x` and any number of hexadecimal digits as bytes, the last digit in the lowest half of the last byte.
    pub fn hex_bytes(&mut self) -> Result<Vec<u8>, OdpError> {
        let start = self.at;
        self.expect("0x")?;
        let digits = self.take_while(|c| c.is_ascii_alphanumeric());
        if digits.is_empty() || !digits.chars().all(|c| c.is_ascii_hexdigit()) {
            return Err(self.error_at(start, "hexadecimal digits expected"));
        }
        let nibbles: Vec<u8> =
            digits.bytes().filter_map(|b| (b as char).to_digit(16)).map(|d| d as u8).collect();
        let bytes = nibbles.rchunks(2).rev();
        Ok(bytes.map(|pair| pair.iter().fold(0, |byte, nibble| byte << 4 | nibble)).collect())
    }

    /// A MAC address.
    pub fn mac(&mut self) -> Result<u128, OdpError> {
        let start = self.at;
        let text = self.take_while(|c| c.is_ascii_alphanumeric() || c == ':');
        let mut mac = 0;
        let mut octets = 0;
        for octet in text.split(':') {
            let valid = matches!(octet.len(), 1 | 2) && octet.bytes().all(|b| b.is_ascii_hexdigit());
            let Some(value) = u8::from_str_radix(octet, 16).ok().filter(|_| valid) else { break };
            mac = mac << 8 | value as u128;
            octets += 1;
        }
        if octets != 6 || text.split(':').count() != 6 {
            return Err(self.error_at(start, "a MAC address expected"));
        }
        Ok(mac)
    }

    /// An IPv4 address.
    pub fn ipv4(&mut self) -> Result<u128, OdpError> {
        let start = self.at;
        let text = self.take_while(|c| c.is_ascii_alphanumeric() || c == '.');
        let address: Ipv4Addr = text.parse().map_err(|_| self.error_at(start, "an IPv4 address expected"))?;
        Ok(u32::from(address) as u128)
    }

    /// An IPv6 address.
    pub fn ipv6(&mut self) -> Result<u128, OdpError> {
        let start = self.at;
        let text = self.take_while(|c| c.is_ascii_alphanumeric() || c == '.' || c == ':');
        let address: Ipv6Addr = text.parse().map_err(|_| self.error_at(start, "an IPv6 address expected"))?;
        Ok(u128::from(address))
    }

    /// The mask of an address of `bits` bits: as an address, which contains `separator`, or as a prefix length.
    pub fn address_mask(&mut self, bits: u32, separator: char) -> Result<u128, OdpError> {
        let start = self.at;
        let ahead = self.rest();
        let end =
            ahead.find(|c: char| !(c.is_ascii_alphanumeric() || c == '.' || c == ':')).unwrap_or(ahead.len());
        if ahead[..end].contains(separator) {
            return if bits == 32 { self.ipv4() } else { self.ipv6() };
        }
        match self.number(8)? as u32 {
            length if length <= bits => Ok(ones(bits) & !ones(bits - length)),
            _ => Err(self.error_at(start, format!("a prefix length of at most {bits} expected"))),
        }
    }
}
