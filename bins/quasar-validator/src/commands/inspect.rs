//! `inspect FILE`: any signed document as JSON, with what can be said about it without knowing who should have signed.

use std::path::Path;

use daemon::{Exit, Failure, clock};
use protocol::documents::{self, *};
use protocol::envelope::{Context, Document, EnvelopeError, Expect, Header, Purpose, open_stored, peek};
use protocol::{FragmentPlan, ShardManifest};
use serde_json::{Value, json};

/// Longest file that is read: the largest document, with room for its envelope.
const FILE_BYTES_MAX: u64 = (4 << 20) + 4096;

#[derive(Debug, thiserror::Error)]
enum InspectError {
    #[error("{path} cannot be read: {reason}")]
    Unreadable { path: String, reason: String },
    #[error("{path} is no signed document: {error}")]
    NoEnvelope { path: String, error: EnvelopeError },
}

pub fn main(file: &Path) -> Result<Exit, Failure> {
    let path = file.display().to_string();
    let bytes = read(file).map_err(|reason| Failure::usage(InspectError::Unreadable { path: path.clone(), reason }))?;
    let (value, is_valid) =
        describe(&bytes, clock::now_ms()).map_err(|error| Failure::configuration(InspectError::NoEnvelope { path, error }))?;
    println!("{value:#}");
    Ok(if is_valid { Exit::Done } else { Exit::Configuration })
}

fn read(file: &Path) -> Result<Vec<u8>, String> {
    let length = std::fs::metadata(file).map_err(|error| error.to_string())?.len();
    if length > FILE_BYTES_MAX {
        return Err(format!("it is longer than {FILE_BYTES_MAX} bytes, so it is no signed document"));
    }
    std::fs::read(file).map_err(|error| error.to_string())
}

/// The document as JSON, and whether its signature is that of the key that it names.
fn describe(bytes: &[u8], now_ms: u64) -> Result<(Value, bool), EnvelopeError> {
    let (envelope, _, id) = peek(bytes)?;
    let header = &envelope.header;
    let purpose = Purpose::from_number(header.purpose);
    let verified = purpose.map_or(Err(EnvelopeError::Version(header.version)), |purpose| verify(bytes, purpose, header));
    let payload = match purpose.map(|purpose| documents::payload_json(purpose, &envelope.payload)) {
        Some(Ok(payload)) => payload,
        Some(Err(error)) => json!({ "undecodable": error.to_string() }),
        None => json!({ "undecodable": format!("purpose {} is unknown", header.purpose) }),
    };
    let signature = verified.as_ref().map_or_else(|error| error.to_string().replace('\n', "; "), |()| "valid".to_owned());
    let has_expired = header.expires_ms != 0 && header.expires_ms < now_ms;
    let verification = json!({ "signature": signature, "expired": has_expired });
    let value = json!({ "purpose": purpose, "id": id, "header": header, "verification": verification, "payload": payload });
    Ok((value, verified.is_ok()))
}

/// Everything of the verification that does not depend on who reads it and when.
fn verify(bytes: &[u8], purpose: Purpose, header: &Header) -> Result<(), EnvelopeError> {
    fn of<D: Document>(bytes: &[u8], header: &Header) -> Result<(), EnvelopeError> {
        let context = Context { genesis: header.genesis, netuid: header.netuid, run: header.run };
        open_stored::<D>(bytes, &context, Expect::Key(&header.signer)).map(drop)
    }
    macro_rules! by_purpose {
        ($($name:ident => $document:ty),* $(,)?) => {
            match purpose {
                $(Purpose::$name => of::<$document>(bytes, header),)*
                Purpose::Receipt | Purpose::LogHead => Err(EnvelopeError::Version(header.version)),
            }
        };
    }
    by_purpose! {
        RunRoot => RunRoot,
        CurrentRun => CurrentRun,
        RunManifest => RunManifest,
        Head => Head,
        Plan => FragmentPlan,
        CatalogPage => CatalogPage,
        Job => Job,
        StandingGrants => StandingGrants,
        PullGrants => PullGrants,
        Progress => Progress,
        OpeningManifest => OpeningManifest,
        FragmentManifest => FragmentManifest,
        MergeManifest => MergeManifest,
        Release => Release,
        AuditOrder => AuditOrder,
        VerdictCommit => VerdictCommit,
        VerdictReveal => VerdictReveal,
        Scores => Scores,
        ShardManifest => ShardManifest,
        Tape => Tape,
    }
}

#[cfg(test)]
mod tests {
    use protocol::envelope::{RunId, sign};
    use protocol::{Digest, Ed25519Signer};

    use super::*;

    #[test]
    fn a_verdict_is_shown_with_the_result_of_its_verification_and_a_changed_one_is_not_valid() {
        let context = Context { genesis: [2; 32], netuid: 24, run: RunId([3; 16]) };
        let commit = VerdictCommit { audit: Digest::ZERO, commitment: Digest::blake3(b"x") };
        let mut bytes = sign(&commit, &context, &Ed25519Signer::from_seed([1; 32]), 5, 1_000);
        let (value, is_valid) = describe(&bytes, 2_000).unwrap();
        assert!(is_valid);
        assert_eq!((&value["purpose"], &value["header"]["sequence"]), (&json!("verdict_commit"), &json!(5)));
        assert_eq!(value["verification"], json!({ "signature": "valid", "expired": false }));
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        assert!(!describe(&bytes, 2_000).unwrap().1);
        assert!(describe(&bytes[..40], 0).is_err());
    }
}
