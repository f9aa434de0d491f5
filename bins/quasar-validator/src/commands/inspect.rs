//! `inspect FILE`: any signed document as JSON.

use std::path::Path;

use daemon::{Exit, Failure, inspect};

pub fn main(file: &Path) -> Result<Exit, Failure> {
    let inspected = inspect::file(file)?;
    println!("{:#}", inspected.json);
    Ok(inspected.exit())
}
