//! `inspect FILE`: any signed document as JSON, with what can be said about it without knowing who should have signed.

use std::path::Path;

use daemon::{Exit, Failure, clock};
use protocol::documents::{self, *};
use protocol::envelope::{Context, Document, EnvelopeError, Expect, Purpose, open_stored, peek};
use protocol::{FragmentPlan, ShardManifest};
use serde_json::json;

/// Longest file that is read: the largest document, with room for its envelope.
const FILE_BYTES_MAX: u64 = (4 << 20) + 4096;

#[derive(Debug, thiserror::Error)]
enum InspectError {
    #[error("cannot read {path}: {reason}")]
    Unreadable { path: String, reason: String },
    #[error("{path} is no signed document: {error}")]
    NoEnvelope { path: String, error: EnvelopeError },
}

pub fn main(file: &Path) -> Result<Exit, Failure> {
    let path = file.display().to_string();
    let unreadable = |reason: String| Failure::usage(InspectError::Unreadable { path: path.clone(), reason });
    let length = std::fs::metadata(file).map_err(|error| unreadable(error.to_string()))?.len();
    if length > FILE_BYTES_MAX {
        return Err(unreadable(format!("it is longer than {FILE_BYTES_MAX} bytes, so it is no signed document")));
    }
    let bytes = std::fs::read(file).map_err(|error| unreadable(error.to_string()))?;
    let (value, is_valid) = describe(&bytes, clock::now_ms()).map_err(|error| Failure::configuration(InspectError::NoEnvelope { path: path.clone(), error }))?;
    println!("{value:#}");
    Ok(if is_valid { Exit::Done } else { Exit::Configuration })
}

/// The document as JSON, and whether its signature is that of the key that it names.
fn describe(bytes: &[u8], now_ms: u64) -> Result<(serde_json::Value, bool), EnvelopeError> {
    let (envelope, _, id) = peek(bytes)?;
    let header = &envelope.header;
    let purpose = Purpose::from_number(header.purpose);
    let verified = purpose.map_or(Err(EnvelopeError::Version(header.version)), |purpose| verify(bytes, purpose, header));
    let payload = match purpose.map(|purpose| documents::payload_json(purpose, &envelope.payload)) {
        Some(Ok(payload)) => payload,
        Some(Err(error)) => json!({ "undecodable": error.to_string() }),
        None => json!({ "undecodable": format!("purpose {} is unknown", header.purpose) }),
    };
    let value = json!({
        "purpose": purpose,
        "id": id,
        "header": header,
        "verification": {
            "signature": verified.as_ref().map_or_else(|error| error.to_string().replace('\n', "; "), |()| "valid".to_owned()),
            "expired": header.expires_ms != 0 && header.expires_ms < now_ms,
        },
        "payload": payload,
    });
    Ok((value, verified.is_ok()))
}

/// Everything of the verification that does not depend on who reads it and when.
fn verify(bytes: &[u8], purpose: Purpose, header: &protocol::envelope::Header) -> Result<(), EnvelopeError> {
    fn of<D: Document>(bytes: &[u8], header: &protocol::envelope::Header) -> Result<(), EnvelopeError> {
        let context = Context { genesis: header.genesis, netuid: header.netuid, run: header.run };
        open_stored::<D>(bytes, &context, Expect::Key(&header.signer)).map(drop)
    }
    match purpose {
        Purpose::RunRoot => of::<RunRoot>(bytes, header),
        Purpose::CurrentRun => of::<CurrentRun>(bytes, header),
        Purpose::RunManifest => of::<RunManifest>(bytes, header),
        Purpose::Head => of::<Head>(bytes, header),
        Purpose::Plan => of::<FragmentPlan>(bytes, header),
        Purpose::CatalogPage => of::<CatalogPage>(bytes, header),
        Purpose::Job => of::<Job>(bytes, header),
        Purpose::StandingGrants => of::<StandingGrants>(bytes, header),
        Purpose::PullGrants => of::<PullGrants>(bytes, header),
        Purpose::Progress => of::<Progress>(bytes, header),
        Purpose::OpeningManifest => of::<OpeningManifest>(bytes, header),
        Purpose::FragmentManifest => of::<FragmentManifest>(bytes, header),
        Purpose::MergeManifest => of::<MergeManifest>(bytes, header),
        Purpose::Release => of::<Release>(bytes, header),
        Purpose::AuditOrder => of::<AuditOrder>(bytes, header),
        Purpose::VerdictCommit => of::<VerdictCommit>(bytes, header),
        Purpose::VerdictReveal => of::<VerdictReveal>(bytes, header),
        Purpose::Scores => of::<Scores>(bytes, header),
        Purpose::ShardManifest => of::<ShardManifest>(bytes, header),
        Purpose::Tape => of::<Tape>(bytes, header),
        Purpose::Receipt | Purpose::LogHead => Err(EnvelopeError::Version(header.version)),
    }
}

#[cfg(test)]
mod tests {
    use protocol::Ed25519Signer;
    use protocol::envelope::{RunId, sign};
    use protocol::{AccountId, Digest};

    use super::*;

    #[test]
    fn a_document_is_shown_with_the_result_of_its_verification() {
        let context = Context { genesis: [2; 32], netuid: 24, run: RunId([3; 16]) };
        let job = Job { hotkey: AccountId([4; 32]), slot: 1, session_epoch: 7, leases: vec![] };
        let mut bytes = sign(&job, &context, &Ed25519Signer::from_seed([1; 32]), 5, 1_000);
        let (value, is_valid) = describe(&bytes, 2_000).unwrap();
        assert!(is_valid);
        assert_eq!((&value["purpose"], &value["payload"]["session_epoch"], &value["header"]["sequence"]), (&json!("job"), &json!(7), &json!(5)));
        assert_eq!(value["verification"], json!({ "signature": "valid", "expired": false }));
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        let (value, is_valid) = describe(&bytes, 2_000).unwrap();
        assert!(!is_valid && value["verification"]["signature"].as_str().unwrap().contains("does not match"));
        assert!(describe(&bytes[..40], 0).is_err());
        let _ = Digest::ZERO;
    }
}
