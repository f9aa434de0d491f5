//! Nouns and rules of a Quasar training run: identities, signed documents, schedule, assignment, verdicts.
//!
//! Pure: no clock, no randomness, no network, no environment. Time comes in as Unix milliseconds.

pub mod audits;
pub mod codec;
pub mod digest;
pub mod documents;
pub mod envelope;
pub mod files;
pub mod grants;
pub mod identity;
pub mod key_map;
pub mod lease;
pub mod ledger;
pub mod log;
pub mod paths;
pub mod plan;
pub mod reason;
pub mod schedule;
pub mod shards;
pub mod steps;

pub use digest::Digest;
pub use files::{CHUNK_BYTES, FileRecord};
pub use grants::{GrantBundle, GrantRequest, Method, SealedBytes};
pub use identity::{AccountId, AddressError, Ed25519Signer, KeyKind, KeyRef, SignatureError, Signer, verify_signature, x25519_public};
pub use key_map::KeyMap;
pub use plan::{DType, FragmentPlan, MergeRule, Slice};
pub use reason::Reason;
pub use shards::ShardManifest;
