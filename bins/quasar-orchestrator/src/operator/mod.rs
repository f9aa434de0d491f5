//! The operator's path to a run, in this order: sign the root, publish a checkpoint, prepare and publish data, create the run; and
//! what an operator does while it goes on: look, order, check, count.

pub mod checkpoint;
pub mod cost;
pub mod data;
pub mod orders;
pub mod replay;
pub mod root;
pub mod run;
pub mod shards;
pub mod status;
pub mod store;
