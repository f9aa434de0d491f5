//! Wallets in the folder layout of bittensor: `<path>/<name>/coldkeypub.txt`, `<path>/<name>/hotkeys/<hotkey>` and `<hotkey>pub.txt`.
//!
//! Daemons need the hotkey only; no code here ever opens a coldkey. New files have mode 0600 and never replace old ones.

mod keyfile;
mod password;

use std::fs;
use std::io::{self, IsTerminal as _, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use protocol::{AccountId, KeyKind, KeyRef};
use sp_core::Pair as _;
use zeroize::Zeroizing;

use crate::hotkey::Hotkey;
use keyfile::KeyfileError;
pub use password::Password;
use password::SealedError;

/// Name of the credential under which systemd hands a service the hotkey's password.
pub const CREDENTIAL: &str = "hotkey-password";
/// Largest key file that is read; genuine ones stay under 1 kB.
const KEYFILE_MAX: u64 = 64 * 1024;

/// A wallet: which key files to use. `path` is the folder of all wallets (`~/.bittensor/wallets`, with `~` already resolved).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wallet {
    pub path: PathBuf,
    pub name: String,
    pub hotkey: String,
}

#[derive(Debug, thiserror::Error)]
pub enum WalletError {
    #[error("`{name}` cannot be the name of a wallet or hotkey\nhint: names have no slashes and do not start with a dot")]
    Name { name: String },
    #[error("no key file at {}\nhint: create it with `identity new` or `btcli wallet new-hotkey`, or check the wallet path, wallet name and hotkey name", path.display())]
    Missing { path: PathBuf },
    #[error("cannot read or write {}: {source}\nhint: the key file must belong to the user that runs this process, with mode 600", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{} is encrypted ({form}), in a form that is not opened here\nhint: `btcli wallet regen-hotkey` writes it in today's form, with or without a password", path.display())]
    Encrypted { path: PathBuf, form: &'static str },
    #[error("{} is encrypted, and its password is not given\nhint: at a terminal it is asked for; hand the password to the service as the systemd credential `{CREDENTIAL}`, or name a file that only this user can read with --password-file", path.display())]
    PasswordNeeded { path: PathBuf },
    #[error("the password cannot be read{}: {source}\nhint: the file's first line is the password; it must belong to the user that runs this process, with mode 600", of_file(path.as_deref()))]
    Password { path: Option<PathBuf>, source: io::Error },
    #[error("the password does not open {}\nhint: check capital letters, the keyboard layout and the end of the password's file", path.display())]
    WrongPassword { path: PathBuf },
    #[error("{} cannot be decrypted or encrypted here: the password's hash needs 512 MiB of memory\nhint: free memory, or raise the service's MemoryMax=", path.display())]
    NoMemory { path: PathBuf },
    #[error("{} is no key file: {reason}\nhint: restore it from its secret phrase with `btcli wallet regen-hotkey`", path.display())]
    Malformed { path: PathBuf, reason: String },
    #[error("{} holds a key of a kind that this build cannot use: {what}\nhint: hotkeys must be ed25519 or sr25519", path.display())]
    Unsupported { path: PathBuf, what: String },
    #[error("the secret in {} does not belong to its address {address}\nhint: the file was edited or damaged; restore it from its secret phrase", path.display())]
    AddressMismatch { path: PathBuf, address: String },
    #[error("{} exists already\nhint: choose another name; key files are never overwritten", path.display())]
    Exists { path: PathBuf },
}

fn of_file(path: Option<&Path>) -> String {
    path.map_or_else(String::new, |path| format!(" from {}", path.display()))
}

impl WalletError {
    fn of_keyfile(path: &Path, error: KeyfileError) -> Self {
        let path = path.to_owned();
        match error {
            KeyfileError::Encrypted(keyfile::OPENED_FORM) => Self::PasswordNeeded { path },
            KeyfileError::Encrypted(form) => Self::Encrypted { path, form },
            KeyfileError::Malformed(reason) => Self::Malformed { path, reason },
            KeyfileError::Unsupported(what) => Self::Unsupported { path, what },
            KeyfileError::AddressMismatch(address) => Self::AddressMismatch { path, address },
            KeyfileError::Sealed(SealedError::Truncated) => Self::Malformed { path, reason: "the encrypted file is cut off".to_owned() },
            KeyfileError::Sealed(SealedError::WrongPassword) => Self::WrongPassword { path },
            KeyfileError::Sealed(SealedError::Resources) => Self::NoMemory { path },
        }
    }

    fn io(path: &Path, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::NotFound => Self::Missing { path: path.to_owned() },
            io::ErrorKind::AlreadyExists => Self::Exists { path: path.to_owned() },
            _ => Self::Io { path: path.to_owned(), source },
        }
    }
}

impl Wallet {
    pub fn new(path: impl Into<PathBuf>, name: impl Into<String>, hotkey: impl Into<String>) -> Self {
        Self { path: path.into(), name: name.into(), hotkey: hotkey.into() }
    }

    /// The hotkey's file, with the secret.
    pub fn hotkey_path(&self) -> PathBuf {
        self.path.join(&self.name).join("hotkeys").join(&self.hotkey)
    }

    /// The hotkey's public file.
    pub fn hotkeypub_path(&self) -> PathBuf {
        self.path.join(&self.name).join("hotkeys").join(format!("{}pub.txt", self.hotkey))
    }

    pub fn coldkeypub_path(&self) -> PathBuf {
        self.path.join(&self.name).join("coldkeypub.txt")
    }

    /// Reads the hotkey with its secret; an encrypted one is refused.
    pub fn load_hotkey(&self) -> Result<Hotkey, WalletError> {
        self.read_hotkey(None)
    }

    /// Reads the hotkey with its secret, decrypting it with `password` where it is encrypted. That takes some seconds and 512 MiB.
    pub fn load_hotkey_with(&self, password: &Password) -> Result<Hotkey, WalletError> {
        self.read_hotkey(Some(password))
    }

    /// Reads the hotkey with its secret. Where it is encrypted the password is the first line of `password_file`, or is asked for
    /// at the terminal, if there is one.
    pub fn unlock_hotkey(&self, password_file: Option<&Path>) -> Result<Hotkey, WalletError> {
        if !self.is_hotkey_encrypted()? {
            return self.load_hotkey();
        }
        let password = match password_file {
            Some(file) => Password::from_file(file).map_err(|source| WalletError::Password { path: Some(file.to_owned()), source })?,
            None if io::stdin().is_terminal() => Password::prompt(&format!("Password of {}: ", self.hotkey_path().display()))
                .map_err(|source| WalletError::Password { path: None, source })?,
            None => return Err(WalletError::PasswordNeeded { path: self.hotkey_path() }),
        };
        self.load_hotkey_with(&password)
    }

    /// Whether the hotkey's file wants a password, in the form that is opened here.
    pub fn is_hotkey_encrypted(&self) -> Result<bool, WalletError> {
        self.check_names()?;
        Ok(keyfile::wants_password(&read_keyfile(&self.hotkey_path())?))
    }

    fn read_hotkey(&self, password: Option<&Password>) -> Result<Hotkey, WalletError> {
        self.check_names()?;
        let path = self.hotkey_path();
        let bytes = read_keyfile(&path)?;
        if fs::metadata(&path).is_ok_and(|meta| meta.permissions().mode() & 0o077 != 0) {
            tracing::warn!(file = %path.display(), "the hotkey file can be read by other users; `chmod 600` it");
        }
        keyfile::read_secret(&bytes, password).map_err(|error| WalletError::of_keyfile(&path, error))
    }

    /// Reads the public half of the hotkey: from its public file, or from the key file where there is none.
    pub fn load_hotkeypub(&self) -> Result<KeyRef, WalletError> {
        self.check_names()?;
        let path = self.hotkeypub_path();
        match read_keyfile(&path) {
            Ok(bytes) => keyfile::read_public(&bytes).map_err(|error| WalletError::of_keyfile(&path, error)),
            Err(WalletError::Missing { .. }) => self.load_hotkey().map(|hotkey| hotkey.key()),
            Err(error) => Err(error),
        }
    }

    /// Reads the public half of the coldkey.
    pub fn load_coldkeypub(&self) -> Result<KeyRef, WalletError> {
        self.check_names()?;
        let path = self.coldkeypub_path();
        let bytes = read_keyfile(&path)?;
        keyfile::read_public(&bytes).map_err(|error| WalletError::of_keyfile(&path, error))
    }

    /// Makes a hotkey from fresh randomness and writes `hotkeys/<hotkey>` and `<hotkey>pub.txt`, mode 0600.
    pub fn create_hotkey(&self, kind: KeyKind) -> Result<Hotkey, WalletError> {
        self.create(kind, None)
    }

    /// The same with an encrypted key file.
    pub fn create_encrypted_hotkey(&self, kind: KeyKind, password: &Password) -> Result<Hotkey, WalletError> {
        self.create(kind, Some(password))
    }

    fn create(&self, kind: KeyKind, password: Option<&Password>) -> Result<Hotkey, WalletError> {
        self.check_names()?;
        let (phrase, seed) = match kind {
            KeyKind::Ed25519 => {
                let (_, phrase, seed) = sp_core::ed25519::Pair::generate_with_phrase(None);
                (Zeroizing::new(phrase), Zeroizing::new(seed))
            }
            KeyKind::Sr25519 => {
                let (_, phrase, seed) = sp_core::sr25519::Pair::generate_with_phrase(None);
                (Zeroizing::new(phrase), Zeroizing::new(seed))
            }
        };
        let hotkey = Hotkey::from_seed(kind, &seed);
        let path = self.hotkey_path();
        let text = keyfile::secret_text(&hotkey, &seed, &phrase);
        match password {
            None => write_new(&path, &text)?,
            Some(password) => {
                let sealed = password::seal(&text, password);
                write_new(&path, &sealed.map_err(|error| WalletError::of_keyfile(&path, KeyfileError::Sealed(error)))?)?;
            }
        }
        write_new(&self.hotkeypub_path(), keyfile::public_text(&hotkey.key()).as_bytes())?;
        Ok(hotkey)
    }

    /// Writes `coldkeypub.txt` for an owner whose secret lives elsewhere.
    pub fn write_coldkeypub(&self, key: &KeyRef) -> Result<(), WalletError> {
        self.check_names()?;
        write_new(&self.coldkeypub_path(), keyfile::public_text(key).as_bytes())
    }

    /// Makes a coldkey from fresh randomness, writes its public half and forgets the secret: for development networks, where
    /// nothing ever moves funds. Gives the account.
    pub fn create_throwaway_coldkey(&self) -> Result<AccountId, WalletError> {
        let (pair, seed) = sp_core::sr25519::Pair::generate();
        drop(Zeroizing::new(seed));
        let key = KeyRef { kind: KeyKind::Sr25519, public: pair.public().0 };
        self.write_coldkeypub(&key)?;
        Ok(key.account())
    }

    fn check_names(&self) -> Result<(), WalletError> {
        for name in [&self.name, &self.hotkey] {
            if name.is_empty() || name.starts_with('.') || name.contains(['/', '\\', '\0']) {
                return Err(WalletError::Name { name: name.clone() });
            }
        }
        Ok(())
    }
}

fn read_keyfile(path: &Path) -> Result<Zeroizing<Vec<u8>>, WalletError> {
    let file = fs::File::open(path).map_err(|source| WalletError::io(path, source))?;
    // One allocation: growing the buffer would leave copies of the secret behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(KEYFILE_MAX as usize + 1));
    file.take(KEYFILE_MAX + 1).read_to_end(&mut bytes).map_err(|source| WalletError::io(path, source))?;
    if bytes.len() as u64 > KEYFILE_MAX {
        return Err(WalletError::Malformed { path: path.to_owned(), reason: format!("longer than {KEYFILE_MAX} bytes") });
    }
    Ok(bytes)
}

/// Writes a file that must not exist yet: complete or not at all, mode 0600, in folders of mode 0700.
fn write_new(path: &Path, bytes: &[u8]) -> Result<(), WalletError> {
    let fail = |source| WalletError::io(path, source);
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(fail)?;
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = folder.join(name);
    let written = (|| {
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        // A hard link, unlike a rename, fails where the name is taken.
        fs::hard_link(&temporary, path)?;
        fs::File::open(folder)?.sync_all()
    })();
    let _ = fs::remove_file(&temporary);
    written.map_err(fail)
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::Signer as _;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn a_created_hotkey_is_read_back_and_its_files_are_private() {
        let folder = tempfile::tempdir().unwrap();
        for kind in [KeyKind::Ed25519, KeyKind::Sr25519] {
            let wallet = Wallet::new(folder.path().join("wallets"), "w", kind.to_string());
            let created = wallet.create_hotkey(kind).unwrap();
            assert_eq!(created.key().kind, kind);
            let loaded = wallet.load_hotkey().unwrap();
            assert_eq!(loaded.key(), created.key());
            assert_eq!(wallet.load_hotkeypub().unwrap(), created.key());
            let signature = loaded.sign(b"m");
            assert_eq!(protocol::verify_signature(&created.key(), b"m", &signature), Ok(()));
            assert_eq!(mode(&wallet.hotkey_path()), 0o600);
            assert_eq!(mode(&wallet.hotkeypub_path()), 0o600);
            let left: Vec<_> = fs::read_dir(wallet.hotkey_path().parent().unwrap()).unwrap().collect();
            assert!(left.iter().all(|entry| !entry.as_ref().unwrap().file_name().to_string_lossy().contains("tmp")));
        }
    }

    fn fixture(hotkey: &str) -> Wallet {
        Wallet::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/wallets"), "test", hotkey)
    }

    #[test]
    fn hotkeys_of_the_python_package_are_read_and_sign_as_it_does() {
        let golden: serde_json::Value = serde_json::from_str(include_str!("../../tests/data/golden-461.json")).unwrap();
        let bytes = |text: &serde_json::Value| hex::decode(text.as_str().unwrap().trim_start_matches("0x")).unwrap();
        for (index, name) in [(0, "sr25519"), (1, "ed25519")] {
            let entry = &golden["reference"]["wallets"][index];
            let hotkey = fixture(name).load_hotkey().unwrap();
            assert_eq!(hotkey.account().to_string(), entry["ss58_address"].as_str().unwrap());
            assert_eq!(hotkey.key().public.to_vec(), bytes(&entry["public_key_hex"]));
            assert_eq!(fixture(name).load_hotkeypub().unwrap(), hotkey.key());
            let (message, signature) = (bytes(&entry["message_hex"]), bytes(&entry["signature_hex"]));
            let signature: [u8; 64] = signature.try_into().unwrap();
            assert_eq!(protocol::verify_signature(&hotkey.key(), &message, &signature), Ok(()));
            if hotkey.key().kind == KeyKind::Ed25519 {
                assert_eq!(hotkey.sign(&message), signature);
            }
        }
        let coldkey = &golden["reference"]["wallets"][2];
        let public = fixture("sr25519").load_coldkeypub().unwrap();
        assert_eq!(public.account().to_string(), coldkey["ss58_address"].as_str().unwrap());
    }

    #[test]
    fn an_encrypted_hotkey_is_told_with_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let wallet = Wallet::new(folder.path(), "w", "h");
        fs::create_dir_all(folder.path().join("w/hotkeys")).unwrap();
        fs::copy(fixture("x").path.join("test/coldkey"), wallet.hotkey_path()).unwrap();
        let error = wallet.load_hotkey().unwrap_err();
        assert!(matches!(error, WalletError::PasswordNeeded { .. }));
        assert!(error.to_string().contains("\nhint: "));
    }

    #[test]
    fn an_encrypted_hotkey_opens_with_its_password_only() {
        let folder = tempfile::tempdir().unwrap();
        let wallet = Wallet::new(folder.path(), "w", "h");
        fs::create_dir_all(folder.path().join("w/hotkeys")).unwrap();
        // The coldkey of the fixtures, encrypted by the Python package, in the place of a hotkey.
        fs::copy(fixture("x").path.join("test/coldkey"), wallet.hotkey_path()).unwrap();
        assert!(wallet.is_hotkey_encrypted().unwrap());
        let opened = wallet.load_hotkey_with(&Password::new("test-only-Passw0rd".to_owned())).unwrap();
        assert_eq!(opened.key(), fixture("sr25519").load_coldkeypub().unwrap());
        let wrong = wallet.load_hotkey_with(&Password::new("test-only-passw0rd".to_owned())).unwrap_err();
        assert!(matches!(wrong, WalletError::WrongPassword { .. }), "{wrong}");
        // A plain file needs no password, and takes one.
        let plain = fixture("ed25519");
        assert!(!plain.is_hotkey_encrypted().unwrap());
        assert_eq!(plain.load_hotkey_with(&Password::new(String::new())).unwrap().key(), plain.load_hotkey().unwrap().key());
    }

    #[test]
    fn an_encrypted_hotkey_is_unlocked_by_a_file_with_its_password() {
        let folder = tempfile::tempdir().unwrap();
        let wallet = Wallet::new(folder.path(), "w", "h");
        fs::create_dir_all(folder.path().join("w/hotkeys")).unwrap();
        fs::copy(fixture("x").path.join("test/coldkey"), wallet.hotkey_path()).unwrap();
        let file = folder.path().join("password");
        let missing = wallet.unlock_hotkey(Some(&file)).unwrap_err();
        assert!(matches!(missing, WalletError::Password { path: Some(_), .. }), "{missing}");
        fs::write(&file, "test-only-Passw0rd\n").unwrap();
        let unlocked = wallet.unlock_hotkey(Some(&file)).unwrap();
        assert_eq!(unlocked.key(), fixture("sr25519").load_coldkeypub().unwrap());
        // A plain file asks for nothing.
        assert_eq!(fixture("ed25519").unlock_hotkey(None).unwrap().key(), fixture("ed25519").load_hotkeypub().unwrap());
        // Older forms are told apart from a wrong password.
        fs::write(wallet.hotkey_path(), b"gAAAAABkxyz").unwrap();
        let older = wallet.unlock_hotkey(Some(&file)).unwrap_err();
        assert!(matches!(older, WalletError::Encrypted { form: "Fernet", .. }) && older.to_string().contains("\nhint: "), "{older}");
    }

    #[test]
    fn a_hotkey_that_was_created_encrypted_is_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let wallet = Wallet::new(folder.path(), "w", "h");
        let password = Password::new("correct horse".to_owned());
        let created = wallet.create_encrypted_hotkey(KeyKind::Sr25519, &password).unwrap();
        assert!(fs::read(wallet.hotkey_path()).unwrap().starts_with(b"$NACL"));
        assert!(matches!(wallet.load_hotkey(), Err(WalletError::PasswordNeeded { .. })));
        assert_eq!(wallet.load_hotkey_with(&password).unwrap().key(), created.key());
        assert_eq!(wallet.load_hotkeypub().unwrap(), created.key());
    }

    #[test]
    fn key_files_are_never_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let wallet = Wallet::new(folder.path(), "w", "h");
        let first = wallet.create_hotkey(KeyKind::Ed25519).unwrap();
        assert!(matches!(wallet.create_hotkey(KeyKind::Ed25519), Err(WalletError::Exists { .. })));
        assert_eq!(wallet.load_hotkey().unwrap().key(), first.key());
    }

    #[test]
    fn a_throwaway_coldkey_leaves_only_its_public_half() {
        let folder = tempfile::tempdir().unwrap();
        let wallet = Wallet::new(folder.path(), "w", "h");
        let coldkey = wallet.create_throwaway_coldkey().unwrap();
        assert_eq!(wallet.load_coldkeypub().unwrap().account(), coldkey);
        assert!(!folder.path().join("w/coldkey").exists());
        assert!(!fs::read_to_string(wallet.coldkeypub_path()).unwrap().contains("rivate"));
    }

    #[test]
    fn a_missing_wallet_is_told_with_its_path_and_a_hint() {
        let wallet = Wallet::new("/nonexistent", "w", "h");
        let error = wallet.load_hotkey().unwrap_err();
        assert!(matches!(error, WalletError::Missing { .. }));
        let text = error.to_string();
        assert!(text.contains("/nonexistent/w/hotkeys/h") && text.contains("\nhint: "), "{text}");
    }

    #[test]
    fn names_cannot_leave_the_wallet_folder() {
        for name in ["../x", "a/b", "", ".hidden"] {
            assert!(matches!(Wallet::new("/tmp", name, "h").load_hotkey(), Err(WalletError::Name { .. })));
            assert!(matches!(Wallet::new("/tmp", "w", name).load_hotkey(), Err(WalletError::Name { .. })));
        }
    }

    #[test]
    fn an_endless_file_is_refused_without_reading_it_all() {
        let folder = tempfile::tempdir().unwrap();
        let wallet = Wallet::new(folder.path(), "w", "h");
        fs::create_dir_all(folder.path().join("w/hotkeys")).unwrap();
        fs::write(wallet.hotkey_path(), vec![b' '; KEYFILE_MAX as usize + 10]).unwrap();
        assert!(matches!(wallet.load_hotkey(), Err(WalletError::Malformed { .. })));
    }
}
