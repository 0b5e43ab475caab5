//! Offload.
pub mod feed;
pub mod policy;
