//! The chain crate from outside: one conformance test on both implementations of `Chain`, and the client against a development node
//! that misbehaves.

extern crate quasar_chain as chain;

mod conformance;
mod devnode;
mod faults;
mod interop;
mod month;
mod runner;
mod setter;
mod speed;
mod world;
