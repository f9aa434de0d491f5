//! Taking an extrinsic apart by the metadata, and verifying who signed it.

use std::ops::Range;

use parity_scale_codec::{Compact, Decode, Encode};
use protocol::{AccountId, KeyKind};
use sp_core::Pair as _;
use subxt::ext::frame_decode::extrinsics::{Extrinsic, decode_extrinsic};

use super::runtime::{COMMITMENTS, Runtime, SUBTENSOR};

/// Signed payloads longer than this are hashed before signing.
const PAYLOAD_MAX: usize = 256;
/// Largest extrinsic that is looked at; genuine nodes stop at the block's length limit.
const EXTRINSIC_MAX: usize = 1024 * 1024;

/// Most fields of one commitment (`Commitments.MaxFields`).
const COMMITMENT_FIELDS_MAX: u32 = 3;

/// Why an extrinsic cannot enter a block (`InvalidTransaction` of Substrate).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Invalid {
    /// No extrinsic, or a call that this node does not execute.
    Call,
    Future,
    Stale,
    BadProof,
    Custom(u8),
}

impl Invalid {
    /// SCALE of `Err(TransactionValidityError::Invalid(…))`.
    pub(super) fn encode(self) -> Vec<u8> {
        let mut bytes = vec![1, 0];
        match self {
            Self::Call => bytes.push(0),
            Self::Future => bytes.push(2),
            Self::Stale => bytes.push(3),
            Self::BadProof => bytes.push(4),
            Self::Custom(code) => bytes.extend([7, code]),
        }
        bytes
    }

    /// The text that nodes put into the data of JSON-RPC error 1010.
    pub(super) fn text(self) -> String {
        match self {
            Self::Call => "Transaction call is not expected".to_owned(),
            Self::Future => "Transaction will be valid in the future".to_owned(),
            Self::Stale => "Transaction is outdated".to_owned(),
            Self::BadProof => "Transaction has a bad signature".to_owned(),
            Self::Custom(code) => format!("Custom error: {code}"),
        }
    }
}

/// The calls that the node executes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Call {
    /// Mechanism 0 for the plain call.
    SetWeights {
        netuid: u16,
        mechanism: u8,
        uids: Vec<u16>,
        values: Vec<u16>,
        version_key: u64,
    },
    CommitWeights {
        netuid: u16,
        mechanism: u8,
        commit: Vec<u8>,
        round: u64,
        version: u16,
    },
    /// `info` is SCALE of `CommitmentInfo`; `space` what its fields count against the limit.
    SetCommitment {
        netuid: u16,
        info: Vec<u8>,
        space: u64,
    },
}

/// A signed extrinsic whose signature was verified.
#[derive(Clone, Debug)]
pub(super) struct Signed {
    pub(super) signer: AccountId,
    pub(super) nonce: u64,
    pub(super) call: Call,
}

/// What verification needs of the chain.
pub(super) trait Context {
    fn runtime(&self) -> &Runtime;
    fn genesis(&self) -> [u8; 32];
    /// Number of the block that the extrinsic would go into.
    fn next_number(&self) -> u64;
    fn block_hash(&self, number: u64) -> Option<[u8; 32]>;
}

/// Decodes and verifies a signed extrinsic (with its length prefix). Nonce and weight rules are judged elsewhere.
pub(super) fn open(bytes: &[u8], context: &impl Context) -> Result<Signed, Invalid> {
    if bytes.len() > EXTRINSIC_MAX {
        return Err(Invalid::Call);
    }
    let runtime = context.runtime();
    let cursor = &mut &*bytes;
    let extrinsic = decode_extrinsic(cursor, runtime.metadata(), runtime.metadata().types()).map_err(|_| Invalid::Call)?;
    if !cursor.is_empty() {
        return Err(Invalid::Call);
    }
    let (Some(signature), Some(extensions)) = (extrinsic.signature_payload(), extrinsic.transaction_extension_payload()) else {
        return Err(Invalid::Call);
    };
    let Some(signer) = account(&bytes[signature.address_range()]) else { return Err(Invalid::BadProof) };

    let extension = |name: &str| extensions.iter().find(|extension| extension.name() == name).map(|extension| &bytes[extension.range()]);
    let era = extension("CheckMortality").ok_or(Invalid::Call)?;
    let nonce = extension("CheckNonce").ok_or(Invalid::Call)?;
    let nonce = Compact::<u32>::decode(&mut &*nonce).map_err(|_| Invalid::Call)?.0;
    // A checked metadata hash would need the hash of our metadata; nobody signs it by default.
    if extension("CheckMetadataHash") != Some(&[0]) {
        return Err(Invalid::BadProof);
    }
    let birth = birth_block(era, context.next_number()).and_then(|birth| match birth {
        Birth::Immortal => Some(context.genesis()),
        Birth::Block(number) => context.block_hash(number),
    });
    let Some(birth) = birth else { return Err(Invalid::BadProof) };

    let mut payload = bytes[call_range(&extrinsic, bytes.len())].to_vec();
    payload.extend_from_slice(&bytes[extensions.range()]);
    (runtime.spec_version, runtime.transaction_version, context.genesis(), birth, 0u8).encode_to(&mut payload);
    if payload.len() > PAYLOAD_MAX {
        payload = sp_crypto_hashing::blake2_256(&payload).to_vec();
    }
    if !verify(&signer, &bytes[signature.signature_range()], &payload) {
        return Err(Invalid::BadProof);
    }
    let call = call(&extrinsic, bytes).ok_or(Invalid::Call)?;
    Ok(Signed { signer, nonce: u64::from(nonce), call })
}

/// The account of a `MultiAddress::Id`.
fn account(address: &[u8]) -> Option<AccountId> {
    match address.split_first() {
        Some((0, rest)) => rest.try_into().ok().map(AccountId),
        _ => None,
    }
}

/// Pallet index, call index and arguments: the end of the extrinsic.
fn call_range(extrinsic: &Extrinsic<'_, u32>, length: usize) -> Range<usize> {
    extrinsic.call_data_range().start..length
}

enum Birth {
    Immortal,
    Block(u64),
}

/// The block whose hash an era binds to: `00` is immortal, else two bytes give period and phase.
fn birth_block(era: &[u8], current: u64) -> Option<Birth> {
    match *era {
        [0] => Some(Birth::Immortal),
        [first, second] => {
            let era = u64::from(u16::from_le_bytes([first, second]));
            let period = 2u64 << (era % 16);
            let phase = (era >> 4) * (period >> 12).max(1);
            if period < 4 || phase >= period {
                return None;
            }
            Some(Birth::Block((current.max(phase) - phase) / period * period + phase))
        }
        _ => None,
    }
}

/// Verifies a SCALE `MultiSignature` of either kind.
fn verify(signer: &AccountId, signature: &[u8], payload: &[u8]) -> bool {
    let Some((kind, signature)) = signature.split_first() else { return false };
    let Ok(signature) = <[u8; 64]>::try_from(signature) else { return false };
    if *kind == KeyKind::Ed25519 as u8 {
        sp_core::ed25519::Pair::verify(&signature.into(), payload, &signer.0.into())
    } else if *kind == KeyKind::Sr25519 as u8 {
        sp_core::sr25519::Pair::verify(&signature.into(), payload, &signer.0.into())
    } else {
        false
    }
}

fn call(extrinsic: &Extrinsic<'_, u32>, bytes: &[u8]) -> Option<Call> {
    fn argument<T: Decode>(extrinsic: &Extrinsic<'_, u32>, bytes: &[u8], name: &str) -> Option<T> {
        let found = extrinsic.call_data().find(|argument| argument.name() == name)?;
        T::decode(&mut &bytes[found.range()]).ok()
    }
    match (extrinsic.pallet_name(), extrinsic.call_name()) {
        (SUBTENSOR, name @ ("set_weights" | "set_mechanism_weights")) => Some(Call::SetWeights {
            netuid: argument(extrinsic, bytes, "netuid")?,
            mechanism: if name == "set_weights" { 0 } else { argument(extrinsic, bytes, "mecid")? },
            uids: argument(extrinsic, bytes, "dests")?,
            values: argument(extrinsic, bytes, "weights")?,
            version_key: argument(extrinsic, bytes, "version_key")?,
        }),
        (SUBTENSOR, name @ ("commit_timelocked_weights" | "commit_timelocked_mechanism_weights")) => Some(Call::CommitWeights {
            netuid: argument(extrinsic, bytes, "netuid")?,
            mechanism: if name == "commit_timelocked_weights" { 0 } else { argument(extrinsic, bytes, "mecid")? },
            commit: argument(extrinsic, bytes, "commit")?,
            round: argument(extrinsic, bytes, "reveal_round")?,
            version: argument(extrinsic, bytes, "commit_reveal_version")?,
        }),
        (COMMITMENTS, "set_commitment") => {
            let found = extrinsic.call_data().find(|argument| argument.name() == "info")?;
            let info = &bytes[found.range()];
            Some(Call::SetCommitment { netuid: argument(extrinsic, bytes, "netuid")?, info: info.to_vec(), space: space(info)? })
        }
        _ => None,
    }
}

/// Bytes that the fields of a `CommitmentInfo` carry; `None` for timelocked fields and flags, which the node does not execute.
fn space(mut info: &[u8]) -> Option<u64> {
    let fields = Compact::<u32>::decode(&mut info).ok()?.0;
    if fields > COMMITMENT_FIELDS_MAX {
        return None;
    }
    let mut space = 0;
    for _ in 0..fields {
        let length = match u8::decode(&mut info).ok()? {
            0 => 0,
            tag @ 1..=129 => usize::from(tag) - 1,
            130..=133 => 32,
            136 => Compact::<u32>::decode(&mut info).ok()?.0 as usize,
            _ => return None,
        };
        info = info.get(length..)?;
        space += length as u64;
    }
    info.is_empty().then_some(space)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_era_binds_to_the_last_block_of_its_phase() {
        let birth = |era: [u8; 2], current| match birth_block(&era, current) {
            Some(Birth::Block(number)) => number,
            _ => panic!("mortal"),
        };
        // Period 64, phase 2: the recorded payload of block 66.
        assert_eq!(birth([0x25, 0x00], 66), 66);
        assert_eq!(birth([0x25, 0x00], 129), 66);
        assert_eq!(birth([0x25, 0x00], 130), 130);
        assert_eq!(birth([0x26, 0x04], 67), 66);
        assert!(matches!(birth_block(&[0], 5), Some(Birth::Immortal)));
        assert!(birth_block(&[0x41, 0x00], 5).is_none(), "phase 4 of period 4");
        assert!(birth_block(&[0x10, 0x00], 5).is_none(), "period 2");
        assert!(birth_block(&[], 5).is_none());
    }

    #[test]
    fn the_space_of_a_commitment_is_that_of_its_bytes() {
        assert_eq!(space(&[4, 4, b'a', b'b', b'c']), Some(3));
        assert_eq!(space(&[8, 1, 136, 8, 1, 2]), Some(2));
        assert_eq!(space(&[4, 4, b'a', b'b']), None, "truncated");
        assert_eq!(space(&[4, 4, b'a', b'b', b'c', b'd']), None, "too long");
        assert_eq!(space(&[4, 134, 0, 0]), None, "timelocked");
    }
}
