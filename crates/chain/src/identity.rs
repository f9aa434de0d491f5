//! How a hotkey stands on a subnet, for people: whether it is registered, what registering costs, whether it can be sealed to.

use std::fmt;

use protocol::{KeyKind, KeyRef};
use serde::Serialize;

use crate::certificate::{self, KeyCertificate};
use crate::chain::Chain;
use crate::error::ChainError;
use crate::hotkey::Hotkey;

/// Rao in one token.
const RAO: u64 = 1_000_000_000;

/// What the chain says about a hotkey.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Standing {
    pub netuid: u16,
    /// `None` while it is not registered.
    pub uid: Option<u16>,
    /// Whether the subnet takes registrations.
    pub is_open: bool,
    /// What a registration costs now, in rao; `None` where the runtime does not say.
    pub burn_rao: Option<u64>,
    pub certificate: Certified,
}

/// Whether something can be sealed to a hotkey.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Certified {
    /// The chain shows its key certificate.
    Published,
    /// An Ed25519 key needs none.
    NotNeeded,
    Missing,
    /// The hotkey has committed something else.
    Taken,
}

/// A hotkey in words, with what the chain says about it where it was asked.
pub fn text(key: &KeyRef, standing: Option<&Standing>) -> String {
    let address = format!("{} ({})", key.account(), key.kind);
    standing.map_or_else(|| address.clone(), |standing| format!("{address}\n{standing}"))
}

/// The same as one JSON object.
pub fn json(key: &KeyRef, standing: Option<&Standing>) -> serde_json::Value {
    let mut object = serde_json::json!({ "ss58_address": key.account().to_string(), "crypto_type": key.kind.to_string() });
    if let Some(standing) = standing {
        object["standing"] = serde_json::json!(standing);
    }
    object
}

impl Standing {
    /// Reads how `key` stands on the subnet.
    pub async fn read(chain: &dyn Chain, netuid: u16, key: &KeyRef) -> Result<Self, ChainError> {
        let account = key.account();
        let registration = chain.registration(netuid, &account).await?;
        let certificate = match chain.commitment(netuid, &account).await? {
            Some(bytes) if KeyCertificate::decode(&bytes).is_some() => Certified::Published,
            _ if key.kind == KeyKind::Ed25519 => Certified::NotNeeded,
            Some(_) => Certified::Taken,
            None => Certified::Missing,
        };
        Ok(Self { netuid, uid: registration.uid, is_open: registration.is_open, burn_rao: registration.burn_rao, certificate })
    }
}

/// An amount of rao in tokens, without needless zeros.
pub fn tokens(rao: u64) -> String {
    let text = format!("{}.{:09}", rao / RAO, rao % RAO);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

impl fmt::Display for Standing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.uid {
            Some(uid) => writeln!(f, "registered on subnet {} as uid {uid}", self.netuid)?,
            None => {
                let cost = self.burn_rao.map_or_else(|| "an unknown amount".to_owned(), |rao| format!("{} τ", tokens(rao)));
                let state = if self.is_open { "" } else { ", and the subnet is closed at the moment" };
                writeln!(f, "not registered on subnet {}; registering costs {cost}{state}", self.netuid)?;
            }
        }
        f.write_str(match self.certificate {
            Certified::Published => "key certificate: on chain",
            Certified::NotNeeded => "key certificate: not needed, grants are sealed to the ed25519 key itself",
            Certified::Missing => "key certificate: missing; `identity certify` publishes it, and so does a running miner or validator",
            Certified::Taken => {
                "key certificate: missing, the hotkey has committed something else; `identity certify --replace` replaces it"
            }
        })
    }
}

/// What came of publishing a key certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Certification {
    /// In this block.
    Published(u64),
    /// It was there already.
    Shown,
    /// It would be published.
    DryRun,
}

/// Publishes the key certificate of `hotkey` through the commitments pallet, unless the chain shows it already. A dry run only looks.
pub async fn certify(
    chain: &dyn Chain,
    hotkey: &Hotkey,
    netuid: u16,
    may_replace: bool,
    is_dry_run: bool,
) -> Result<Certification, ChainError> {
    if is_dry_run {
        let standing = Standing::read(chain, netuid, &hotkey.key()).await?;
        return Ok(if standing.certificate == Certified::Published { Certification::Shown } else { Certification::DryRun });
    }
    let block = certificate::publish(chain, hotkey, netuid, may_replace).await?;
    Ok(block.map_or(Certification::Shown, |block| Certification::Published(block.number)))
}

impl Certification {
    /// For people.
    pub fn text(&self, hotkey: &Hotkey) -> String {
        let (account, key) = (hotkey.account(), KeyCertificate::of(hotkey));
        match self {
            Self::Published(block) => format!("the key certificate of {account} is on chain since block {block}: x25519 {key}"),
            Self::Shown => format!("the key certificate of {account} is on chain already: x25519 {key}"),
            Self::DryRun => format!("dry run: the key certificate of {account} would be published: x25519 {key}"),
        }
    }

    /// For programs.
    pub fn json(&self, hotkey: &Hotkey) -> serde_json::Value {
        let block = if let Self::Published(block) = self { Some(block) } else { None };
        let (account, key) = (hotkey.account().to_string(), KeyCertificate::of(hotkey).to_string());
        serde_json::json!({ "ss58_address": account, "x25519": key, "on_chain": *self != Self::DryRun, "block": block })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_written_without_needless_zeros() {
        for (rao, text) in [(0, "0"), (1, "0.000000001"), (500_000_000, "0.5"), (RAO, "1"), (12 * RAO + 50, "12.00000005")] {
            assert_eq!(tokens(rao), text);
        }
    }

    #[test]
    fn a_stranger_hears_what_joining_costs() {
        let standing = Standing { netuid: 24, uid: None, is_open: false, burn_rao: Some(1_500_000_000), certificate: Certified::Missing };
        let text = standing.to_string();
        assert!(text.contains("costs 1.5 τ, and the subnet is closed") && text.contains("certify"), "{text}");
    }
}
