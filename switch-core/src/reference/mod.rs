//! The plain twins of the fast code: whole frames, fresh parsing at each step, checksums recomputed in full. Tests hold
//! the fast code against them.

pub mod actions;
pub mod lookup;
