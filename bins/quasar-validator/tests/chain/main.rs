//! The program and the chain, as a person, a script and systemd meet them: real processes against a development node.

mod commands;
mod place;
mod supervised;
mod tls;
