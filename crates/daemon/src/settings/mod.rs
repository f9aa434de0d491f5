//! Configuration: defaults < TOML file < environment < flags, and each value knows where it came from.
//!
//! [`table::SETTINGS`] defines every setting once. [`Settings::load`] refuses what it does not understand: an unknown key in
//! the file, an unknown or dropped `QUASAR_*` variable, a value that does not parse, each with a hint. What a command needs it
//! asks for ([`Settings::network`], [`Settings::wallet`] …), and only then is a missing value an error, with the three places
//! where it can be set.

pub mod flags;
mod layers;
pub mod show;
pub mod table;
mod typed;
mod value;
mod variables;

use std::collections::BTreeMap;
use std::path::PathBuf;

pub use flags::{CommonArgs, ConfigArgs, MinerArgs, ValidatorArgs};
pub use layers::{Origin, Sources, Value};
pub use table::{Role, Setting};
pub use typed::{MinerSettings, Network, NetworkName, StoreSettings, ValidatorSettings, WalletSettings};
pub use value::Devices;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SettingsError {
    #[error("the configuration file {} cannot be read: {reason}\nhint: check --settings or QUASAR_CONFIG, and the file's permissions", path.display())]
    Unreadable { path: PathBuf, reason: String },
    #[error("line {line} of {} is not valid TOML: {reason}\nhint: texts need quotes; a table starts with a line such as [wallet]", path.display())]
    Syntax { path: PathBuf, line: usize, reason: String },
    #[error("{} has the unknown key `{key}`\nhint: {}", path.display(), did_you_mean(*nearest, "see `config show` for all keys"))]
    UnknownKey { path: PathBuf, key: String, nearest: Option<&'static str> },
    #[error("{} has the key `{key}`, which a {role} does not read\nhint: it belongs into the {owner}'s file", path.display())]
    OtherRole { path: PathBuf, key: String, role: Role, owner: Role },
    #[error("the environment variable {name} is unknown\nhint: {}", did_you_mean(*nearest, "unset it; see `config show` for all names"))]
    UnknownVariable { name: String, nearest: Option<&'static str> },
    #[error("the environment variable {name} is not used any more\nhint: unset it: {replacement}")]
    Dropped { name: String, replacement: &'static str },
    #[error("a {role} has no flag --{flag}")]
    UnknownFlag { role: Role, flag: String },
    #[error("the value of `{key}` ({origin}) is not usable: {reason}")]
    Invalid { key: String, origin: Origin, reason: String },
    #[error("`{key}` is not set\nhint: {hint}")]
    Missing { key: &'static str, hint: String },
    #[error("the local chain's file {} is not usable: {reason}\nhint: the devnet writes it: {{\"genesis\": \"0x…\", \"endpoint\": \"ws://127.0.0.1:…\"}}", path.display())]
    LocalChain { path: PathBuf, reason: String },
    #[error(
        "bucket credentials are incomplete: `{missing}` is not set\nhint: set QUASAR_S3_ACCESS_KEY and QUASAR_S3_SECRET_KEY, or QUASAR_S3_ANONYMOUS=1 for reading only"
    )]
    Credentials { missing: &'static str },
    #[error("a {role} reads the bucket without credentials\nhint: remove `s3.anonymous`; its grants come sealed through the bucket")]
    NotAnonymous { role: Role },
}

fn did_you_mean(nearest: Option<&str>, otherwise: &str) -> String {
    nearest.map_or_else(|| otherwise.to_owned(), |nearest| format!("did you mean `{nearest}`?"))
}

impl From<SettingsError> for crate::Failure {
    fn from(error: SettingsError) -> Self {
        match error {
            SettingsError::UnknownFlag { .. } => Self::usage(error),
            _ => Self::configuration(error),
        }
    }
}

/// The effective settings of one role.
#[derive(Clone, Debug)]
pub struct Settings {
    role: Role,
    values: BTreeMap<&'static str, Value>,
    home: Option<PathBuf>,
    /// Folder of the credentials that systemd has handed over.
    credentials: Option<PathBuf>,
    /// Things worth saying that are not errors: variables without effect.
    pub notices: Vec<String>,
}

impl Settings {
    /// Lays the sources over one another.
    ///
    /// # Errors
    /// The first problem; [`Settings::check`] gives all.
    pub fn load(role: Role, sources: &Sources) -> Result<Self, SettingsError> {
        let mut layered = layers::resolve(role, sources);
        if !layered.problems.is_empty() {
            return Err(layered.problems.swap_remove(0));
        }
        Ok(Self::of(role, sources, layered.values, layered.notices))
    }

    fn of(role: Role, sources: &Sources, values: BTreeMap<&'static str, Value>, notices: Vec<String>) -> Self {
        let folder = |path: Option<&std::path::Path>| path.map(PathBuf::from);
        Self { role, values, home: folder(sources.home()), credentials: folder(sources.credentials()), notices }
    }

    /// Everything that is wrong with the sources, and with what the role needs for `run`: what `config validate` prints.
    pub fn check(role: Role, sources: &Sources) -> Vec<SettingsError> {
        let layered = layers::resolve(role, sources);
        let mut problems = layered.problems;
        let settings = Self::of(role, sources, layered.values, Vec::new());
        problems.extend(settings.network().err());
        problems.extend(settings.netuid().err());
        problems.extend(settings.wallet().err());
        problems.extend(settings.store().err());
        problems.extend(settings.owner_identity().err());
        // A value that was refused is missing too; once is enough.
        let invalid: Vec<String> = problems
            .iter()
            .filter_map(|problem| match problem {
                SettingsError::Invalid { key, .. } => Some(key.clone()),
                _ => None,
            })
            .collect();
        problems.retain(|problem| !matches!(problem, SettingsError::Missing { key, .. } if invalid.iter().any(|k| k == key)));
        problems
    }

    pub fn role(&self) -> Role {
        self.role
    }

    /// The value of a key with its origin, if it has one.
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.values.get(key)
    }
}

#[cfg(test)]
mod tests;
