//! Installs the smallest libtorch folder that `torch-sys` can link against.
//!
//! The PyPI wheel of PyTorch is the only packaged build of this version, and it is a CUDA build of 2.7 GB with all it
//! depends on. Linking needs five of its libraries and the headers, 520 MB. `libtorch_cuda.so` is left out on purpose:
//! `torch-sys` would link it where it sees it, and the daemons open it at run time from a full installation instead
//! (`QUASAR_TORCH_CUDA_DIR`), so that one executable serves machines with and without a GPU.
//!
//! The wheels are pinned by SHA-256 and kept in a cache outside the clone. The folder is filled under a temporary name and
//! renamed, with its version file written last: it is complete or it is not there.

use crate::error::Error;
use crate::wheels::{self, Scratch, Wheel};
use std::fs;
use std::path::Path;

/// The version that tch 0.24 binds to.
pub const VERSION: &str = "2.11.0";

/// `torch-sys` compares this file with the version that it expects; without it the check is skipped.
const VERSION_FILE: &str = "build-version";

/// One of the headers, which stands for all of them when an installation is examined.
const HEADER: &str = "include/torch/csrc/api/include/torch/all.h";

const WHEELS: &[Wheel] = &[
    Wheel {
        requirement: "torch==2.11.0",
        file: "torch-2.11.0-cp311-cp311-manylinux_2_28_x86_64.whl",
        sha256: "7aa2f9bbc6d4595ba72138026b2074be1233186150e9292865e04b7a63b8c67a",
        parts: &[
            ("torch/include/", "include"),
            ("torch/lib/libtorch_cpu.so", "lib/libtorch_cpu.so"),
            ("torch/lib/libc10.so", "lib/libc10.so"),
            ("torch/lib/libgomp.so.1", "lib/libgomp.so.1"),
        ],
    },
    Wheel {
        requirement: "nvidia-cuda-cupti==13.0.85",
        file: "nvidia_cuda_cupti-13.0.85-py3-none-manylinux_2_25_x86_64.whl",
        sha256: "4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8",
        parts: &[("nvidia/cu13/lib/libcupti.so.13", "lib/libcupti.so.13")],
    },
    Wheel {
        requirement: "nvidia-cuda-runtime==13.0.96",
        file: "nvidia_cuda_runtime-13.0.96-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
        sha256: "7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548",
        parts: &[("nvidia/cu13/lib/libcudart.so.13", "lib/libcudart.so.13")],
    },
];

/// Name and length of every library in a complete folder.
const LIBRARIES: &[(&str, u64)] = &[
    ("libtorch_cpu.so", 451_209_129),
    ("libc10.so", 1_498_969),
    ("libgomp.so.1", 254_009),
    ("libcupti.so.13", 4_152_208),
    ("libcudart.so.13", 704_288),
];

/// What a libtorch folder looks like from outside.
#[derive(Debug, PartialEq, Eq)]
pub enum State {
    /// It can be linked against.
    Complete,
    /// There is no such folder.
    Absent,
    /// Something is there that is not this version of libtorch; the text says what.
    Other(String),
}

/// Examines a folder without changing it.
///
/// A folder that setup installs must hold exactly our libraries; one that a person names with LIBTORCH may be any build of
/// the same version, so there only version and headers count.
pub fn examine(folder: &Path, ours: bool) -> State {
    if !folder.exists() {
        return State::Absent;
    }
    match fs::read_to_string(folder.join(VERSION_FILE)) {
        // A suffix such as `+cpu` names a variant of the same version.
        Ok(version) if version.trim().split('+').next() == Some(VERSION) => {}
        Ok(version) => {
            return State::Other(format!("it holds version {}, not {VERSION}", version.trim()));
        }
        Err(_) => return State::Other(format!("it has no {VERSION_FILE} file")),
    }
    if !folder.join(HEADER).is_file() {
        return State::Other("its headers are missing".to_owned());
    }
    if !folder.join("lib/libtorch.so").is_file() {
        return State::Other("lib/libtorch.so is missing".to_owned());
    }
    let libraries = if ours { LIBRARIES } else { &[] };
    for (name, length) in libraries {
        if fs::metadata(folder.join("lib").join(name)).map(|found| found.len()).ok() != Some(*length) {
            return State::Other(format!("lib/{name} is missing or not the pinned one"));
        }
    }
    State::Complete
}

/// Downloads what the cache lacks, verifies it, and puts a complete folder at `target`.
pub fn install(target: &Path, cache: &Path) -> Result<(), Error> {
    if target.exists() {
        refuse_strangers(target)?;
    }
    let wheels = wheels::fetch(WHEELS, cache)?;

    let parent = target.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(|cause| Error::io("cannot create", parent, cause))?;
    let fresh = Scratch::beside(target, "new")?;
    eprintln!("unpacking libtorch {VERSION} into {}", target.display());
    unpack(&wheels, &fresh.path)?;
    match examine(&fresh.path, true) {
        State::Complete => put_in_place(fresh, target),
        other => Err(Error::failed(
            format!("the unpacked libtorch is not complete: {other:?}"),
            "the wheels and this version of xtask disagree; update the clone",
        )),
    }
}

/// Fills `folder` from verified wheels; the version file comes last.
fn unpack(wheels: &Path, folder: &Path) -> Result<(), Error> {
    wheels::unpack(WHEELS, wheels, folder, "free some disk space (about 600 MB are needed) and run the command again")?;
    // The bindings ask the linker for `-ltorch`; the CPU library is all that this stands for here.
    let link = folder.join("lib/libtorch.so");
    std::os::unix::fs::symlink("libtorch_cpu.so", &link).map_err(|cause| Error::io("cannot create", &link, cause))?;
    let version = folder.join(VERSION_FILE);
    fs::write(&version, format!("{VERSION}\n")).map_err(|cause| Error::io("cannot write", &version, cause))
}

/// Renames the finished folder to its final name. An older installation steps aside first; if another setup was faster,
/// its result stays; a folder that holds anything else is never touched.
fn put_in_place(fresh: Scratch, target: &Path) -> Result<(), Error> {
    match examine(target, true) {
        State::Complete => return Ok(()),
        State::Absent => {}
        State::Other(_) => {
            refuse_strangers(target)?;
            let old = Scratch::beside(target, "old")?;
            fs::rename(target, old.path.join("libtorch")).map_err(|cause| Error::io("cannot move away", target, cause))?;
        }
    }
    fs::rename(&fresh.path, target).map_err(|cause| Error::io("cannot create", target, cause))
}

/// An error if the folder holds something that `unpack` never writes, so that a mistyped path costs nobody a folder.
fn refuse_strangers(target: &Path) -> Result<(), Error> {
    let entries = fs::read_dir(target).map_err(|cause| Error::io("cannot list", target, cause))?;
    for entry in entries {
        let entry = entry.map_err(|cause| Error::io("cannot list", target, cause))?;
        if !["include", "lib", VERSION_FILE].iter().any(|known| entry.file_name() == *known) {
            return Err(Error::configuration(
                format!("{} exists and is no libtorch folder: it holds {}", target.display(), entry.file_name().display()),
                "name another folder, or move this one away",
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder under the test's temporary directory with the given files.
    fn folder(name: &str, files: &[(&str, &str)]) -> Scratch {
        let scratch = Scratch::beside(&std::env::temp_dir().join(name), "test").expect("temporary folder");
        for (file, text) in files {
            let path = scratch.path.join(file);
            fs::create_dir_all(path.parent().expect("parent")).expect("create");
            fs::write(path, text).expect("write");
        }
        scratch
    }

    #[test]
    fn a_folder_that_does_not_exist_is_absent() {
        assert_eq!(examine(Path::new("/nonexistent/libtorch"), true), State::Absent);
    }

    #[test]
    fn another_version_is_named_and_not_taken() {
        let found = folder("xtask-other-version", &[(VERSION_FILE, "2.10.0\n")]);
        assert_eq!(examine(&found.path, true), State::Other("it holds version 2.10.0, not 2.11.0".to_owned()));
    }

    #[test]
    fn a_folder_without_a_version_file_was_not_finished() {
        let found = folder("xtask-unfinished", &[(HEADER, ""), ("lib/libtorch.so", "")]);
        assert_eq!(examine(&found.path, true), State::Other("it has no build-version file".to_owned()));
    }

    #[test]
    fn a_truncated_library_is_found_in_our_folder_and_any_build_is_taken_from_a_person() {
        let files = [(VERSION_FILE, "2.11.0+cpu\n"), (HEADER, ""), ("lib/libtorch.so", ""), ("lib/libtorch_cpu.so", "short")];
        let found = folder("xtask-truncated", &files);
        let reason = State::Other("lib/libtorch_cpu.so is missing or not the pinned one".to_owned());
        assert_eq!(examine(&found.path, true), reason);
        assert_eq!(examine(&found.path, false), State::Complete);
    }

    #[test]
    fn an_incomplete_folder_is_replaced_and_no_scratch_is_left() {
        let place = folder("xtask-replace", &[("libtorch/lib/half", "")]);
        let target = place.path.join("libtorch");
        let fresh = Scratch::beside(&target, "new").expect("scratch");
        fs::write(fresh.path.join("finished"), "").expect("write");
        put_in_place(fresh, &target).expect("replaced");
        assert!(target.join("finished").is_file());
        assert!(!target.join("lib/half").exists());
        assert_eq!(fs::read_dir(&place.path).expect("list").count(), 1);
    }

    #[test]
    fn a_folder_that_holds_something_else_is_never_replaced() {
        let place = folder("xtask-stranger", &[("home/letters.txt", "dear")]);
        let target = place.path.join("home");
        let fresh = Scratch::beside(&target, "new").expect("scratch");
        let error = put_in_place(fresh, &target).expect_err("refused").to_string();
        assert!(error.contains("it holds letters.txt"), "{error}");
        assert!(target.join("letters.txt").is_file());
    }

    #[test]
    fn every_wheel_name_carries_its_version() {
        for wheel in WHEELS {
            let version = wheel.requirement.split("==").nth(1).expect("pinned");
            assert!(wheel.file.contains(&format!("-{version}-")), "{}", wheel.file);
            assert_eq!(wheel.sha256.len(), 64);
        }
    }
}
