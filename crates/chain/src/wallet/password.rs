//! Passwords of encrypted key files, and opening such files.
//!
//! A password comes from a file that only the service can read (systemd's `LoadCredential=` or `LoadCredentialEncrypted=`), or from the
//! terminal. Never from arguments or the environment, which others can read.
//!
//! The form of the official package: `$NACL`, a nonce of 24 bytes, and a NaCl secret box (XSalsa20-Poly1305) of the JSON under the
//! Argon2i hash (version 1.3, 8 passes over 512 MiB) of the password with a fixed salt.

use std::fs;
use std::io::{self, Read as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use argon2::{Algorithm, Argon2, Params, Version};
use ark_std::rand::RngCore as _;
use ark_std::rand::rngs::OsRng;
use crypto_secretbox::XSalsa20Poly1305;
use crypto_secretbox::aead::{Aead as _, KeyInit as _};
use zeroize::Zeroizing;

use super::WalletError;

pub(super) const NACL_PREFIX: &[u8] = b"$NACL";
const NONCE_BYTES: usize = 24;
const SALT: [u8; 16] = [0x13, 0x71, 0x83, 0xdf, 0xf1, 0x5a, 0x09, 0xbc, 0x9c, 0x90, 0xb5, 0x51, 0x87, 0x39, 0xe9, 0xb1];
const PASSES: u32 = 8;
const MEMORY_KIB: u32 = 512 * 1024;
/// Longest password that is read.
const PASSWORD_MAX: u64 = 4096;

/// A password. Wiped when dropped, never printed.
pub struct Password(Zeroizing<String>);

impl Password {
    pub fn new(text: String) -> Self {
        Self(Zeroizing::new(text))
    }

    /// Reads the first line of a file, as of a credential that systemd hands to a service.
    pub fn from_file(path: &Path) -> io::Result<Self> {
        let mut text = Zeroizing::new(String::with_capacity(PASSWORD_MAX as usize + 1));
        let file = fs::File::open(path)?;
        if file.metadata()?.permissions().mode() & 0o077 != 0 {
            tracing::warn!(file = %path.display(), "the password file can be read by other users; `chmod 600` it");
        }
        file.take(PASSWORD_MAX + 1).read_to_string(&mut text)?;
        if text.len() as u64 > PASSWORD_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a password has at most {PASSWORD_MAX} bytes")));
        }
        let line = text.lines().next().unwrap_or_default();
        if line.is_empty() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the password file is empty"));
        }
        Ok(Self(Zeroizing::new(line.to_owned())))
    }

    /// Asks at the terminal, without showing what is typed. Fails where there is no terminal.
    pub fn prompt(question: &str) -> io::Result<Self> {
        rpassword::prompt_password(question).map(Self::new)
    }

    /// A password for a new key file: the first line of `file`, or what is typed twice at the terminal.
    pub fn choose(file: Option<&Path>) -> Result<Self, WalletError> {
        let fail = |source| WalletError::Password { path: file.map(Path::to_owned), source };
        if let Some(file) = file {
            return Self::from_file(file).map_err(fail);
        }
        let (first, second) = (Self::prompt("New password: ").map_err(fail)?, Self::prompt("Once more: ").map_err(fail)?);
        if *first.0 != *second.0 || first.0.is_empty() {
            return Err(fail(io::Error::new(io::ErrorKind::InvalidInput, "the two are not the same, or empty")));
        }
        Ok(first)
    }
}

/// Why a sealed key file was not opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SealedError {
    Truncated,
    WrongPassword,
    /// There is no room for the 512 MiB that the hash needs, or no randomness.
    Resources,
}

/// The JSON of an encrypted key file. Takes some seconds and 512 MiB.
pub(super) fn open(bytes: &[u8], password: &Password) -> Result<Zeroizing<Vec<u8>>, SealedError> {
    let sealed = bytes.strip_prefix(NACL_PREFIX).ok_or(SealedError::Truncated)?;
    let (nonce, sealed) = sealed.split_first_chunk::<NONCE_BYTES>().ok_or(SealedError::Truncated)?;
    let plain = cipher(password)?.decrypt(nonce.into(), sealed);
    plain.map(Zeroizing::new).map_err(|_| SealedError::WrongPassword)
}

/// The encrypted form of a key file's JSON.
pub(super) fn seal(json: &[u8], password: &Password) -> Result<Vec<u8>, SealedError> {
    let mut nonce = [0; NONCE_BYTES];
    OsRng.fill_bytes(&mut nonce);
    let sealed = cipher(password)?.encrypt((&nonce).into(), json).map_err(|_| SealedError::Resources)?;
    Ok([NACL_PREFIX, &nonce, &sealed].concat())
}

fn cipher(password: &Password) -> Result<XSalsa20Poly1305, SealedError> {
    let params = Params::new(MEMORY_KIB, PASSES, 1, Some(32)).map_err(|_| SealedError::Resources)?;
    let mut key = Zeroizing::new([0; 32]);
    Argon2::new(Algorithm::Argon2i, Version::V0x13, params)
        .hash_password_into(password.0.as_bytes(), &SALT, key.as_mut_slice())
        .map_err(|_| SealedError::Resources)?;
    Ok(XSalsa20Poly1305::new(key.as_slice().into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_the_first_line_of_its_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("password");
        for (text, expected) in
            [("secret", Some("secret")), ("secret\n", Some("secret")), ("two words\r\nmore", Some("two words")), ("", None), ("\n", None)]
        {
            fs::write(&path, text).unwrap();
            assert_eq!(Password::from_file(&path).ok().map(|password| password.0.to_string()).as_deref(), expected, "{text:?}");
        }
        fs::write(&path, vec![b'a'; 5000]).unwrap();
        assert!(Password::from_file(&path).is_err());
        assert!(Password::from_file(&folder.path().join("missing")).is_err());
    }

    #[test]
    fn what_is_too_short_to_be_sealed_is_told_before_any_work() {
        let password = Password::new("x".to_owned());
        for bytes in [&b""[..], b"$NACL", b"$NACLshort", b"{}"] {
            assert_eq!(open(bytes, &password).err(), Some(SealedError::Truncated));
        }
    }
}
