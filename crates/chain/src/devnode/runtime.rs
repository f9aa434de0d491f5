//! The genuine metadata of subtensor spec 461: what calls, storage entries, events and errors are called and how they are encoded.

use parity_scale_codec::{Decode, Encode};
use subxt::Metadata;
use subxt::ext::frame_decode::storage::{IntoEncodableValues, encode_storage_key};

/// V15 metadata; origin and licence in `data/README.md`.
pub(super) const METADATA: &[u8] = include_bytes!("../../data/subtensor-461-v15.scale");
pub(super) const METADATA_VERSION: u32 = 15;

pub(super) const SYSTEM: &str = "System";
pub(super) const SUBTENSOR: &str = "SubtensorModule";
pub(super) const COMMITMENTS: &str = "Commitments";

/// The metadata, and what is looked up in it. Names given to its functions are constants of this module tree: one that the
/// metadata lacks is a mistake of ours, not of a caller, and panics.
pub(super) struct Runtime {
    metadata: Metadata,
    pub(super) spec_version: u32,
    pub(super) transaction_version: u32,
    /// SCALE of `RuntimeVersion`, as `Core_version` answers it.
    pub(super) version: Vec<u8>,
}

/// `RuntimeVersion`, as far as it is needed.
#[derive(Decode)]
struct Version {
    _spec_name: String,
    _impl_name: String,
    _authoring_version: u32,
    spec_version: u32,
    _impl_version: u32,
    _apis: Vec<([u8; 8], u32)>,
    transaction_version: u32,
}

impl Runtime {
    pub(super) fn load() -> Self {
        let metadata = Metadata::decode_from(METADATA).expect("the metadata in this crate is complete");
        let version = metadata
            .pallet_by_name(SYSTEM)
            .and_then(|pallet| pallet.constant_by_name("Version"))
            .expect("the metadata names its version")
            .value()
            .to_vec();
        let decoded = Version::decode(&mut version.as_slice()).expect("the version is a RuntimeVersion");
        Self { metadata, spec_version: decoded.spec_version, transaction_version: decoded.transaction_version, version }
    }

    pub(super) fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The storage key of an entry. `keys` is a tuple with one value for each key part.
    pub(super) fn key(&self, pallet: &str, entry: &str, keys: impl IntoEncodableValues) -> Vec<u8> {
        encode_storage_key(pallet, entry, keys, &self.metadata, self.metadata.types())
            .unwrap_or_else(|error| panic!("storage entry {pallet}.{entry}: {error}"))
    }

    /// The bytes that a node returns for an unset key of the entry; `None` where the entry is optional.
    pub(super) fn default_value(&self, pallet: &str, entry: &str) -> Option<&[u8]> {
        self.metadata
            .pallet_by_name(pallet)
            .and_then(|pallet| pallet.storage())
            .and_then(|storage| storage.entry_by_name(entry))
            .unwrap_or_else(|| panic!("no storage entry {pallet}.{entry}"))
            .default_value()
    }

    /// SCALE of `RuntimeEvent`: pallet index, event index, fields.
    pub(super) fn event(&self, pallet: &str, name: &str, fields: impl Encode) -> Vec<u8> {
        let found = self.metadata.pallet_by_name(pallet).unwrap_or_else(|| panic!("no pallet {pallet}"));
        let variant = found
            .event_variants()
            .and_then(|variants| variants.iter().find(|variant| variant.name == name))
            .unwrap_or_else(|| panic!("no event {pallet}.{name}"));
        let mut bytes = vec![found.event_index(), variant.index];
        fields.encode_to(&mut bytes);
        bytes
    }

    /// SCALE of `DispatchError::Module` for an error of a pallet; `None` where the pallet has no error of that name.
    pub(super) fn module_error(&self, pallet: &str, name: &str) -> Option<Vec<u8>> {
        const MODULE_ERROR: u8 = 3;
        let found = self.metadata.pallet_by_name(pallet)?;
        let variant = found.error_variants()?.iter().find(|variant| variant.name == name)?;
        Some(vec![MODULE_ERROR, found.error_index(), variant.index, 0, 0, 0])
    }
}
