//! What was wrong with a text, and where.

use std::fmt;

/// Characters of the text that are shown on either side of the mistake.
const CONTEXT: usize = 60;

/// What kind of mistake it is, for callers that treat some differently.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OdpErrorKind {
    /// The text does not follow the syntax, or names something that does not exist.
    Syntax,
    /// The flow's ingress port is not one of ours.
    UnknownPort,
    /// The flow contradicts itself, or lacks what it needs and what that is cannot be inferred.
    Prerequisite,
}

/// A text that is not a flow or not actions.
///
/// Its display has three lines: the message, the text, and a caret below the character; [`OdpError::message`] alone is
/// one line.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub struct OdpError {
    /// Offset of the offending character, in characters from the start of the text.
    pub at: usize,
    /// What is wrong there, in one line.
    pub message: String,
    /// What kind of mistake it is.
    pub kind: OdpErrorKind,
    /// The text itself.
    text: String,
}

impl OdpError {
    /// A mistake at byte `offset` of `text`.
    pub(super) fn new(kind: OdpErrorKind, text: &str, offset: usize, message: String) -> OdpError {
        let at = text.char_indices().take_while(|&(i, _)| i < offset).count();
        OdpError { at, message, kind, text: text.to_owned() }
    }
}

impl fmt::Display for OdpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let length = self.text.chars().count();
        let start = self.at.saturating_sub(CONTEXT);
        let end = (self.at + CONTEXT).min(length);
        let before = if start > 0 { "…" } else { "" };
        let after = if end < length { "…" } else { "" };
        // One column per character, whatever the text holds, so that the caret stands where it should.
        let shown = self.text.chars().skip(start).take(end - start);
        let shown: String = shown.map(|c| if c.is_control() { ' ' } else { c }).collect();
        let column = self.at - start + before.chars().count();
        write!(f, "{} (at character {})\n{before}{shown}{after}\n{:column$}^", self.message, self.at, "")
    }
}
