//! The operator's path to a run, in this order: sign the root, publish a checkpoint, prepare and publish data, create the run.

pub mod checkpoint;
pub mod data;
pub mod root;
pub mod run;
