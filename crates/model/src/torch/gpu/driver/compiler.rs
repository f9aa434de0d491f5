//! NVRTC: CUDA C++ to machine code.

use std::ffi::{CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use super::{Status, TORCH};

/// Names under which NVRTC is installed, newest first, beside the CUDA part of libtorch or in the loader's path.
const NVRTC_NAMES: [&str; 3] = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"];
/// Folders of NVIDIA's wheels that hold it, relative to the folder that holds `torch`.
const NVRTC_FOLDERS: [&str; 3] = ["nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib", "torch/lib"];

functions!(Nvrtc {
    version = "nvrtcVersion"(*mut c_int, *mut c_int);
    create = "nvrtcCreateProgram"(*mut *mut c_void, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char);
    destroy = "nvrtcDestroyProgram"(*mut *mut c_void);
    compile = "nvrtcCompileProgram"(*mut c_void, c_int, *const *const c_char);
    log_size = "nvrtcGetProgramLogSize"(*mut c_void, *mut usize);
    log = "nvrtcGetProgramLog"(*mut c_void, *mut c_char);
    code_size = "nvrtcGetCUBINSize"(*mut c_void, *mut usize);
    code = "nvrtcGetCUBIN"(*mut c_void, *mut c_char);
});

static NVRTC: OnceLock<Result<Nvrtc, String>> = OnceLock::new();

fn nvrtc() -> Result<&'static Nvrtc, String> {
    let load = || {
        let site = TORCH.get().and_then(|torch| torch.parent()).map(Path::to_owned);
        let folders = site.iter().flat_map(|site| NVRTC_FOLDERS.iter().map(move |folder| site.join(folder)));
        let installed = folders.flat_map(|folder| NVRTC_NAMES.iter().map(move |name| folder.join(name))).filter(|path| path.exists());
        let mut reason = String::new();
        for path in installed.chain(NVRTC_NAMES.iter().map(PathBuf::from)) {
            // SAFETY: as for the driver. Its helper library is found beside it.
            match unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_GLOBAL) } {
                // SAFETY: the signatures are those of NVRTC's documentation.
                Ok(library) => return unsafe { Nvrtc::new(library) },
                Err(error) => reason = error.to_string(),
            }
        }
        Err(reason)
    };
    NVRTC.get_or_init(load).as_ref().map_err(Clone::clone)
}

/// NVRTC's version.
pub(crate) fn compiler_version() -> Result<(i32, i32), String> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: plain call with valid places for the answers.
    let status = unsafe { (nvrtc()?.version)(&raw mut major, &raw mut minor) };
    if status == 0 { Ok((major, minor)) } else { Err(format!("nvrtcVersion: {status}")) }
}

/// Compiles CUDA C++ to machine code for `capability`.
pub(crate) fn compile(name: &str, source: &str, capability: u32, options: &[String]) -> Result<Vec<u8>, String> {
    let nvrtc = nvrtc()?;
    let text = |text: &str| CString::new(text).map_err(|error| error.to_string());
    let (source, file) = (text(source)?, text(name)?);
    let mut strings = vec![text(&format!("--gpu-architecture=sm_{capability}"))?];
    for option in options {
        strings.push(text(option)?);
    }
    let pointers: Vec<*const c_char> = strings.iter().map(|string| string.as_ptr()).collect();
    let mut program = ptr::null_mut();
    // SAFETY: all pointers are valid for the calls; buffers have the sizes that NVRTC asked for.
    unsafe {
        let status = (nvrtc.create)(&raw mut program, source.as_ptr(), file.as_ptr(), 0, ptr::null(), ptr::null());
        if status != 0 {
            return Err(format!("nvrtcCreateProgram: {status}"));
        }
        let count = c_int::try_from(pointers.len()).unwrap_or(c_int::MAX);
        let status = (nvrtc.compile)(program, count, pointers.as_ptr());
        let result = if status == 0 {
            let mut size = 0;
            let mut code = Vec::new();
            let mut status = (nvrtc.code_size)(program, &raw mut size);
            if status == 0 {
                code = vec![0u8; size];
                status = (nvrtc.code)(program, code.as_mut_ptr().cast());
            }
            if status == 0 { Ok(code) } else { Err(format!("nvrtcGetCUBIN: {status}")) }
        } else {
            let mut size = 0;
            (nvrtc.log_size)(program, &raw mut size);
            let mut log = vec![0u8; size];
            (nvrtc.log)(program, log.as_mut_ptr().cast());
            Err(format!("{name}: {}", String::from_utf8_lossy(&log).trim_end_matches('\0')))
        };
        (nvrtc.destroy)(&raw mut program);
        result
    }
}
