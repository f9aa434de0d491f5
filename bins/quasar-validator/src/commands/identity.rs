//! `identity show`.

use chain::Wallet;
use daemon::settings::{CommonArgs, Role};
use daemon::{Exit, Failure, Settings};

/// The wallet that the settings name.
pub fn wallet(settings: &Settings) -> Result<Wallet, Failure> {
    let named = settings.wallet()?;
    Ok(Wallet::new(named.path, named.name, named.hotkey))
}

pub fn show(common: &CommonArgs, json: bool) -> Result<Exit, Failure> {
    let settings = common.settings(Role::Validator, ())?;
    let key = wallet(&settings)?.load_hotkeypub().map_err(Failure::configuration)?;
    let (address, kind) = (key.account().to_string(), key.kind.to_string());
    if json {
        println!("{}", serde_json::json!({ "ss58_address": address, "crypto_type": kind }));
    } else {
        println!("{address} ({kind})");
    }
    Ok(Exit::Done)
}
