//! The hotkey that the settings name, and the commands `identity new`, `show` and `certify` of every program that has one.

use chain::identity::{self, Standing};
use chain::{Hotkey, Password, Wallet};
use clap::{Subcommand, ValueEnum};
use protocol::{KeyKind, KeyRef};

use crate::network::{self, block_on};
use crate::settings::CommonArgs;
use crate::{Exit, Failure, Role, Settings};

#[derive(Clone, Copy, Debug, Subcommand)]
pub enum IdentityCommand {
    /// Print the hotkey's address and kind; where a network is set, also its registration, what that costs, and its key certificate
    Show {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Make a hotkey; an existing one is never overwritten
    New {
        /// Kind of key; grants are sealed to an ed25519 key itself, an sr25519 key needs a certificate on chain
        #[arg(long, value_enum, default_value_t = Kind::Ed25519)]
        kind: Kind,
        /// Encrypt the key file under a password: from --password-file, else asked for
        #[arg(long)]
        encrypt: bool,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Publish the key that grants and audit orders of an sr25519 hotkey are sealed to; a running daemon does so by itself
    Certify {
        /// Give up what the hotkey has committed on the subnet for another purpose
        #[arg(long)]
        replace: bool,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Kind {
    Ed25519,
    Sr25519,
}

impl From<Kind> for KeyKind {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Ed25519 => Self::Ed25519,
            Kind::Sr25519 => Self::Sr25519,
        }
    }
}

/// The wallet that the settings name.
///
/// # Errors
/// They name none.
pub fn wallet(settings: &Settings) -> Result<Wallet, Failure> {
    let named = settings.wallet()?;
    Ok(Wallet::new(named.path, named.name, named.hotkey))
}

/// The hotkey with its secret. The password of an encrypted one comes from the file that the settings or systemd name, or from the
/// terminal.
///
/// # Errors
/// It is missing, damaged, of another kind, or stays locked.
pub fn hotkey(settings: &Settings) -> Result<Hotkey, Failure> {
    let password_file = settings.wallet()?.password_file;
    wallet(settings)?.unlock_hotkey(password_file.as_deref()).map_err(Failure::configuration)
}

/// Does what the command says, and hands what is to be printed to `print`: also where it fails after it has found something out.
///
/// # Errors
/// With the exit code that the failure stands for.
pub fn run(common: &CommonArgs, role: Role, command: IdentityCommand, print: impl FnOnce(String)) -> Result<Exit, Failure> {
    let settings = common.settings(role, ())?;
    match command {
        IdentityCommand::Show { json } => show(&settings, json, print),
        IdentityCommand::New { kind, encrypt, json } => new(&settings, kind.into(), encrypt, json, print),
        IdentityCommand::Certify { replace, json } => certify(&settings, replace, json, print),
    }
}

fn text(key: &KeyRef, standing: Option<&Standing>, json: bool) -> String {
    if json { identity::json(key, standing).to_string() } else { identity::text(key, standing) }
}

fn new(settings: &Settings, kind: KeyKind, encrypt: bool, json: bool, print: impl FnOnce(String)) -> Result<Exit, Failure> {
    let wallet = wallet(settings)?;
    let hotkey = if encrypt {
        let password = Password::choose(settings.wallet()?.password_file.as_deref()).map_err(Failure::configuration)?;
        wallet.create_encrypted_hotkey(kind, &password)
    } else {
        wallet.create_hotkey(kind)
    };
    print(text(&hotkey.map_err(Failure::configuration)?.key(), None, json));
    Ok(Exit::Done)
}

fn show(settings: &Settings, json: bool, print: impl FnOnce(String)) -> Result<Exit, Failure> {
    let key = wallet(settings)?.load_hotkeypub().map_err(Failure::configuration)?;
    let ask = || {
        let (link, netuid) = (network::link(settings)?, settings.netuid()?);
        block_on(async { Ok(Standing::read(link.client().await?.as_ref(), netuid, &key).await?) })
    };
    let asked = settings.value("network").map(|_| ask()).transpose();
    // The address needs no chain.
    print(text(&key, asked.as_ref().ok().and_then(Option::as_ref), json));
    asked.map(|_| Exit::Done)
}

fn certify(settings: &Settings, may_replace: bool, json: bool, print: impl FnOnce(String)) -> Result<Exit, Failure> {
    let (link, netuid, hotkey) = (network::link(settings)?, settings.netuid()?, hotkey(settings)?);
    let done = block_on(async {
        let client = link.client().await?;
        Ok(identity::certify(client.as_ref(), &hotkey, netuid, may_replace, settings.dry_run()).await?)
    })?;
    print(if json { done.json(&hotkey).to_string() } else { done.text(&hotkey) });
    Ok(Exit::Done)
}
