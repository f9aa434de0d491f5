//! Helpers of the tests over the whole system: the binaries under test, and the documents that a devnet leaves in its bucket; and
//! what the measurements of learning have in common ([`training`]).

#[cfg(feature = "libtorch")]
pub mod training;

pub mod office;
pub mod requests;
pub mod seaweed;
pub mod sim;

use std::path::{Path, PathBuf};

use protocol::envelope::{Document, Purpose, verify_as_stated};
use protocol::{AccountId, codec};

/// Folder of the binaries that were built with these tests.
pub fn bin_dir() -> PathBuf {
    let own = std::env::current_exe().expect("a test knows its own path");
    let deps = own.parent().expect("a test lies in a folder");
    deps.parent().expect("`deps` lies in the profile's folder").to_path_buf()
}

/// One of the binaries; says what to do if it is not built.
pub fn binary(name: &str) -> PathBuf {
    let path = bin_dir().join(name);
    assert!(path.is_file(), "{} is missing: `cargo build --bins`, or `cargo xtask test`, which does that first", path.display());
    path
}

/// All signed documents of type `D` below a folder of the embedded store, with their signers, each with a valid signature.
pub fn documents<D: Document>(folder: &Path) -> Vec<(AccountId, D)> {
    let mut found = Vec::new();
    for path in files(folder).into_iter().filter(|path| path.extension().is_some_and(|extension| extension == "qsr")) {
        let bytes = std::fs::read(&path).expect("the bucket is readable");
        let (envelope, _) = verify_as_stated(&bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        if Purpose::from_number(envelope.header.purpose) == Some(D::PURPOSE) {
            let document = codec::decode(&envelope.payload, D::PURPOSE.limit()).expect("a stored document decodes");
            found.push((envelope.header.signer.account(), document));
        }
    }
    found
}

/// All files below a folder.
pub fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
            let path = entry.path();
            let list = if path.is_dir() { &mut folders } else { &mut found };
            list.push(path);
        }
    }
    found
}
