//! The system packages that a build needs, and the apt line for those that are missing.
//!
//! The list is short because nearly everything is Rust: `torch-sys` compiles C++ (and a few crates C) with the system
//! compiler, which is also the linker; pip and Python fetch and unpack libtorch; cargo and pip verify TLS with the system's
//! certificates. No make, cmake, pkg-config or OpenSSL headers are used.

use crate::error::Error;
use crate::workspace::answers;
use std::path::Path;

/// A Debian package and why it is needed.
struct Package {
    name: &'static str,
    purpose: &'static str,
    present: fn() -> bool,
}

const BUILD: &[Package] = &[
    Package { name: "g++", purpose: "compiles the libtorch bindings and links", present: || answers("c++", &["--version"]) },
    Package { name: "ca-certificates", purpose: "lets cargo, pip and the daemons verify TLS", present: has_certificates },
];

const INSTALL: &[Package] = &[
    Package { name: "python3", purpose: "unpacks the libtorch wheels", present: || answers("python3", &["-c", "import zipfile, zlib"]) },
    Package { name: "python3-pip", purpose: "downloads the libtorch wheels", present: || answers("python3", &["-m", "pip", "--version"]) },
];

const CERTIFICATES: &[&str] =
    &["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem", "/etc/ssl/cert.pem"];

fn has_certificates() -> bool {
    std::env::var_os("SSL_CERT_FILE").is_some_and(|file| Path::new(&file).is_file())
        || CERTIFICATES.iter().any(|file| Path::new(file).is_file())
}

/// Refuses a machine that the prebuilt libtorch does not run on, or that lacks a package.
///
/// `installing`: libtorch still has to be fetched, so that Python and pip are needed too.
pub fn check(installing: bool) -> Result<(), Error> {
    if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
        return Err(Error::configuration(
            "libtorch is installed for x86_64 Linux only",
            "use an x86_64 Linux machine, or set LIBTORCH to a libtorch 2.11.0 folder of your own",
        ));
    }
    let wanted = BUILD.iter().chain(if installing { INSTALL } else { &[] });
    let missing: Vec<&Package> = wanted.filter(|package| !(package.present)()).collect();
    if missing.is_empty() { Ok(()) } else { Err(complaint(&missing)) }
}

fn complaint(missing: &[&Package]) -> Error {
    let list: Vec<String> = missing.iter().map(|package| format!("  {}: {}", package.name, package.purpose)).collect();
    let names: Vec<&str> = missing.iter().map(|package| package.name).collect();
    Error::configuration(
        format!("system packages are missing\n{}", list.join("\n")),
        format!("apt-get update && apt-get install -y {} (as root), then run the command again", names.join(" ")),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_apt_line_names_every_missing_package_and_nothing_else() {
        let missing: Vec<&Package> = BUILD.iter().take(1).chain(&INSTALL[1..]).collect();
        let text = complaint(&missing).to_string();
        assert!(text.contains("apt-get install -y g++ python3-pip (as root)"), "{text}");
        assert!(!text.contains("ca-certificates"), "{text}");
    }
}
