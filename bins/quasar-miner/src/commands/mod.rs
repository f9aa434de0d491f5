//! The small commands beside `run`.

pub mod bench;
pub mod checkpoint;
pub mod config;
pub mod doctor;
pub mod inspect;
