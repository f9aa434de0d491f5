//! Writes the good inputs of every target into the folder that is named: `FOLDER/TARGET/good-0` and so on.

// What the flags for coverage refer to is in libFuzzer.
use libfuzzer_sys as _;

fn main() -> std::io::Result<()> {
    let folder = std::path::PathBuf::from(std::env::args_os().nth(1).unwrap_or_else(|| "seeds".into()));
    for (name, _, seeds) in quasar_fragments_fuzz::all() {
        std::fs::create_dir_all(folder.join(name))?;
        for (number, seed) in seeds().iter().enumerate() {
            std::fs::write(folder.join(name).join(format!("good-{number}")), seed)?;
        }
    }
    Ok(())
}
