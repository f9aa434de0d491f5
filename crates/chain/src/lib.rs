//! Bittensor from Rust: metagraph, weights, commitments, block hashes, wallet files, and a loopback development node.
//!
//! The rest of the system sees the [`Chain`] trait. [`SubtensorClient`] implements it over JSON-RPC with the metadata of the
//! node that it talks to (calls and storage by name, errors by name), [`MemoryChain`] implements it in memory for the simulation;
//! both pass one conformance test. [`devnode::DevNode`] is a node for development networks and tests: it checks real signatures and
//! applies the chain's weight rules over the genuine metadata of subtensor spec 461, so that daemons take the same path there
//! as on a public network.
//!
//! This crate knows hotkeys, uids, weights, blocks and commitments, and nothing of training.

pub mod certificate;
pub mod chain;
#[cfg(feature = "devnode")]
pub mod devnode;
pub mod drand;
pub mod epoch;
pub mod error;
pub mod health;
pub mod hotkey;
pub mod identity;
pub mod link;
pub mod memory;
pub mod rules;
pub mod setter;
pub mod subtensor;
pub mod timelock;
pub mod types;
pub mod view;
pub mod wallet;
pub mod weights;

pub use certificate::KeyCertificate;
pub use chain::Chain;
pub use error::{ChainError, SetWeightsError, WeightsRefusal};
pub use health::ChainHealth;
pub use hotkey::Hotkey;
pub use link::ChainLink;
pub use memory::{MemoryChain, MemorySettings};
pub use setter::{Setter, SetterSettings};
pub use subtensor::{ConnectSettings, Deadlines, FINNEY_ENDPOINTS, FINNEY_GENESIS, SubtensorClient, TEST_ENDPOINTS, TEST_GENESIS};
pub use types::{BlockRef, Hyperparameter, Hyperparameters, Metagraph, Neuron, Registration};
pub use view::{How, Landed, PendingCommit, Progress, WeightsRequest, WeightsView};
pub use wallet::{Password, Wallet, WalletError};

/// Longest commitment in bytes (`BigRaw` field of the commitments pallet).
pub const COMMITMENT_MAX: usize = 512;

/// Nodes that are no archives keep the states of so many blocks, at the least.
pub const STATE_BLOCKS: u64 = 240;
