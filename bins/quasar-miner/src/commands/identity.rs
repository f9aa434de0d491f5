//! `identity show` and `identity new`.

use chain::Wallet;
use daemon::settings::{CommonArgs, Role};
use daemon::{Exit, Failure};
use protocol::{KeyKind, KeyRef};

/// The wallet that the settings name.
pub fn wallet(settings: &daemon::Settings) -> Result<Wallet, Failure> {
    let named = settings.wallet()?;
    Ok(Wallet::new(named.path, named.name, named.hotkey))
}

fn print(key: &KeyRef, json: bool) {
    let address = key.account().to_string();
    if json {
        println!("{}", serde_json::json!({ "ss58_address": address, "crypto_type": key.kind.to_string() }));
    } else {
        println!("{address} ({})", key.kind);
    }
}

pub fn show(common: &CommonArgs, json: bool) -> Result<Exit, Failure> {
    let settings = common.settings(Role::Miner, ())?;
    let key = wallet(&settings)?.load_hotkeypub().map_err(Failure::configuration)?;
    print(&key, json);
    Ok(Exit::Done)
}

pub fn new(common: &CommonArgs, kind: KeyKind, json: bool) -> Result<Exit, Failure> {
    let settings = common.settings(Role::Miner, ())?;
    let hotkey = wallet(&settings)?.create_hotkey(kind).map_err(Failure::configuration)?;
    print(&hotkey.key(), json);
    Ok(Exit::Done)
}
