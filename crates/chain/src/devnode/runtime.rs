//! The genuine metadata of subtensor spec 461: what calls, storage entries, events and errors are called and how they are encoded.
//!
//! An upgraded runtime is the same one with a later version and other numbers for its pallets' errors, which is what moved
//! between genuine versions.

use parity_scale_codec::{Decode, Encode};
use scale_info::TypeDef;
use subxt::Metadata;
use subxt::ext::frame_decode::storage::{IntoEncodableValues, encode_storage_key};
use subxt::ext::frame_metadata::v15::RuntimeMetadataV15;
use subxt::ext::frame_metadata::{RuntimeMetadata, RuntimeMetadataPrefixed};

/// V15 metadata; origin and licence in `data/README.md`.
pub(super) const METADATA: &[u8] = include_bytes!("../../data/subtensor-461-v15.scale");
const METADATA_VERSION: u32 = 15;
/// A version of metadata that nobody has defined yet.
const FUTURE_VERSION: u8 = 99;

/// A storage entry, by the names of its pallet and its own.
pub type Entry = (&'static str, &'static str);

pub(super) const SYSTEM: &str = "System";
pub(super) const SUBTENSOR: &str = "SubtensorModule";
pub(super) const COMMITMENTS: &str = "Commitments";
pub(super) const DRAND: &str = "Drand";

/// The metadata, and what is looked up in it. Names given to its functions are constants of this module tree: one that the
/// metadata lacks is a mistake of ours, not of a caller, and panics.
pub(super) struct Runtime {
    metadata: Metadata,
    /// SCALE of the prefixed metadata.
    bytes: Vec<u8>,
    /// What `Metadata_metadata_at_version` answers instead, and for which version.
    described: Option<(u32, Vec<u8>)>,
    pub(super) spec_version: u32,
    pub(super) transaction_version: u32,
    /// SCALE of `RuntimeVersion`, as `Core_version` answers it.
    pub(super) version: Vec<u8>,
    /// The runtime APIs and their versions.
    pub(super) apis: Vec<([u8; 8], u32)>,
}

/// `RuntimeVersion`.
#[derive(Encode, Decode)]
struct Version {
    spec_name: String,
    impl_name: String,
    authoring_version: u32,
    spec_version: u32,
    impl_version: u32,
    apis: Vec<([u8; 8], u32)>,
    transaction_version: u32,
    system_version: u8,
}

impl Runtime {
    /// The genuine runtime, with the time between blocks that this chain has.
    pub(super) fn load(block_ms: Option<u64>) -> Self {
        match block_ms {
            None => Self::of(METADATA.to_vec()),
            Some(block_ms) => Self::of(edit(METADATA, |metadata| {
                *constant(metadata, "Aura", "SlotDuration") = block_ms.encode();
            })),
        }
    }

    /// The next runtime: a later version, in which each error of our pallets has the number of another one.
    pub(super) fn upgraded(&self) -> Self {
        Self::of(edit(&self.bytes, |metadata| {
            let bytes = constant(metadata, SYSTEM, "Version");
            let mut version = Version::decode(&mut bytes.as_slice()).expect("the version is a RuntimeVersion");
            version.spec_version += 1;
            *bytes = version.encode();
            for name in [SUBTENSOR, COMMITMENTS] {
                let pallet = metadata.pallets.iter().find(|pallet| pallet.name == name).expect("the pallet exists");
                let errors = pallet.error.as_ref().expect("the pallet has errors").ty.id as usize;
                if let TypeDef::Variant(errors) = &mut metadata.types.types[errors].ty.type_def {
                    let mut numbers: Vec<u8> = errors.variants.iter().map(|variant| variant.index).collect();
                    numbers.rotate_left(1);
                    errors.variants.iter_mut().zip(numbers).for_each(|(variant, number)| variant.index = number);
                }
            }
        }))
    }

    /// A later runtime that describes itself in a version of metadata which clients of today do not know.
    pub(super) fn outgrown(&self) -> Self {
        let upgraded = self.upgraded();
        let mut bytes = upgraded.bytes.clone();
        // Behind the four bytes by which metadata is recognised.
        bytes[4] = FUTURE_VERSION;
        Self { described: Some((u32::from(FUTURE_VERSION), bytes)), ..upgraded }
    }

    /// A later runtime that says nothing of these storage entries. The node itself goes on with them.
    pub(super) fn without(&self, entries: &[Entry]) -> Self {
        let upgraded = self.upgraded();
        let bytes = edit(&upgraded.bytes, |metadata| {
            for (pallet, entry) in entries {
                let pallet = metadata.pallets.iter_mut().find(|found| found.name == *pallet);
                let storage = pallet.and_then(|pallet| pallet.storage.as_mut()).unwrap_or_else(|| panic!("no storage around {entry}"));
                storage.entries.retain(|found| found.name != *entry);
            }
        });
        Self { described: Some((METADATA_VERSION, bytes)), ..upgraded }
    }

    fn of(bytes: Vec<u8>) -> Self {
        let metadata = Metadata::decode_from(&bytes).expect("the metadata in this crate is complete");
        let version = metadata
            .pallet_by_name(SYSTEM)
            .and_then(|pallet| pallet.constant_by_name("Version"))
            .expect("the metadata names its version")
            .value()
            .to_vec();
        let decoded = Version::decode(&mut version.as_slice()).expect("the version is a RuntimeVersion");
        Self {
            metadata,
            bytes,
            described: None,
            spec_version: decoded.spec_version,
            transaction_version: decoded.transaction_version,
            version,
            apis: decoded.apis,
        }
    }

    /// The version of metadata that the node offers.
    pub(super) fn offered_version(&self) -> u32 {
        self.described.as_ref().map_or(METADATA_VERSION, |(version, _)| *version)
    }

    /// Metadata as the node gives it out.
    pub(super) fn offered(&self) -> &[u8] {
        self.described.as_ref().map_or(&self.bytes, |(_, bytes)| bytes)
    }

    /// SCALE of the prefixed metadata.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
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

/// The metadata with a change.
fn edit(bytes: &[u8], change: impl FnOnce(&mut RuntimeMetadataV15)) -> Vec<u8> {
    let mut prefixed = RuntimeMetadataPrefixed::decode(&mut &*bytes).expect("the metadata in this crate is complete");
    let RuntimeMetadata::V15(metadata) = &mut prefixed.1 else { panic!("the metadata in this crate is V15") };
    change(metadata);
    prefixed.encode()
}

fn constant<'a>(metadata: &'a mut RuntimeMetadataV15, pallet: &str, name: &str) -> &'a mut Vec<u8> {
    let pallet = metadata.pallets.iter_mut().find(|found| found.name == pallet).unwrap_or_else(|| panic!("no pallet {pallet}"));
    let constant = pallet.constants.iter_mut().find(|constant| constant.name == name);
    &mut constant.unwrap_or_else(|| panic!("no constant {name}")).value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_that_was_read_and_written_is_the_same() {
        assert_eq!(edit(METADATA, |_| {}), METADATA);
    }

    #[test]
    fn an_upgraded_runtime_has_a_later_version_and_other_error_numbers_under_the_same_names() {
        let old = Runtime::load(Some(12_000));
        let new = old.upgraded();
        assert_eq!((new.spec_version, new.transaction_version), (old.spec_version + 1, old.transaction_version));
        for (pallet, name) in
            [(SUBTENSOR, "NeuronNoValidatorPermit"), (SUBTENSOR, "SettingWeightsTooFast"), (COMMITMENTS, "SpaceLimitExceeded")]
        {
            assert_ne!(old.module_error(pallet, name).unwrap(), new.module_error(pallet, name).unwrap(), "{name}");
        }
        assert_eq!(old.key(SUBTENSOR, "Weights", (1u16, 2u16)), new.key(SUBTENSOR, "Weights", (1u16, 2u16)));
    }
}
