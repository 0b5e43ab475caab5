//! Frames outside their guests' memory: buffers for them, and their last steps before they leave.
//!
//! Both ways out use these, the receive rings of guests ([`crate::worker`]) and the representors ([`crate::host`]).

pub mod outgoing;
pub mod pool;
pub mod software;
