//! Finds libtorch's folder for run time: this crate's own tests get it as rpath, and build scripts of packages that
//! depend on this one read it as `DEP_QUASAR_MODEL_LIBTORCH_LIB` (torch-sys tells only its direct dependants).

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=DEP_TCH_LIBTORCH_LIB");
    // Absent without the feature `libtorch`.
    if let Ok(folder) = std::env::var("DEP_TCH_LIBTORCH_LIB") {
        let folder = std::fs::canonicalize(&folder).map_or(folder, |path| path.display().to_string());
        println!("cargo:libtorch_lib={folder}");
        println!("cargo:rustc-link-arg=-Wl,-rpath,{folder}");
    }
}
