//! The small commands beside `run`.

pub mod checkpoint;
pub mod config;
pub mod doctor;
pub mod identity;
pub mod inspect;
