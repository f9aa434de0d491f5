//! What stands for tensors here: digests that depend on everything that the tensors would depend on.
//!
//! A learner's state is a hash over its start, every step and every version that it applied; a payload is a hash over that state
//! and its base; a fragment's state is a hash over its last state and all that was merged into it. So two histories that differ
//! anywhere give different bytes, and an audit can replay a segment.

use std::collections::BTreeMap;

use bytes::Bytes;
use protocol::documents::{OpenedStep, Tape};
use protocol::steps::Exchange;
use protocol::{Digest, FileRecord, ShardManifest, codec};

/// Bytes of an encoded payload.
pub const PAYLOAD_BYTES: usize = 64;
const STATE_BYTES_MAX: usize = 1 << 16;

/// Rows of a shard that is large, as nearly all are.
pub const SHARD_ROWS: u64 = 20_000;

/// A shard of so many training rows.
pub fn shard(id: &str, rows: u64) -> ShardManifest {
    ShardManifest {
        id: id.to_owned(),
        rows,
        row_tokens: 128,
        tokens: rows * 128,
        file: FileRecord::of_bytes("tokens.bin", b"tokens"),
        tokenizer: Digest::ZERO,
        vocab_size: 4_096,
        licence: "public domain".into(),
        source: "simulation".into(),
        held_out: false,
    }
}

/// The f32 state of a fragment's version 0.
pub fn first_state(fragment: u16) -> Digest {
    Digest::derive("quasar simulation fragment", &[&fragment.to_le_bytes()])
}

/// The state after the merge that `tape` fixes.
pub fn merged(base: &Digest, tape: &Tape) -> Digest {
    let mut inputs = Vec::new();
    for input in &tape.inputs {
        inputs.extend_from_slice(&input.payload.0);
        inputs.extend_from_slice(&input.weight_ppm.to_le_bytes());
    }
    Digest::derive("quasar simulation merge", &[&base.0, &tape.t.to_le_bytes(), &[u8::from(tape.closing)], &inputs])
}

pub fn state_bytes(state: &Digest) -> Bytes {
    Bytes::copy_from_slice(&state.0)
}

/// The keyframe of a version, from its state.
pub fn keyframe_bytes(fragment: u16, version: u64, state: &Digest) -> Bytes {
    Bytes::copy_from_slice(&Digest::derive("quasar simulation keyframe", &[&fragment.to_le_bytes(), &version.to_le_bytes(), &state.0]).0)
}

/// A learner's weights and moments: one digest for each fragment, and one over all steps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Weights {
    core: Digest,
    fragments: Vec<Digest>,
    /// What was exported since a version was applied, as it was then.
    exported: BTreeMap<u16, Digest>,
}

impl Weights {
    pub fn fresh(fragments: u16) -> Self {
        let core = Digest::derive("quasar simulation learner", &[]);
        Self { core, fragments: vec![core; usize::from(fragments)], exported: BTreeMap::new() }
    }

    /// The fragment becomes that version, with what was trained since its last export on top.
    pub fn apply(&mut self, fragment: u16, keyframe: &[u8]) {
        let version = Digest::blake3(keyframe);
        let own = &mut self.fragments[usize::from(fragment)];
        *own = match self.exported.remove(&fragment) {
            Some(exported) if exported != *own => Digest::derive("quasar simulation carry", &[&version.0, &exported.0, &own.0]),
            _ => version,
        };
    }

    pub fn step(&mut self, lease: u64, lease_step: u32) {
        let mut all = Vec::with_capacity(self.fragments.len() * 32);
        self.fragments.iter().for_each(|fragment| all.extend_from_slice(&fragment.0));
        self.core = Digest::derive("quasar simulation step", &[&self.core.0, &all, &lease.to_le_bytes(), &lease_step.to_le_bytes()]);
        for fragment in &mut self.fragments {
            let mut both = [0; 64];
            both[..32].copy_from_slice(&fragment.0);
            both[32..].copy_from_slice(&self.core.0);
            *fragment = Digest::blake3(&both);
        }
    }

    /// Mean loss of the step that comes next, in micro-nats.
    pub fn loss(&self) -> i64 {
        6_000_000 + i64::from(self.core.0[0]) * 1_000
    }

    /// The fragment's change against a base version, encoded.
    pub fn export(&mut self, fragment: u16, base_version: u64, keyframe: &[u8]) -> Bytes {
        let own = self.fragments[usize::from(fragment)];
        self.exported.insert(fragment, own);
        payload(fragment, base_version, &Digest::derive("quasar simulation payload", &[&own.0, keyframe]))
    }

    /// Goes on from here in another session, or after a fault: what was exported counts as answered.
    pub fn restored(mut self) -> Self {
        self.exported.clear();
        self
    }

    pub fn to_bytes(&self) -> Bytes {
        Bytes::from(codec::encode(&(self.core, self.fragments.clone(), self.exported.iter().map(|(f, d)| (*f, *d)).collect::<Vec<_>>())))
    }

    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (core, fragments, exported): (Digest, Vec<Digest>, Vec<(u16, Digest)>) = codec::decode(bytes, STATE_BYTES_MAX).ok()?;
        Some(Self { core, fragments, exported: exported.into_iter().collect() })
    }

    pub fn digest(&self) -> Digest {
        Digest::blake3(&self.to_bytes())
    }
}

/// A payload with this content.
pub fn payload(fragment: u16, base_version: u64, content: &Digest) -> Bytes {
    let mut bytes = vec![0; PAYLOAD_BYTES];
    bytes[..2].copy_from_slice(&fragment.to_le_bytes());
    bytes[2..10].copy_from_slice(&base_version.to_le_bytes());
    bytes[10..42].copy_from_slice(&content.0);
    Bytes::from(bytes)
}

/// Whether a payload's header is the one that its commitment names.
pub fn is_payload_of(bytes: &[u8], fragment: u16, base_version: u64) -> bool {
    bytes.len() == PAYLOAD_BYTES && bytes[..2] == fragment.to_le_bytes() && bytes[2..10] == base_version.to_le_bytes()
}

/// Trains an opened segment once more and gives the payload that comes out.
pub fn replay(
    mut weights: Weights,
    steps: &[OpenedStep],
    fragment: u16,
    base_version: u64,
    mut keyframe: impl FnMut(u16, u64) -> Option<Bytes>,
) -> Option<Bytes> {
    for (index, step) in steps.iter().enumerate() {
        let exchanged: Vec<Exchange> =
            if index == 0 { Exchange::after_state(&step.exchanged).copied().collect() } else { step.exchanged.clone() };
        for exchange in exchanged {
            match exchange {
                Exchange::Exported { fragment } => drop(weights.export(fragment, 0, &[])),
                Exchange::Applied { fragment, version } => weights.apply(fragment, &keyframe(fragment, version)?),
            }
        }
        weights.step(step.lease, step.lease_step);
    }
    Some(weights.export(fragment, base_version, &keyframe(fragment, base_version)?))
}
