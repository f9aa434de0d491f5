//! Keys in the bucket (`docs/protocol.md`, keys). Segments hold `[A-Za-z0-9._=-]` only.

use crate::envelope::RunId;
use crate::{AccountId, Digest};

/// Longest key.
pub const KEY_BYTES_MAX: usize = 1024;

/// Prefix of a subnet, without a trailing slash.
pub fn prefix(netuid: u16) -> String {
    format!("quasar/netuid={netuid}")
}

/// Prefix that the whole world may read.
pub fn public_prefix(netuid: u16) -> String {
    format!("{}/public/", prefix(netuid))
}

/// Keys of one subnet.
#[derive(Clone, Debug)]
pub struct Keys {
    prefix: String,
}

impl Keys {
    pub fn new(netuid: u16) -> Self {
        Self { prefix: prefix(netuid) }
    }

    pub fn current(&self) -> String {
        format!("{}/public/current.qsr", self.prefix)
    }

    pub fn root(&self, version: u32) -> String {
        format!("{}/public/root/{version}.qsr", self.prefix)
    }

    pub fn shard_tokens(&self, shard: &str) -> String {
        format!("{}/data/shards/{shard}/tokens.bin", self.prefix)
    }

    pub fn shard_manifest(&self, shard: &str) -> String {
        format!("{}/data/shards/{shard}/manifest.qsr", self.prefix)
    }

    pub fn release_file(&self, release: &str, path: &str) -> String {
        format!("{}/checkpoints/{release}/{path}", self.prefix)
    }

    pub fn release_manifest(&self, release: &str) -> String {
        format!("{}/checkpoints/{release}/manifest.qsr", self.prefix)
    }

    pub fn run(&self, run: RunId) -> RunKeys {
        RunKeys {
            public: format!("{}/public/{run}", self.prefix),
            restricted: format!("{}/{run}", self.prefix),
            private: format!("{}/private/{run}", self.prefix),
        }
    }
}

/// Keys of one run.
#[derive(Clone, Debug)]
pub struct RunKeys {
    public: String,
    restricted: String,
    private: String,
}

impl RunKeys {
    pub fn manifest(&self) -> String {
        format!("{}/manifest.qsr", self.public)
    }

    pub fn plan(&self, digest: &Digest) -> String {
        format!("{}/plan/{digest}.qsr", self.public)
    }

    pub fn catalog(&self, page: u32) -> String {
        format!("{}/catalog/{page}.qsr", self.public)
    }

    pub fn head(&self) -> String {
        format!("{}/head.qsr", self.public)
    }

    pub fn job(&self, hotkey: &AccountId, slot: u8) -> String {
        format!("{}/jobs/{hotkey}/{slot}.qsr", self.public)
    }

    pub fn standing(&self, hotkey: &AccountId, slot: u8) -> String {
        format!("{}/grants/{hotkey}/{slot}/standing.qsr", self.public)
    }

    pub fn pull_grants(&self, hotkey: &AccountId, slot: u8) -> String {
        format!("{}/grants/{hotkey}/{slot}/pull.qsr", self.public)
    }

    pub fn merge(&self, t: u64) -> String {
        format!("{}/merges/{t}.qsr", self.public)
    }

    pub fn draw(&self, cycle: u64) -> String {
        format!("{}/draws/{cycle}.qsr", self.public)
    }

    pub fn audit(&self, validator: &AccountId, audit: &Digest) -> String {
        format!("{}/audits/{validator}/{audit}.qsr", self.public)
    }

    pub fn verdict_commit(&self, validator: &AccountId, audit: &Digest) -> String {
        format!("{}/verdicts/{validator}/{audit}.commit.qsr", self.public)
    }

    pub fn verdict_reveal(&self, validator: &AccountId, audit: &Digest) -> String {
        format!("{}/verdicts/{validator}/{audit}.reveal.qsr", self.public)
    }

    pub fn scores(&self, validator: &AccountId, epoch: u64) -> String {
        format!("{}/scores/{validator}/{epoch}.qsr", self.public)
    }

    pub fn log(&self, size: u64) -> String {
        format!("{}/log/{size}.qsr", self.public)
    }

    /// The log head that follows the log of this size, whoever wrote it first: there is one.
    pub fn log_after(&self, size: u64) -> String {
        format!("{}/log/{size}.qsr", self.private)
    }

    pub fn status(&self) -> String {
        format!("{}/status.json", self.public)
    }

    pub fn keyframe(&self, fragment: u16, version: u64) -> String {
        format!("{}/fragments/{fragment}/{version}/keyframe.safetensors", self.restricted)
    }

    /// The frame that leads to a version from the one before.
    pub fn delta(&self, fragment: u16, version: u64) -> String {
        format!("{}/fragments/{fragment}/{version}/delta.qfd", self.restricted)
    }

    pub fn fragment_manifest(&self, fragment: u16, version: u64) -> String {
        format!("{}/fragments/{fragment}/{version}/manifest.qsr", self.restricted)
    }

    /// Keys of one slot's own folder.
    pub fn slot(&self, hotkey: &AccountId, slot: u8) -> SlotKeys {
        SlotKeys { folder: format!("{}/in/{hotkey}/{slot}", self.restricted) }
    }

    pub fn progress(&self, hotkey: &AccountId, slot: u8) -> String {
        self.slot(hotkey, slot).progress()
    }

    pub fn payload(&self, hotkey: &AccountId, slot: u8, t: u64) -> String {
        self.slot(hotkey, slot).payload(t)
    }

    pub fn commitment(&self, hotkey: &AccountId, slot: u8, t: u64) -> String {
        self.slot(hotkey, slot).commitment(t)
    }

    pub fn opening(&self, hotkey: &AccountId, slot: u8, audit: &Digest, part: u8) -> String {
        self.slot(hotkey, slot).opening(audit, part)
    }

    pub fn receipt(&self, hotkey: &AccountId, slot: u8, lease: u64) -> String {
        self.slot(hotkey, slot).receipt(lease)
    }

    /// The secret that the keys of openings are derived from.
    pub fn opening_secret(&self) -> String {
        format!("{}/opening-secret", self.private)
    }

    /// Who may write to the run.
    pub fn writer_lease(&self) -> String {
        format!("{}/writer.qsr", self.private)
    }

    /// A lease of rows, written before the job that gives it out.
    pub fn lease(&self, lease: u64) -> String {
        format!("{}/leases/{lease}.qsr", self.private)
    }

    /// How the rows of a lease are booked.
    pub fn lease_end(&self, lease: u64) -> String {
        format!("{}/leases/{lease}.end.qsr", self.private)
    }

    /// The orchestrator's machine, for a successor without its disk.
    pub fn snapshot(&self) -> String {
        format!("{}/snapshot.bin", self.private)
    }

    /// What an operator asked for. Public, so that everybody can read why.
    pub fn order(&self, number: u64) -> String {
        format!("{}/orders/{number}.qsr", self.public)
    }

    pub fn tape(&self, t: u64) -> String {
        format!("{}/tape/{t}.qsr", self.private)
    }

    pub fn state(&self, fragment: u16, version: u64) -> String {
        format!("{}/state/{fragment}/{version}.qfs", self.private)
    }
}

/// Keys of one slot, for those who ask for many of them: to spell an address costs more than all else of a key.
#[derive(Clone, Debug)]
pub struct SlotKeys {
    folder: String,
}

impl SlotKeys {
    pub fn progress(&self) -> String {
        format!("{}/progress.qsr", self.folder)
    }

    pub fn payload(&self, t: u64) -> String {
        format!("{}/{t}/payload.qfd", self.folder)
    }

    pub fn commitment(&self, t: u64) -> String {
        format!("{}/{t}/commitment.qsr", self.folder)
    }

    /// Everything of one opening.
    pub fn openings(&self, audit: &Digest) -> String {
        format!("{}/openings/{audit}/", self.folder)
    }

    /// The first volume of a part.
    pub fn opening(&self, audit: &Digest, part: u8) -> String {
        self.opening_volume(audit, part, 0)
    }

    pub fn opening_volume(&self, audit: &Digest, part: u8, volume: u16) -> String {
        match volume {
            0 => format!("{}/openings/{audit}/{part}", self.folder),
            _ => format!("{}/openings/{audit}/{part}.{volume}", self.folder),
        }
    }

    pub fn receipt(&self, lease: u64) -> String {
        format!("{}/receipts/{lease}.qsr", self.folder)
    }
}

/// Whether `key` keeps to the rules that hold on every store.
pub fn is_valid(key: &str) -> bool {
    !key.is_empty()
        && key.len() <= KEY_BYTES_MAX
        && key.split('/').all(|segment| {
            !segment.is_empty()
                && segment != "."
                && segment != ".."
                && segment.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._=-".contains(&byte))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_keeps_to_the_rules_of_the_store() {
        let keys = Keys::new(24);
        let run = keys.run(RunId([7; 16]));
        let account = AccountId([9; 32]);
        let digest = Digest::blake3(b"x");
        for key in [
            keys.current(),
            keys.root(1),
            keys.shard_tokens("a-1"),
            keys.release_file("r1", "model-00001.safetensors"),
            run.manifest(),
            run.plan(&digest),
            run.job(&account, 0),
            run.audit(&account, &digest),
            run.verdict_reveal(&account, &digest),
            run.keyframe(3, 4),
            run.payload(&account, 1, 2),
            run.opening(&account, 1, &digest, 0),
            run.receipt(&account, 1, 9),
            run.log(64),
            run.log_after(64),
            run.tape(4),
            run.writer_lease(),
            run.lease(7 << 32),
            run.snapshot(),
            run.order(1),
        ] {
            assert!(is_valid(&key), "{key}");
        }
        for key in ["", "/a", "a/", "a//b", "a/../b", "a b", "ä"] {
            assert!(!is_valid(key), "{key}");
        }
        assert!(run.head().starts_with(&public_prefix(24)));
        assert!(!run.keyframe(0, 0).starts_with(&public_prefix(24)));
    }
}
