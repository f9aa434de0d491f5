//! The JSON inside a key file of bittensor-wallet: what newer and older versions write, read without trusting any one field.
//!
//! A file may carry the secret three times (private key, seed, phrase), and versions exist that write one of them wrongly. The
//! first that derives the stored address is taken; a file whose secrets all belong to another address is refused.

use protocol::{AccountId, KeyKind, KeyRef};
use serde::{Deserialize, Serialize, de::IgnoredAny};
use sp_core::Pair as _;
use zeroize::Zeroizing;

use super::password::{self, NACL_PREFIX, Password, SealedError};
use crate::hotkey::Hotkey;

/// What the form that is opened here is called.
pub(super) const OPENED_FORM: &str = "NaCl secret box";
/// Prefixes of encrypted files and what they are called. Only the first is opened here; the others were written by packages before
/// 2022.
const ENCRYPTED_FORMS: [(&[u8], &str); 3] = [(NACL_PREFIX, OPENED_FORM), (b"$ANSIBLE_VAULT", "Ansible vault"), (b"gAAAAA", "Fernet")];

#[derive(Debug, PartialEq, Eq)]
pub(super) enum KeyfileError {
    Encrypted(&'static str),
    Sealed(SealedError),
    Malformed(String),
    Unsupported(String),
    AddressMismatch(String),
}

/// A secret text: wiped when dropped, no Debug.
struct Secret(Zeroizing<String>);

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(|text| Self(Zeroizing::new(text)))
    }
}

/// The fields that are read. Others are ignored, except those that mark kinds of accounts we do not know.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Keyfile {
    // Old versions wrote the key with a leading blank.
    #[serde(alias = " ss58Address")]
    ss58_address: Option<String>,
    public_key: Option<String>,
    private_key: Option<Secret>,
    secret_seed: Option<Secret>,
    secret_phrase: Option<Secret>,
    crypto_type: Option<CryptoType>,
    account_type: Option<IgnoredAny>,
    signing_scheme: Option<IgnoredAny>,
    hashed_descriptor: Option<IgnoredAny>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum CryptoType {
    Number(u64),
    Text(String),
}

impl Keyfile {
    fn parse(bytes: &[u8]) -> Result<Self, KeyfileError> {
        if let Some((_, form)) = ENCRYPTED_FORMS.iter().find(|(prefix, _)| bytes.starts_with(prefix)) {
            return Err(KeyfileError::Encrypted(form));
        }
        // The parser's message would quote the text around the fault, which may be a secret: only its place is told.
        let file: Self = serde_json::from_slice(bytes).map_err(|error| {
            KeyfileError::Malformed(format!("not the JSON of a key (line {}, column {})", error.line(), error.column()))
        })?;
        for (field, present) in [
            ("accountType", file.account_type.is_some()),
            ("signingScheme", file.signing_scheme.is_some()),
            ("hashedDescriptor", file.hashed_descriptor.is_some()),
        ] {
            if present {
                return Err(KeyfileError::Unsupported(format!("it has the field {field}")));
            }
        }
        Ok(file)
    }

    fn kind(&self) -> Result<KeyKind, KeyfileError> {
        let number = match &self.crypto_type {
            // Files from before the field existed are sr25519.
            None => 1,
            Some(CryptoType::Number(number)) => *number,
            Some(CryptoType::Text(text)) => match text.to_ascii_lowercase().as_str() {
                "0" | "ed25519" => 0,
                "1" | "sr25519" => 1,
                other => return Err(KeyfileError::Unsupported(format!("cryptoType `{}`", other.chars().take(20).collect::<String>()))),
            },
        };
        match number {
            0 => Ok(KeyKind::Ed25519),
            1 => Ok(KeyKind::Sr25519),
            other => Err(KeyfileError::Unsupported(format!("cryptoType {other}"))),
        }
    }

    fn address(&self) -> Result<AccountId, KeyfileError> {
        let text = self.ss58_address.as_deref().ok_or_else(|| KeyfileError::Malformed("it has no ss58Address".to_owned()))?;
        text.parse().map_err(|_| KeyfileError::Malformed("its ss58Address is not an address".to_owned()))
    }

    /// The stored public key, where there is one, must be the one of the address.
    fn check_public_key(&self, account: &AccountId) -> Result<(), KeyfileError> {
        match self.public_key.as_deref().map(hex_bytes::<32>) {
            Some(Some(public)) if *public == account.0 => Ok(()),
            None => Ok(()),
            Some(_) => Err(KeyfileError::AddressMismatch(account.to_string())),
        }
    }
}

/// Whether a key file wants a password, in the form that is opened here.
pub(super) fn wants_password(bytes: &[u8]) -> bool {
    bytes.starts_with(NACL_PREFIX)
}

/// The hotkey of a key file, which may be encrypted.
pub(super) fn read_secret(bytes: &[u8], password: Option<&Password>) -> Result<Hotkey, KeyfileError> {
    match password.filter(|_| bytes.starts_with(NACL_PREFIX)) {
        Some(password) => read_plain(&password::open(bytes, password).map_err(KeyfileError::Sealed)?),
        None => read_plain(bytes),
    }
}

fn read_plain(bytes: &[u8]) -> Result<Hotkey, KeyfileError> {
    let file = Keyfile::parse(bytes)?;
    let kind = file.kind()?;
    let address = file.address()?;
    let mut any = false;
    let candidates = [
        file.private_key.as_ref().map(|secret| from_private_key(kind, &secret.0)),
        file.secret_seed.as_ref().map(|secret| hex_bytes::<32>(&secret.0).map(|seed| Hotkey::from_seed(kind, &seed))),
        file.secret_phrase.as_ref().map(|secret| from_phrase(kind, &secret.0)),
    ];
    for candidate in candidates.into_iter().flatten() {
        any = true;
        if let Some(hotkey) = candidate
            && hotkey.account() == address
        {
            file.check_public_key(&address)?;
            return Ok(hotkey);
        }
    }
    if any {
        Err(KeyfileError::AddressMismatch(address.to_string()))
    } else {
        Err(KeyfileError::Malformed("it has no secret; is it a public key file?".to_owned()))
    }
}

/// The public key of a key file or public key file.
pub(super) fn read_public(bytes: &[u8]) -> Result<KeyRef, KeyfileError> {
    let file = Keyfile::parse(bytes)?;
    let address = file.address()?;
    file.check_public_key(&address)?;
    Ok(KeyRef { kind: file.kind()?, public: address.0 })
}

fn from_private_key(kind: KeyKind, text: &str) -> Option<Hotkey> {
    if let Some(seed) = hex_bytes::<32>(text) {
        return Some(Hotkey::from_seed(kind, &seed));
    }
    let secret = hex_bytes::<64>(text)?;
    match kind {
        KeyKind::Sr25519 => Hotkey::from_sr25519_secret(&secret).ok(),
        // Some tools append the public key to the Ed25519 seed.
        KeyKind::Ed25519 => {
            let mut seed = Zeroizing::new([0; 32]);
            seed.copy_from_slice(&secret[..32]);
            Some(Hotkey::from_seed(kind, &seed))
        }
    }
}

fn from_phrase(kind: KeyKind, phrase: &str) -> Option<Hotkey> {
    let seed = match kind {
        KeyKind::Ed25519 => sp_core::ed25519::Pair::from_phrase(phrase, None).ok()?.1,
        KeyKind::Sr25519 => sp_core::sr25519::Pair::from_phrase(phrase, None).ok()?.1,
    };
    Some(Hotkey::from_seed(kind, &Zeroizing::new(seed)))
}

/// Exactly `N` bytes from hexadecimal with or without `0x`.
fn hex_bytes<const N: usize>(text: &str) -> Option<Zeroizing<[u8; N]>> {
    let mut bytes = Zeroizing::new([0; N]);
    hex::decode_to_slice(text.strip_prefix("0x").unwrap_or(text), bytes.as_mut_slice()).ok()?;
    Some(bytes)
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct SecretFile<'a> {
    account_id: &'a str,
    public_key: &'a str,
    private_key: &'a str,
    secret_phrase: &'a str,
    secret_seed: &'a str,
    ss58_address: &'a str,
    crypto_type: u8,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct PublicFile<'a> {
    account_id: &'a str,
    public_key: &'a str,
    ss58_address: &'a str,
    crypto_type: u8,
}

/// The text of a new key file. `seed` and `phrase` are those that `hotkey` was made from.
pub(super) fn secret_text(hotkey: &Hotkey, seed: &[u8; 32], phrase: &str) -> Zeroizing<Vec<u8>> {
    let key = hotkey.key();
    let public = format!("0x{}", hex::encode(key.public));
    let seed_text = Zeroizing::new(format!("0x{}", hex::encode(seed)));
    let private = match hotkey.sr25519_secret() {
        Some(secret) => Zeroizing::new(format!("0x{}", hex::encode(secret.as_slice()))),
        None => seed_text.clone(),
    };
    let file = SecretFile {
        account_id: &public,
        public_key: &public,
        private_key: &private,
        secret_phrase: phrase,
        secret_seed: &seed_text,
        ss58_address: &key.account().to_string(),
        crypto_type: key.kind as u8,
    };
    // Room for everything at once: growing would leave copies of the secret behind.
    let mut text = Zeroizing::new(Vec::with_capacity(2048));
    serde_json::to_writer(&mut *text, &file).expect("plain strings serialise into memory");
    text
}

/// The text of a public key file.
pub(super) fn public_text(key: &KeyRef) -> String {
    let public = format!("0x{}", hex::encode(key.public));
    let file =
        PublicFile { account_id: &public, public_key: &public, ss58_address: &key.account().to_string(), crypto_type: key.kind as u8 };
    serde_json::to_string(&file).expect("plain strings serialise")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    const SR25519: &str = include_str!("../../tests/data/wallets/test/hotkeys/sr25519");
    const ED25519: &str = include_str!("../../tests/data/wallets/test/hotkeys/ed25519");

    fn edited(text: &str, edit: impl FnOnce(&mut serde_json::Map<String, Value>)) -> Vec<u8> {
        let mut value: Value = serde_json::from_str(text).unwrap();
        edit(value.as_object_mut().unwrap());
        serde_json::to_vec(&value).unwrap()
    }

    #[test]
    fn each_of_the_three_secrets_alone_is_enough() {
        for text in [SR25519, ED25519] {
            let expected = read_public(text.as_bytes()).unwrap();
            for keep in ["privateKey", "secretSeed", "secretPhrase"] {
                let bytes = edited(text, |file| {
                    for field in ["privateKey", "secretSeed", "secretPhrase"] {
                        if field != keep {
                            file.remove(field);
                        }
                    }
                });
                assert_eq!(read_plain(&bytes).unwrap().key(), expected, "{keep}");
            }
        }
    }

    #[test]
    fn a_seed_of_raw_bytes_and_a_foreign_private_key_do_not_hide_the_good_phrase() {
        let expected = read_public(SR25519.as_bytes()).unwrap();
        let bytes = edited(SR25519, |file| {
            file["secretSeed"] = json!("0x\u{0}\u{1}\u{2}");
            file["privateKey"] = json!("0x59a8");
        });
        assert_eq!(read_plain(&bytes).unwrap().key(), expected);
    }

    #[test]
    fn a_secret_of_another_address_is_refused() {
        let other = hex::encode([3u8; 32]);
        let bytes = edited(ED25519, |file| {
            file["privateKey"] = json!(other);
            file["secretSeed"] = json!(other);
            file.remove("secretPhrase");
        });
        assert!(matches!(read_plain(&bytes), Err(KeyfileError::AddressMismatch(_))));
        let bytes = edited(ED25519, |file| file["publicKey"] = json!(format!("0x{other}")));
        assert!(matches!(read_plain(&bytes), Err(KeyfileError::AddressMismatch(_))));
    }

    #[test]
    fn older_and_looser_spellings_are_read() {
        let expected = read_public(SR25519.as_bytes()).unwrap();
        let missing = edited(SR25519, |file| {
            file.remove("cryptoType");
        });
        assert_eq!(read_plain(&missing).unwrap().key(), expected);
        for spelling in ["1", "sr25519", "SR25519"] {
            let bytes = edited(SR25519, |file| file["cryptoType"] = json!(spelling));
            assert_eq!(read_plain(&bytes).unwrap().key(), expected);
        }
        let blank = edited(SR25519, |file| {
            let address = file.remove("ss58Address").unwrap();
            file.insert(" ss58Address".to_owned(), address);
        });
        assert_eq!(read_plain(&blank).unwrap().key(), expected);
    }

    #[test]
    fn newer_kinds_of_accounts_are_refused_by_name() {
        let bytes = edited(SR25519, |file| file["cryptoType"] = json!(3));
        assert_eq!(read_plain(&bytes).err(), Some(KeyfileError::Unsupported("cryptoType 3".to_owned())));
        for field in ["accountType", "signingScheme", "hashedDescriptor"] {
            let bytes = edited(SR25519, |file| {
                file.insert(field.to_owned(), json!("x"));
            });
            assert!(matches!(read_plain(&bytes), Err(KeyfileError::Unsupported(what)) if what.contains(field)));
        }
    }

    #[test]
    fn encrypted_files_are_told_apart_by_their_prefix() {
        let coldkey = include_bytes!("../../tests/data/wallets/test/coldkey");
        assert_eq!(read_plain(coldkey).err(), Some(KeyfileError::Encrypted("NaCl secret box")));
        assert_eq!(read_plain(b"$ANSIBLE_VAULT;1.1;AES256\n123").err(), Some(KeyfileError::Encrypted("Ansible vault")));
        assert_eq!(read_plain(b"gAAAAABkxyz").err(), Some(KeyfileError::Encrypted("Fernet")));
    }

    #[test]
    fn a_public_file_and_rubbish_are_no_hotkeys() {
        let public = include_bytes!("../../tests/data/wallets/test/hotkeys/sr25519pub.txt");
        assert!(matches!(read_plain(public), Err(KeyfileError::Malformed(_))));
        for rubbish in [&b""[..], b"{}", b"[]", b"\xff\xfe", b"{\"privateKey\": 3}"] {
            assert!(matches!(read_plain(rubbish), Err(KeyfileError::Malformed(_))));
        }
    }

    #[test]
    fn malformed_files_of_every_kind_are_refused_with_their_reason() {
        type Expectation = fn(&KeyfileError) -> bool;
        let table: [(&str, Vec<u8>, Expectation); 14] = [
            ("empty", Vec::new(), |error| matches!(error, KeyfileError::Malformed(_))),
            ("a list", b"[1]".to_vec(), |error| matches!(error, KeyfileError::Malformed(_))),
            ("cut off", SR25519.as_bytes()[..200].to_vec(), |error| matches!(error, KeyfileError::Malformed(_))),
            ("two objects", [SR25519.as_bytes(), SR25519.as_bytes()].concat(), |error| matches!(error, KeyfileError::Malformed(_))),
            ("not UTF-8", b"{\"ss58Address\": \"\xff\"}".to_vec(), |error| matches!(error, KeyfileError::Malformed(_))),
            ("no address", edited(SR25519, |file| drop(file.remove("ss58Address"))), |error| matches!(error, KeyfileError::Malformed(_))),
            ("a wrong address", edited(SR25519, |file| file["ss58Address"] = json!("5xyz")), |error| {
                matches!(error, KeyfileError::Malformed(_))
            }),
            (
                "an address of another network",
                edited(SR25519, |file| file["ss58Address"] = json!("1FRMM8PEiWXYax7rpS6X4XZX1aAAxSWx1CrKTyrVYhV24fg")),
                |error| matches!(error, KeyfileError::Malformed(_)),
            ),
            ("another key's public half", edited(SR25519, |file| file["publicKey"] = json!(format!("0x{}", "11".repeat(32)))), |error| {
                matches!(error, KeyfileError::AddressMismatch(_))
            }),
            ("a public key of 31 bytes", edited(SR25519, |file| file["publicKey"] = json!("0x1122")), |error| {
                matches!(error, KeyfileError::AddressMismatch(_))
            }),
            ("the other key type", edited(SR25519, |file| file["cryptoType"] = json!(0)), |error| {
                matches!(error, KeyfileError::AddressMismatch(_))
            }),
            ("an ECDSA key", edited(SR25519, |file| file["cryptoType"] = json!(2)), |error| matches!(error, KeyfileError::Unsupported(_))),
            ("a negative type", edited(SR25519, |file| file["cryptoType"] = json!(-1)), |error| {
                matches!(error, KeyfileError::Malformed(_))
            }),
            ("an unknown type by name", edited(SR25519, |file| file["cryptoType"] = json!("ecdsa")), |error| {
                matches!(error, KeyfileError::Unsupported(_))
            }),
        ];
        for (name, bytes, is_expected) in table {
            let error = read_plain(&bytes).err().unwrap_or_else(|| panic!("{name} is taken for a key"));
            assert!(is_expected(&error), "{name}: {error:?}");
        }
    }

    #[test]
    fn a_hotkey_made_from_a_uri_has_a_private_key_only() {
        let expected = read_public(SR25519.as_bytes()).unwrap();
        let bytes = edited(SR25519, |file| {
            file["secretSeed"] = json!(null);
            file["secretPhrase"] = json!(null);
        });
        assert_eq!(read_plain(&bytes).unwrap().key(), expected);
    }

    #[test]
    fn messages_about_a_broken_file_do_not_quote_it() {
        let text = SR25519.replace("\"secretPhrase\":\"", "\"secretPhrase\":\"\\x");
        let Err(KeyfileError::Malformed(reason)) = read_plain(text.as_bytes()) else { panic!("must be malformed") };
        assert!(!reason.contains("wonder"), "{reason}");
    }

    #[test]
    fn a_written_file_has_the_private_key_that_the_python_package_writes() {
        for text in [SR25519, ED25519] {
            let file: Value = serde_json::from_str(text).unwrap();
            let seed = hex_bytes::<32>(file["secretSeed"].as_str().unwrap()).unwrap();
            let kind = read_public(text.as_bytes()).unwrap().kind;
            let hotkey = Hotkey::from_seed(kind, &seed);
            let written = secret_text(&hotkey, &seed, file["secretPhrase"].as_str().unwrap());
            let written: Value = serde_json::from_slice(&written).unwrap();
            assert_eq!(written, file);
        }
    }
}
