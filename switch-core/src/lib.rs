//! The switch without I/O: packet parsing, flow keys and masks, exact-match and masked tables, compiled actions.
//!
//! Nothing here reads a clock, starts a thread or makes a system call; time, randomness and packets come in as
//! arguments. A packet goes through [`pipeline`]: [`common`] recognizes it or [`parse`] makes its [`key`], [`l1`] and [`l2`] find its flow, and the
//! flow's compiled [`compile::Plan`] is executed by [`exec`]. [`mod@reference`] is the plain twin that the fast code is
//! tested against.

pub mod action;
pub mod chain;
pub mod checksum;
pub mod common;
pub mod compile;
pub mod compose;
pub mod crc32c;
pub mod drop;
mod edit;
pub mod exec;
pub mod flow;
pub mod hash;
pub mod key;
pub mod l1;
pub mod l2;
pub mod odp;
pub mod offload;
pub mod packet;
pub mod parse;
pub mod pipeline;
pub mod planner;
pub mod reference;
pub mod segment;
pub mod slab;
pub mod tables;
pub mod tunnel;
