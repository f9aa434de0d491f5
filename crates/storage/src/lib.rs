//! Bytes in buckets: stores, presigned grants, sealing, resumable transfers.
//!
//! The pieces, from the inside out:
//!
//! - [`ObjectStore`] is what the holder of the bucket's credentials sees (the orchestrator): [`S3Store`] over any S3 endpoint,
//!   [`MemoryStore`] for simulations.
//! - [`client`] is what everybody else sees: [`GrantClient`](client::GrantClient) redeems presigned requests,
//!   [`PublicReader`](client::PublicReader) reads what the world may read.
//! - [`bundle`] seals grants to a hotkey, [`roots`] lead from the owner to the key that signs, [`discovery`] finds the active run and
//!   follows it.
//! - [`transfer`] downloads large files in verified chunks and goes on where it stopped.
//! - [`seal`] encrypts grant bundles to one hotkey.
//! - [`server`] is a small S3 server for one bucket, in memory or on disk, for tests and for the devnet; it can be told to misbehave.
//! - [`check`] asks a store whether it keeps the promises that the protocol relies on.
//!
//! Rules that hold everywhere: an ETag is opaque and never a content hash; a presigned URL is a secret and appears in no log, error or
//! `Debug` output; bodies are read up to a limit that the caller names; only [`policy`] knows time-outs and retries.

mod blobs;
pub mod bundle;
pub mod check;
pub mod client;
pub mod discovery;
mod error;
pub mod key;
pub mod memory;
mod object;
pub mod policy;
pub mod presign;
pub mod roots;
pub mod s3;
pub mod seal;
pub mod seal_stream;
pub mod server;
pub mod transfer;
mod upload;

pub use error::StoreError;
pub use memory::{MemoryGrants, MemoryStore};
pub use object::{Object, ObjectMeta, ObjectStore, Presign, PutCondition};
pub use s3::{S3Settings, S3Store};
