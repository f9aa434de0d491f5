//! Envelopes: how every control document is signed, and in which order it is checked (`docs/protocol.md`, envelopes).
//!
//! A `.qsr` file is `bincode(Envelope) ‖ signature[64]`. The signature covers
//! `"quasar-envelope-v1" ‖ 0x00 ‖ le32(purpose) ‖ le64(len) ‖ bincode(Envelope)`, the very bytes that were received.

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

use crate::codec::{self, CodecError};
use crate::{AccountId, Digest, KeyRef, SignatureError, Signer, verify_signature};

/// Version of the envelope format and of the documents in it.
pub const PROTOCOL_VERSION: u16 = 1;
/// Clocks may differ by this much before a document counts as issued in the future.
pub const SKEW_MS: u64 = 60_000;
const SIGNATURE_BYTES: usize = 64;
const DOMAIN: &[u8] = b"quasar-envelope-v1\0";
/// Bytes that an envelope adds to its payload, rounded up.
const ENVELOPE_OVERHEAD: usize = 256;

/// Sixteen random bytes that name a run; all zero outside any run.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Encode, Decode)]
pub struct RunId(pub [u8; 16]);

impl RunId {
    pub const NONE: Self = Self([0; 16]);
}

impl std::fmt::Display for RunId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl std::fmt::Debug for RunId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

impl std::str::FromStr for RunId {
    type Err = hex::FromHexError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut bytes = [0; 16];
        hex::decode_to_slice(text, &mut bytes)?;
        Ok(Self(bytes))
    }
}

impl Serialize for RunId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() { serializer.collect_str(self) } else { self.0.serialize(serializer) }
    }
}

impl<'de> Deserialize<'de> for RunId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
        } else {
            <[u8; 16]>::deserialize(deserializer).map(Self)
        }
    }
}

/// What a document is for. A signature for one purpose is worthless for any other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    RunRoot = 1,
    CurrentRun = 2,
    RunManifest = 3,
    Head = 4,
    Plan = 5,
    CatalogPage = 6,
    Job = 7,
    StandingGrants = 8,
    PullGrants = 9,
    Progress = 10,
    Receipt = 11,
    OpeningManifest = 12,
    FragmentManifest = 13,
    MergeManifest = 14,
    Release = 15,
    LogHead = 16,
    AuditOrder = 17,
    VerdictCommit = 18,
    VerdictReveal = 19,
    Scores = 20,
    ShardManifest = 21,
    Tape = 22,
    WriterLease = 23,
    Order = 24,
    Equivocation = 25,
    LeaseEnd = 26,
    AuditDraw = 27,
}

impl Purpose {
    pub const ALL: [Self; 27] = [
        Self::RunRoot,
        Self::CurrentRun,
        Self::RunManifest,
        Self::Head,
        Self::Plan,
        Self::CatalogPage,
        Self::Job,
        Self::StandingGrants,
        Self::PullGrants,
        Self::Progress,
        Self::Receipt,
        Self::OpeningManifest,
        Self::FragmentManifest,
        Self::MergeManifest,
        Self::Release,
        Self::LogHead,
        Self::AuditOrder,
        Self::VerdictCommit,
        Self::VerdictReveal,
        Self::Scores,
        Self::ShardManifest,
        Self::Tape,
        Self::WriterLease,
        Self::Order,
        Self::Equivocation,
        Self::LeaseEnd,
        Self::AuditDraw,
    ];

    pub fn from_number(number: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|purpose| *purpose as u16 == number)
    }

    /// Largest file of this purpose in bytes, envelope and all.
    pub const fn file_limit(self) -> u64 {
        // What everybody sees of a learner has one exact size.
        let envelope = if matches!(self, Self::Progress) { 0 } else { ENVELOPE_OVERHEAD };
        (self.limit() + envelope) as u64
    }

    /// Largest payload of this purpose in bytes.
    pub const fn limit(self) -> usize {
        match self {
            Self::Progress => 4096,
            Self::LogHead | Self::WriterLease => 4 << 10,
            Self::CurrentRun => 16 << 10,
            Self::RunManifest | Self::Head => 256 << 10,
            // Two of the largest documents that change, and the key that they were read from.
            Self::Equivocation => (2 << 20) + (4 << 10),
            Self::CatalogPage
            | Self::Job
            | Self::StandingGrants
            | Self::PullGrants
            | Self::MergeManifest
            | Self::Release
            | Self::ShardManifest
            | Self::Tape => 1 << 20,
            Self::Plan | Self::AuditOrder => 4 << 20,
            Self::RunRoot
            | Self::Receipt
            | Self::OpeningManifest
            | Self::FragmentManifest
            | Self::Order
            | Self::VerdictCommit
            | Self::VerdictReveal
            | Self::Scores
            | Self::LeaseEnd
            | Self::AuditDraw => 64 << 10,
        }
    }

    /// How long a document of this purpose lives; `None` for ever.
    pub const fn lifetime_ms(self) -> Option<u64> {
        const MINUTE: u64 = 60_000;
        match self {
            Self::CurrentRun | Self::Progress => Some(10 * MINUTE),
            Self::Head => Some(5 * MINUTE),
            Self::StandingGrants => Some(60 * MINUTE),
            Self::PullGrants => Some(15 * MINUTE),
            _ => None,
        }
    }
}

/// Everything of an envelope but its payload.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct Header {
    pub version: u16,
    pub purpose: u16,
    #[serde(with = "hex::serde")]
    pub genesis: [u8; 32],
    pub netuid: u16,
    pub run: RunId,
    pub signer: KeyRef,
    pub sequence: u64,
    pub issued_ms: u64,
    /// 0 = never.
    pub expires_ms: u64,
}

impl Header {
    /// BLAKE3 of the encoded header: the additional data of what is sealed inside.
    pub fn digest(&self) -> Digest {
        Digest::blake3(&codec::encode(self))
    }

    /// Whether it was signed just now, by a clock that shows `now_ms`: else that clock or the signer's is wrong, or the document is old.
    pub fn is_current(&self, now_ms: u64) -> bool {
        self.issued_ms.abs_diff(now_ms) <= SKEW_MS
    }
}

/// The signed unit.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Envelope {
    pub header: Header,
    pub payload: Vec<u8>,
}

/// Network, subnet and run that a document belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Context {
    #[serde(with = "hex::serde")]
    pub genesis: [u8; 32],
    pub netuid: u16,
    pub run: RunId,
}

impl Context {
    /// The same network and subnet outside any run.
    pub fn without_run(&self) -> Self {
        Self { run: RunId::NONE, ..*self }
    }

    /// HPKE `info` for bundles of `purpose`: purpose ‖ genesis ‖ netuid ‖ run.
    pub fn seal_info(&self, purpose: Purpose) -> Vec<u8> {
        let mut info = (purpose as u16).to_le_bytes().to_vec();
        info.extend_from_slice(&self.genesis);
        info.extend_from_slice(&self.netuid.to_le_bytes());
        info.extend_from_slice(&self.run.0);
        info
    }

    /// HPKE `info` for part `part` of the opening for `audit`: that of opening manifests ‖ audit ‖ part.
    pub fn opening_info(&self, audit: &Digest, part: u8) -> Vec<u8> {
        let mut info = self.seal_info(Purpose::OpeningManifest);
        info.extend_from_slice(&audit.0);
        info.push(part);
        info
    }
}

/// A typed document with its purpose.
pub trait Document: Encode + Decode<()> + Serialize {
    const PURPOSE: Purpose;
}

/// Who may have signed.
#[derive(Clone, Copy, Debug)]
pub enum Expect<'a> {
    /// Exactly this key.
    Key(&'a KeyRef),
    /// This account, under either kind of key.
    Account(&'a AccountId),
    /// One of these keys, newest first: for documents that were signed before a key was rotated, and that a digest or their
    /// write-once key ties down.
    Any(&'a [KeyRef]),
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EnvelopeError {
    #[error("the file is {got} bytes, a {purpose:?} document has at most {limit}\nhint: it is not what its key says; fetch it again")]
    Size { purpose: Purpose, got: usize, limit: usize },
    #[error("the envelope is damaged: {0}\nhint: fetch it again; if it stays so, the writer is broken or hostile")]
    Encoding(CodecError),
    #[error("the payload is damaged: {0}\nhint: fetch it again; if it stays so, the writer runs another protocol version")]
    Payload(CodecError),
    #[error("protocol version {0} is unknown here (this build speaks {PROTOCOL_VERSION})\nhint: install the version that the run asks for")]
    Version(u16),
    #[error("the document's purpose is {got}, expected {expected:?}\nhint: a signed document was moved to a key where it does not belong")]
    Purpose { got: u16, expected: Purpose },
    #[error("the document belongs to another network (genesis {got})\nhint: check the network setting and the chain endpoint")]
    Genesis { got: Digest },
    #[error("the document belongs to subnet {got}, expected {expected}\nhint: check the netuid setting")]
    Netuid { got: u16, expected: u16 },
    #[error("the document belongs to run {got}, expected {expected}\nhint: the run has changed; discover it again")]
    Run { got: RunId, expected: RunId },
    #[error(
        "signed by {got}, expected {expected}\nhint: check the owner identity; if it is right, somebody without the right to do so wrote this"
    )]
    Signer { got: AccountId, expected: AccountId },
    #[error("issued {ahead_ms} ms in the future\nhint: set the clocks of both machines by NTP")]
    Future { ahead_ms: u64 },
    #[error("expired {ago_ms} ms ago\nhint: the writer stopped renewing it, or this machine's clock is ahead")]
    Expired { ago_ms: u64 },
    #[error("the lifetime is not the one of its purpose\nhint: the writer runs another protocol version")]
    Lifetime,
    #[error("sequence {got} is below {seen}, which was already seen\nhint: an old document was put back; the newer one stands")]
    Replayed { got: u64, seen: u64 },
    #[error("{0}\nhint: the document was changed after it was signed")]
    Signature(SignatureError),
    #[error(
        "two different documents with sequence {sequence} are signed by {signer}\nhint: keep both files: together they prove it, whoever reads them"
    )]
    Equivocation { signer: AccountId, sequence: u64 },
}

/// A document whose envelope passed every check.
#[derive(Clone, Debug)]
pub struct Verified<D> {
    pub document: D,
    pub header: Header,
    /// BLAKE3 of the encoded envelope.
    pub id: Digest,
}

/// The next sequence number: above everything that this signer used, and above what a signer with a lost disk used. The largest one is
/// followed by itself: who signs has to stop there.
pub fn next_sequence(last: u64, now_ms: u64) -> u64 {
    last.saturating_add(1).max(now_ms)
}

/// Header of a document that is about to be signed.
pub fn header_for<D: Document>(context: &Context, signer: KeyRef, sequence: u64, now_ms: u64) -> Header {
    Header {
        version: PROTOCOL_VERSION,
        purpose: D::PURPOSE as u16,
        genesis: context.genesis,
        netuid: context.netuid,
        run: context.run,
        signer,
        sequence,
        issued_ms: now_ms,
        expires_ms: D::PURPOSE.lifetime_ms().map_or(0, |lifetime| now_ms + lifetime),
    }
}

/// Signs `document` under `header` (made by [`header_for`]): the bytes of a `.qsr` file.
pub fn sign_with_header<D: Document>(header: Header, document: &D, signer: &dyn Signer) -> Vec<u8> {
    let mut bytes = codec::encode(&Envelope { header, payload: codec::encode(document) });
    let signature = signer.sign(&signed_bytes(D::PURPOSE, &bytes));
    bytes.extend_from_slice(&signature);
    bytes
}

/// Bytes of a file with this header and a payload of so many bytes.
pub(crate) fn file_length(header: &Header, payload: usize) -> usize {
    codec::length(header) + size_of::<u64>() + payload + SIGNATURE_BYTES
}

/// Signs `document`: the bytes of a `.qsr` file.
pub fn sign<D: Document>(document: &D, context: &Context, signer: &dyn Signer, sequence: u64, now_ms: u64) -> Vec<u8> {
    sign_with_header(header_for::<D>(context, signer.key(), sequence, now_ms), document, signer)
}

fn signed_bytes(purpose: Purpose, envelope: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(DOMAIN.len() + 12 + envelope.len());
    bytes.extend_from_slice(DOMAIN);
    bytes.extend_from_slice(&u32::from(purpose as u16).to_le_bytes());
    bytes.extend_from_slice(&(envelope.len() as u64).to_le_bytes());
    bytes.extend_from_slice(envelope);
    bytes
}

/// Decodes without any trust, for `inspect` and for reading who claims to have signed.
pub fn peek(bytes: &[u8]) -> Result<(Envelope, &[u8; SIGNATURE_BYTES], Digest), EnvelopeError> {
    let limit = Purpose::Plan.limit();
    let Some((body, signature)) = bytes.split_last_chunk::<SIGNATURE_BYTES>() else {
        return Err(EnvelopeError::Encoding(CodecError::Malformed("shorter than a signature".into())));
    };
    let envelope: Envelope = codec::decode(body, limit).map_err(EnvelopeError::Encoding)?;
    Ok((envelope, signature, Digest::blake3(body)))
}

/// Decodes and checks the signature under the key that the document itself names: who signed, not whether they were to sign.
pub fn verify_as_stated(bytes: &[u8]) -> Result<(Envelope, Digest), EnvelopeError> {
    let (envelope, signature, id) = peek(bytes)?;
    let purpose = Purpose::from_number(envelope.header.purpose).ok_or(EnvelopeError::Version(envelope.header.version))?;
    let body = &bytes[..bytes.len() - SIGNATURE_BYTES];
    verify_signature(&envelope.header.signer, &signed_bytes(purpose, body), signature).map_err(EnvelopeError::Signature)?;
    Ok((envelope, id))
}

/// Decodes and checks a document in the fixed order of the protocol: size, strict decode, version and purpose, network, subnet
/// and run, signer, lifetime, signature, payload. Sequences are the reader's duty ([`SequenceGuard`]).
pub fn open<D: Document>(bytes: &[u8], context: &Context, expect: Expect<'_>, now_ms: u64) -> Result<Verified<D>, EnvelopeError> {
    open_inner(bytes, context, expect, Some(now_ms))
}

/// As [`open`] for evidence that was stored write-once: its lifetime was checked by whoever stored it.
pub fn open_stored<D: Document>(bytes: &[u8], context: &Context, expect: Expect<'_>) -> Result<Verified<D>, EnvelopeError> {
    open_inner(bytes, context, expect, None)
}

fn open_inner<D: Document>(bytes: &[u8], context: &Context, expect: Expect<'_>, now_ms: Option<u64>) -> Result<Verified<D>, EnvelopeError> {
    let purpose = D::PURPOSE;
    if bytes.len() as u64 > purpose.file_limit() {
        return Err(EnvelopeError::Size { purpose, got: bytes.len(), limit: purpose.limit() });
    }
    let (envelope, signature, id) = peek(bytes)?;
    let header = envelope.header;
    if header.version != PROTOCOL_VERSION {
        return Err(EnvelopeError::Version(header.version));
    }
    if header.purpose != purpose as u16 {
        return Err(EnvelopeError::Purpose { got: header.purpose, expected: purpose });
    }
    if header.genesis != context.genesis {
        return Err(EnvelopeError::Genesis { got: Digest(header.genesis) });
    }
    if header.netuid != context.netuid {
        return Err(EnvelopeError::Netuid { got: header.netuid, expected: context.netuid });
    }
    if header.run != context.run {
        return Err(EnvelopeError::Run { got: header.run, expected: context.run });
    }
    let (matches, expected) = match expect {
        Expect::Key(key) => (header.signer == *key, key.account()),
        Expect::Account(account) => (header.signer.account() == *account, *account),
        Expect::Any(keys) => (keys.contains(&header.signer), keys.first().map_or(AccountId([0; 32]), KeyRef::account)),
    };
    if !matches {
        return Err(EnvelopeError::Signer { got: header.signer.account(), expected });
    }
    let lifetime = if header.expires_ms == 0 { None } else { Some(header.expires_ms.saturating_sub(header.issued_ms)) };
    if lifetime != purpose.lifetime_ms() {
        return Err(EnvelopeError::Lifetime);
    }
    if let Some(now_ms) = now_ms {
        if header.issued_ms > now_ms + SKEW_MS {
            return Err(EnvelopeError::Future { ahead_ms: header.issued_ms - now_ms });
        }
        if header.expires_ms != 0 && now_ms > header.expires_ms + SKEW_MS {
            return Err(EnvelopeError::Expired { ago_ms: now_ms - header.expires_ms });
        }
    }
    let body = &bytes[..bytes.len() - SIGNATURE_BYTES];
    verify_signature(&header.signer, &signed_bytes(purpose, body), signature).map_err(EnvelopeError::Signature)?;
    let document = codec::decode(&envelope.payload, purpose.limit()).map_err(EnvelopeError::Payload)?;
    Ok(Verified { document, header, id })
}

/// Highest sequence seen for each mutable key, and the document that had it; a reader persists it and refuses anything older,
/// and anything else with the same sequence.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SequenceGuard {
    seen: std::collections::BTreeMap<String, (u64, Digest)>,
}

impl SequenceGuard {
    /// Accepts the document `id` read from `key` unless its sequence is below one already seen there, or its signer gave the same
    /// sequence to another document. Reading the same document again is not a replay.
    pub fn accept(&mut self, key: &str, header: &Header, id: &Digest) -> Result<(), EnvelopeError> {
        let entry = format!("{}/{}/{key}", header.signer.account(), header.purpose);
        let (seen, document) = self.seen.entry(entry).or_insert((header.sequence, *id));
        if header.sequence < *seen {
            return Err(EnvelopeError::Replayed { got: header.sequence, seen: *seen });
        }
        if header.sequence == *seen && document != id {
            return Err(EnvelopeError::Equivocation { signer: header.signer.account(), sequence: *seen });
        }
        (*seen, *document) = (header.sequence, *id);
        Ok(())
    }
}

/// What a client has seen of a subnet's bucket, for it to keep over a restart: of the documents that do not expire, or soon
/// enough, nobody can show it older ones then.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// Newest version of the run root.
    pub root: u32,
    /// BLAKE3 of its file: no other root takes its place, whoever signed it.
    #[serde(default)]
    pub root_digest: Option<Digest>,
    /// Of the pointer to the current run.
    pub guard: SequenceGuard,
    /// Its file as it was accepted last: one half of a proof, should the other half ever come.
    #[serde(default, with = "hex::serde")]
    pub current: Vec<u8>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Ed25519Signer;
    use crate::documents::CurrentRun;

    const NOW: u64 = 1_700_000_000_000;

    fn context() -> Context {
        Context { genesis: [2; 32], netuid: 24, run: RunId([3; 16]) }
    }

    fn current() -> CurrentRun {
        CurrentRun { root_version: 1, root_digest: Digest::ZERO, run: RunId([3; 16]), manifest_digest: Digest::ZERO }
    }

    fn signer() -> Ed25519Signer {
        Ed25519Signer::from_seed([1; 32])
    }

    fn open_current(bytes: &[u8], context: &Context, now_ms: u64) -> Result<Verified<CurrentRun>, EnvelopeError> {
        open(bytes, context, Expect::Account(&signer().key().account()), now_ms)
    }

    #[test]
    fn a_signed_document_opens_as_what_it_is() {
        let bytes = sign(&current(), &context(), &signer(), 7, NOW);
        let verified = open_current(&bytes, &context(), NOW + 1_000).unwrap();
        assert_eq!(verified.document, current());
        assert_eq!((verified.header.sequence, verified.header.issued_ms), (7, NOW));
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_refused() {
        let bytes = sign(&current(), &context(), &signer(), 7, NOW);
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            assert!(open_current(&changed, &context(), NOW).is_err(), "byte {at}");
            assert!(open_current(&bytes[..at], &context(), NOW).is_err(), "cut at {at}");
        }
        let mut longer = bytes;
        longer.push(0);
        assert!(open_current(&longer, &context(), NOW).is_err());
    }

    #[test]
    fn a_document_of_another_network_subnet_run_signer_or_time_says_which() {
        let bytes = sign(&current(), &context(), &signer(), 7, NOW);
        let other = |change: fn(&mut Context)| {
            let mut context = context();
            change(&mut context);
            open_current(&bytes, &context, NOW).unwrap_err()
        };
        assert!(matches!(other(|c| c.genesis = [9; 32]), EnvelopeError::Genesis { .. }));
        assert!(matches!(other(|c| c.netuid = 25), EnvelopeError::Netuid { got: 24, expected: 25 }));
        assert!(matches!(other(|c| c.run = RunId::NONE), EnvelopeError::Run { .. }));
        let stranger = AccountId([5; 32]);
        assert!(matches!(open::<CurrentRun>(&bytes, &context(), Expect::Account(&stranger), NOW), Err(EnvelopeError::Signer { .. })));
        let expired = NOW + Purpose::CurrentRun.lifetime_ms().unwrap() + SKEW_MS;
        assert!(open_current(&bytes, &context(), expired).is_ok());
        assert!(matches!(open_current(&bytes, &context(), expired + 1), Err(EnvelopeError::Expired { .. })));
        assert!(matches!(open_current(&bytes, &context(), NOW - SKEW_MS - 1), Err(EnvelopeError::Future { .. })));
        assert!(open_stored::<CurrentRun>(&bytes, &context(), Expect::Key(&signer().key())).is_ok());
    }

    #[test]
    fn a_signature_for_one_purpose_is_worthless_for_another() {
        let bytes = sign(&current(), &context(), &signer(), 7, NOW);
        let error = open::<crate::documents::Head>(&bytes, &context(), Expect::Key(&signer().key()), NOW).unwrap_err();
        assert_eq!(error, EnvelopeError::Purpose { got: Purpose::CurrentRun as u16, expected: Purpose::Head });
    }

    #[test]
    fn a_lifetime_that_its_purpose_does_not_have_is_refused() {
        let mut header = header_for::<CurrentRun>(&context(), signer().key(), 1, NOW);
        header.expires_ms = 0;
        let bytes = sign_with_header(header, &current(), &signer());
        assert_eq!(open_current(&bytes, &context(), NOW).unwrap_err(), EnvelopeError::Lifetime);
    }

    #[test]
    fn an_older_sequence_is_a_replay_and_the_same_document_again_is_not() {
        let mut guard = SequenceGuard::default();
        let header = |sequence| header_for::<CurrentRun>(&context(), signer().key(), sequence, NOW);
        let (one, other) = (Digest::blake3(b"one"), Digest::blake3(b"other"));
        guard.accept("current", &header(5), &one).unwrap();
        guard.accept("current", &header(5), &one).unwrap();
        guard.accept("other", &header(1), &other).unwrap();
        let signer = signer().key().account();
        assert_eq!(guard.accept("current", &header(5), &other), Err(EnvelopeError::Equivocation { signer, sequence: 5 }));
        assert_eq!(guard.accept("current", &header(4), &one), Err(EnvelopeError::Replayed { got: 4, seen: 5 }));
        assert_eq!([(5, 3), (5, 30), (u64::MAX, 3)].map(|(last, now)| next_sequence(last, now)), [6, 30, u64::MAX]);
    }
}
