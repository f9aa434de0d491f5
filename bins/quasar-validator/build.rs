//! Tells the executables of this package where libtorch lies at run time: first beside an installed binary
//! (`../lib/quasar`), then in the folder that the build linked against. No LD_LIBRARY_PATH is needed.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=DEP_QUASAR_MODEL_LIBTORCH_LIB");
    println!("cargo:rustc-link-arg=-Wl,-rpath,$ORIGIN/../lib/quasar");
    // Set by the build script of the crate `model`, when it is built with libtorch.
    if let Ok(folder) = std::env::var("DEP_QUASAR_MODEL_LIBTORCH_LIB") {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{folder}");
    }
}
