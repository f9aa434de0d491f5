//! `inspect FILE`: any signed document as JSON.

use std::path::Path;

use daemon::{Exit, Failure, inspect};

pub fn main(file: &Path) -> Result<Exit, Failure> {
    println!("{:#}", inspect::file(file)?);
    Ok(Exit::Done)
}
