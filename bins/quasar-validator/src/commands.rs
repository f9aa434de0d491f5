//! The small commands beside `run`.

pub mod chain;
pub mod config;
pub mod eval;
pub mod inspect;
