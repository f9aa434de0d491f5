//! tmp
pub mod audit;
pub mod machine;
