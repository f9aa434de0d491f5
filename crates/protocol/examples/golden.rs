//! Writes the golden documents of the tests to a folder: needed when a schema gets a new version, and only then.
//!
//! `cargo run -p quasar-protocol --example golden -- crates/protocol/tests/golden`

extern crate quasar_protocol as protocol;

#[path = "../tests/samples/mod.rs"]
mod samples;

fn main() -> std::io::Result<()> {
    let folder = std::path::PathBuf::from(std::env::args().nth(1).expect("usage: golden FOLDER"));
    std::fs::create_dir_all(&folder)?;
    for (name, bytes) in samples::all() {
        std::fs::write(folder.join(format!("{name}.qsr")), bytes)?;
    }
    Ok(())
}
