//! Run root, current run, run manifest and catalog: what stays for a whole run.

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

use crate::envelope::{Purpose, RunId};
use crate::shards::ShardManifest;
use crate::{Digest, KeyRef, codec};

/// The trust anchor: the owner names the orchestrator's online key and hard bounds. Version 1 is signed by the owner that the
/// user gave; version N signs version N+1.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct RunRoot {
    pub version: u32,
    /// BLAKE3 of the previous version's file; zero for version 1.
    pub previous: Digest,
    pub owner: KeyRef,
    pub orchestrator: KeyRef,
    /// Hosts (with port) that grants may point to.
    pub store_hosts: Vec<String>,
    pub bounds: Bounds,
}

/// Bounds that no run manifest may exceed.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct Bounds {
    pub fragments_max: u16,
    pub slots_max: u8,
    pub payload_bytes_max: u64,
    pub checkpoint_bytes_max: u64,
}

/// Pointer that discovery starts from.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct CurrentRun {
    pub root_version: u32,
    /// BLAKE3 of the root's file.
    pub root_digest: Digest,
    pub run: RunId,
    /// BLAKE3 of the run manifest's file.
    pub manifest_digest: Digest,
}

/// Encoding of fragment payloads or states. The crate `fragments` writes and reads them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Codec {
    Bf16 = 0,
    /// Blocks of 256 four-bit values with an f32 scale.
    Int4 = 1,
    /// 64 of each 4096 values, with 12-bit indices, in two bits; upstream only, with error feedback.
    TopK = 2,
}

impl Codec {
    /// Whether a learner keeps what its payloads left out, and sends it later: error feedback.
    pub fn withholds(self) -> bool {
        self == Self::TopK
    }
}

/// AdamW of the learners.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct InnerOptimizer {
    /// Peak learning rate in units of 1e-9.
    pub lr_nano: u64,
    pub beta1_ppm: u32,
    pub beta2_ppm: u32,
    /// Epsilon in units of 1e-12.
    pub eps_pico: u64,
    pub weight_decay_ppm: u32,
    /// Global gradient norm limit, in units of 1e-6.
    pub clip_norm_ppm: u64,
    pub schedule: LrSchedule,
}

/// Learning rate over the whole run: linear warm-up to the peak, then a cosine to `final_ppm` of it at `total_steps`.
/// `total_steps` 0 keeps the peak for ever. Indexed by the run's step, never restarted.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct LrSchedule {
    pub warmup_steps: u64,
    pub total_steps: u64,
    pub final_ppm: u32,
}

impl LrSchedule {
    /// Factor of the peak at step `index` (0 is the first).
    pub fn factor(&self, index: u64) -> f64 {
        if index < self.warmup_steps {
            return (index + 1) as f64 / self.warmup_steps as f64;
        }
        if self.total_steps <= self.warmup_steps {
            return 1.0;
        }
        let done = (index - self.warmup_steps) as f64 / (self.total_steps - self.warmup_steps) as f64;
        let floor = f64::from(self.final_ppm) / 1e6;
        floor + (1.0 - floor) * 0.5 * (1.0 + (std::f64::consts::PI * done.min(1.0)).cos())
    }
}

impl InnerOptimizer {
    /// Learning rate at run step `index`.
    pub fn lr(&self, index: u64) -> f64 {
        self.lr_nano as f64 * 1e-9 * self.schedule.factor(index)
    }
}

/// How learners' work is audited.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct AuditParameters {
    /// Share of the learner-cycles that are audited, parts per million; more of those that a filter left something out of
    /// ([`crate::audits::select`]).
    pub rate_ppm: u32,
    /// Rows of the loss test, assigned and held-out each.
    pub loss_rows: u16,
    /// Steps between committed states: a replay runs at most so many.
    pub replay_steps: u16,
    /// Largest ‖claimed − replayed‖ / ‖replayed − start‖ of the audited fragment.
    pub replay_tolerance_ppm: u32,
    /// The beacon is the hash of the block so many after that of [`crate::audits::beacon_from`]: more than finality lags behind the head.
    pub beacon_blocks: u32,
    /// How long a miner may take to open a segment.
    pub opening_ms: u64,
}

/// Every number that learners, validators and orchestrator must agree on.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct RunParameters {
    /// P.
    pub fragments: u16,
    /// H: inner steps between two merges of the same fragment.
    pub inner_steps: u16,
    /// τ: outer steps that a pull may overlap with; at most τ + 1 pulls are open.
    pub overlap: u8,
    /// γ of the grace rule.
    pub grace_ppm: u32,
    /// The run ends when every fragment was merged so often; 0 = it does not end by itself.
    pub cycles: u64,
    pub outer_lr_ppm: u32,
    pub outer_momentum_ppm: u32,
    /// ξ: target duration of a step; 0 = as fast as it goes.
    pub step_target_ms: u64,
    pub poll_ms: u64,
    pub slots: u8,
    pub quorum_min: u16,
    /// A pull is closed after this long, whatever has arrived.
    pub pull_deadline_ms: u64,
    /// A learner whose record is older is gone: its lease ends.
    pub learner_ttl_ms: u64,
    pub sequence_length: u32,
    pub batch_rows: u32,
    /// Steps in one lease of rows.
    pub lease_steps: u32,
    pub codec_up: Codec,
    pub codec_down: Codec,
    pub release_every_cycles: u32,
    pub inner: InnerOptimizer,
    pub audit: AuditParameters,
    #[serde(default)]
    pub training: TrainingOptions,
}

/// What learners do otherwise than the reference. A replay does the same.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainingOptions {
    /// The token that ends a document: rows are cut behind it, and positions, recurrent states and attention begin anew. `None`: a row is
    /// one sequence.
    #[serde(default)]
    pub document_end: Option<u32>,
    /// Whether `A_log` and `dt_bias` of Quasar branches are trained.
    #[serde(default)]
    pub train_step_sizes: bool,
}

/// What a run is. Immutable: a change is a new run.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct RunManifest {
    pub run: RunId,
    pub name: String,
    pub protocol_min: u16,
    pub protocol_max: u16,
    pub created_ms: u64,
    /// Digest of the fragment plan; the plan lies at the key of that digest.
    pub plan: Digest,
    /// Release that the run starts from, and the BLAKE3 of its manifest's file.
    pub base_release: String,
    pub base_manifest: Digest,
    /// Catalog pages at the start of the run.
    pub catalog: Vec<CatalogRef>,
    pub parameters: RunParameters,
}

/// A catalog page by number and BLAKE3 of its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct CatalogRef {
    pub page: u32,
    pub digest: Digest,
}

/// Most shards of one catalog page.
pub const CATALOG_PAGE_SHARDS: usize = 256;
/// A learner renews its record at the latest after this part of [`RunParameters::learner_ttl_ms`].
pub const RENEWALS_PER_TTL: u64 = 5;

/// A page of shard manifests; pages are only ever added.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct CatalogPage {
    /// Counted from 0.
    pub page: u32,
    /// BLAKE3 of the file of the page before; zero for page 0.
    pub previous: Digest,
    pub shards: Vec<ShardManifest>,
}

impl CatalogPage {
    /// Whether the page can be read again: its payload is within the limit.
    pub fn fits(&self) -> bool {
        codec::encode(self).len() <= Purpose::CatalogPage.limit()
    }

    /// Cuts shards into runs of consecutive ones that a page holds.
    pub fn split(mut shards: &[ShardManifest]) -> Vec<&[ShardManifest]> {
        // What a page takes besides its shards is far below this.
        const FRAME_BYTES: usize = 1 << 10;
        let mut pages = Vec::new();
        while !shards.is_empty() {
            let (mut count, mut bytes) = (0, FRAME_BYTES);
            for shard in shards.iter().take(CATALOG_PAGE_SHARDS) {
                bytes += codec::encode(shard).len();
                if count > 0 && bytes > Purpose::CatalogPage.limit() {
                    break;
                }
                count += 1;
            }
            let (page, rest) = shards.split_at(count);
            pages.push(page);
            shards = rest;
        }
        pages
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::FileRecord;

    #[test]
    fn shards_are_cut_into_pages_that_can_be_read_again() {
        let shard = |id: usize, chunks: usize| ShardManifest {
            id: format!("shard-{id}"),
            rows: 1,
            row_tokens: 1,
            tokens: 1,
            file: FileRecord { chunks: vec![Digest::ZERO; chunks], ..FileRecord::of_bytes("tokens.bin", b"") },
            tokenizer: Digest::ZERO,
            vocab_size: 1,
            licence: "public domain".into(),
            source: "a test".into(),
            held_out: false,
        };
        // 134 M tokens are 512 MiB, 128 chunks: 256 such manifests are more than a megabyte.
        for (chunks, count, pages) in [(1, 600, 3), (128, 300, 2), (20_000, 3, 3), (1, 0, 0)] {
            let shards: Vec<ShardManifest> = (0..count).map(|id| shard(id, chunks)).collect();
            let split = CatalogPage::split(&shards);
            assert_eq!(split.len(), pages, "{count} shards of {chunks} chunks");
            assert_eq!(split.concat(), shards);
            for (page, shards) in split.into_iter().enumerate() {
                assert!(CatalogPage { page: page as u32, previous: Digest::ZERO, shards: shards.to_vec() }.fits());
            }
        }
        let page = CatalogPage { page: 0, previous: Digest::ZERO, shards: vec![shard(0, 40_000)] };
        assert!(!page.fits());
    }

    #[test]
    fn the_learning_rate_warms_up_then_falls_to_its_floor_and_stays_there() {
        let schedule = LrSchedule { warmup_steps: 8, total_steps: 200, final_ppm: 100_000 };
        assert_eq!(schedule.factor(0), 0.125);
        assert_eq!(schedule.factor(7), 1.0);
        assert!((schedule.factor(8) - 1.0).abs() < 1e-12);
        assert!(schedule.factor(100) < 0.7 && schedule.factor(100) > 0.4);
        assert!((schedule.factor(200) - 0.1).abs() < 1e-12);
        assert!((schedule.factor(10_000) - 0.1).abs() < 1e-12);
        let constant = LrSchedule { warmup_steps: 0, total_steps: 0, final_ppm: 0 };
        assert_eq!(constant.factor(5), 1.0);
    }
}
