//! The small commands beside `run`.

pub mod config;
pub mod eval;
pub mod identity;
pub mod inspect;
