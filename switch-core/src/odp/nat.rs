//! `nat(…)` within `ct(…)`: checked and carried as text.

use super::cursor::Cursor;
use super::error::OdpError;

/// Reads from behind `nat(` to its closing parenthesis: nothing, or `src` or `dst`, which may have a range of addresses
/// and of ports, and flags.
pub(super) fn parse(c: &mut Cursor<'_>) -> Result<String, OdpError> {
    let mut items: Vec<&str> = Vec::new();
    if c.eat(")") {
        return Ok(String::new());
    }
    loop {
        let at = c.at();
        let start = c.rest();
        let word = c.word();
        match word {
            "src" | "dst" if items.is_empty() => {
                if c.eat("=") {
                    parse_range(c)?;
                }
            }
            "src" | "dst" => return Err(c.error_at(at, "one 'src' or 'dst' expected, before all else")),
            "persistent" | "hash" | "random" if !items.is_empty() => {
                let excluded = match word {
                    "hash" => "random",
                    "random" => "hash",
                    _ => "",
                };
                if items.contains(&word) {
                    return Err(c.error_at(at, format!("{word} given twice")));
                }
                if items.contains(&excluded) {
                    return Err(c.error_at(at, format!("{word} contradicts {excluded}")));
                }
            }
            "persistent" | "hash" | "random" => return Err(c.error_at(at, "'src' or 'dst' expected first")),
            _ => return Err(c.error_at(at, "'src', 'dst', 'persistent', 'hash' or 'random' expected")),
        }
        items.push(&start[..start.len() - c.rest().len()]);
        if c.list_ends()? {
            return Ok(items.join(","));
        }
    }
}

/// `ADDRESS[-ADDRESS][:PORT[-PORT]]`, IPv6 addresses in brackets if ports follow.
fn parse_range(c: &mut Cursor<'_>) -> Result<(), OdpError> {
    let at = c.at();
    let address = |c: &mut Cursor<'_>| -> Result<(bool, u128), OdpError> {
        if c.eat("[") {
            let address = c.ipv6()?;
            c.expect("]")?;
            return Ok((false, address));
        }
        let ahead = c.rest();
        let end = ahead.find(|next: char| !next.is_ascii_alphanumeric()).unwrap_or(ahead.len());
        if ahead[end..].starts_with('.') { Ok((true, c.ipv4()?)) } else { Ok((false, c.ipv6()?)) }
    };
    let (is_v4, first) = address(c)?;
    if c.eat("-") {
        let (last_is_v4, last) = address(c)?;
        if last_is_v4 != is_v4 || last < first {
            return Err(c.error_at(at, "a range of addresses expected"));
        }
    }
    if c.eat(":") {
        let at = c.at();
        let first = c.number(16)?;
        if c.eat("-") && c.number(16)? < first {
            return Err(c.error_at(at, "a range of ports expected"));
        }
    }
    Ok(())
}
