//! `identity new`, `show` and `certify`.

use chain::identity::{self, Standing};
use chain::{Hotkey, Password, Wallet};
use daemon::settings::{CommonArgs, Role};
use daemon::{Exit, Failure, Settings};
use protocol::{KeyKind, KeyRef};

use super::{block_on, chain_failure, chain_of};

/// The wallet that the settings name.
pub fn wallet(settings: &Settings) -> Result<Wallet, Failure> {
    let named = settings.wallet()?;
    Ok(Wallet::new(named.path, named.name, named.hotkey))
}

/// The hotkey with its secret. The password of an encrypted one comes from the file that the settings or systemd name, or from the
/// terminal.
pub fn hotkey(settings: &Settings) -> Result<Hotkey, Failure> {
    let password_file = settings.wallet()?.password_file;
    wallet(settings)?.unlock_hotkey(password_file.as_deref()).map_err(Failure::configuration)
}

fn print(key: &KeyRef, standing: Option<&Standing>, json: bool) {
    if json {
        println!("{}", identity::json(key, standing));
    } else {
        println!("{}", identity::text(key, standing));
    }
}

/// Makes a hotkey; with `encrypt`, under a password from the file that the settings or systemd name, or asked for twice.
pub fn new(common: &CommonArgs, kind: KeyKind, encrypt: bool, json: bool) -> Result<Exit, Failure> {
    let settings = common.settings(Role::Miner, ())?;
    let wallet = wallet(&settings)?;
    let hotkey = if encrypt {
        let password = Password::choose(settings.wallet()?.password_file.as_deref()).map_err(Failure::configuration)?;
        wallet.create_encrypted_hotkey(kind, &password)
    } else {
        wallet.create_hotkey(kind)
    };
    print(&hotkey.map_err(Failure::configuration)?.key(), None, json);
    Ok(Exit::Done)
}

/// Prints the address; where a network is set, also whether the hotkey is registered, what that costs, and its key certificate.
pub fn show(common: &CommonArgs, json: bool) -> Result<Exit, Failure> {
    let settings = common.settings(Role::Miner, ())?;
    let key = wallet(&settings)?.load_hotkeypub().map_err(Failure::configuration)?;
    let ask = || {
        let (link, netuid) = (chain_of(&settings)?, settings.netuid()?);
        block_on(async { Standing::read(link.client().await.map_err(chain_failure)?.as_ref(), netuid, &key).await.map_err(chain_failure) })
    };
    let asked = settings.value("network").map(|_| ask()).transpose();
    print(&key, asked.as_ref().ok().and_then(Option::as_ref), json);
    asked.map(|_| Exit::Done)
}

/// Publishes the key certificate of the hotkey through the commitments pallet, unless the chain shows it already.
pub fn certify(common: &CommonArgs, may_replace: bool, json: bool) -> Result<Exit, Failure> {
    let settings = common.settings(Role::Miner, ())?;
    let (link, netuid, hotkey) = (chain_of(&settings)?, settings.netuid()?, hotkey(&settings)?);
    let done = block_on(async {
        let client = link.client().await.map_err(chain_failure)?;
        identity::certify(client.as_ref(), &hotkey, netuid, may_replace, settings.dry_run()).await.map_err(chain_failure)
    })?;
    if json {
        println!("{}", done.json(&hotkey));
    } else {
        println!("{}", done.text(&hotkey));
    }
    Ok(Exit::Done)
}
