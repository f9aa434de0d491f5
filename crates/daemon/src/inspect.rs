//! Any signed document as JSON, for `inspect FILE.qsr` of every binary.

use std::path::Path;

use protocol::codec;
use protocol::documents::{Equivocation, payload_json};
use protocol::envelope::{Purpose, peek, verify_as_stated};
use serde_json::{Value, json};

use crate::{Exit, Failure, clock};

/// Largest file that is looked at.
const FILE_BYTES_MAX: u64 = 8 << 20;

/// What `inspect` prints, and whether the signature is that of the key that the document names.
#[derive(Clone, Debug)]
pub struct Inspected {
    pub json: Value,
    pub is_valid: bool,
}

impl Inspected {
    /// A document that nobody signed as it stands is no success.
    pub fn exit(&self) -> Exit {
        if self.is_valid { Exit::Done } else { Exit::Configuration }
    }
}

/// Reads a `.qsr` file and shows header, payload and whether the signature is the stated signer's. JSON is for people: it is
/// never signed.
///
/// # Errors
/// The file is unreadable or no envelope. A wrong signature is shown, not an error.
pub fn file(path: &Path) -> Result<Inspected, Failure> {
    let unreadable = |error: std::io::Error| Failure::configuration(anyhow::anyhow!("{} cannot be read: {error}", path.display()));
    let length = std::fs::metadata(path).map_err(unreadable)?.len();
    if length > FILE_BYTES_MAX {
        return Err(Failure::configuration(anyhow::anyhow!("{} has {length} bytes; no signed document is that large", path.display())));
    }
    let bytes = std::fs::read(path).map_err(unreadable)?;
    document(&bytes, clock::now_ms()).map_err(|failure| failure.context(path.display().to_string()))
}

/// As [`file`], for bytes.
///
/// # Errors
/// The bytes are no envelope.
pub fn document(bytes: &[u8], now_ms: u64) -> Result<Inspected, Failure> {
    let (envelope, _, id) = peek(bytes).map_err(Failure::configuration)?;
    let header = envelope.header;
    let purpose = Purpose::from_number(header.purpose);
    let verified = verify_as_stated(bytes);
    let verification = match &verified {
        Ok(_) if header.expires_ms != 0 && now_ms > header.expires_ms => "signature valid, lifetime over".to_owned(),
        Ok(_) => "signature valid".to_owned(),
        Err(error) => format!("NOT VALID: {error}"),
    };
    // A proof of equivocation has to hold by itself: the finder's signature proves nothing.
    let proof = match &verified {
        Ok(_) if purpose == Some(Purpose::Equivocation) => Some(
            codec::decode::<Equivocation>(&envelope.payload, Purpose::Equivocation.limit())
                .map_err(|error| error.to_string())
                .and_then(|proof| proof.verify().map_err(|error| error.to_string())),
        ),
        _ => None,
    };
    let is_valid = verified.is_ok() && !matches!(proof, Some(Err(_)));
    let payload = match purpose.map(|purpose| payload_json(purpose, &envelope.payload)) {
        Some(Ok(payload)) => payload,
        Some(Err(error)) => json!({ "undecodable": error.to_string() }),
        None => json!({ "unknown_purpose": header.purpose }),
    };
    let mut json = json!({ "id": id, "purpose": purpose, "verification": verification, "header": header, "payload": payload });
    if let Some(proof) = proof {
        json["proof"] = match proof {
            Ok((account, sequence, ids)) => json!({ "convicted": account, "sequence": sequence, "documents": ids }),
            Err(why) => json!({ "proves_nothing": why }),
        };
    }
    Ok(Inspected { json, is_valid })
}

#[cfg(test)]
mod tests {
    use protocol::documents::CurrentRun;
    use protocol::envelope::{Context, RunId, sign};
    use protocol::{Digest, Ed25519Signer};

    use super::*;

    #[test]
    fn a_document_is_shown_with_its_verification_and_a_changed_one_says_so() {
        let context = Context { genesis: [1; 32], netuid: 24, run: RunId::NONE };
        let current = CurrentRun { root_version: 3, root_digest: Digest::ZERO, run: RunId([2; 16]), manifest_digest: Digest::ZERO };
        let mut bytes = sign(&current, &context, &Ed25519Signer::from_seed([5; 32]), 1, 1_000);
        let shown = document(&bytes, 2_000).unwrap();
        assert_eq!(shown.json["payload"]["root_version"], 3);
        assert_eq!((shown.json["verification"].as_str(), shown.exit()), (Some("signature valid"), Exit::Done));
        assert_eq!(document(&bytes, u64::MAX).unwrap().json["verification"], "signature valid, lifetime over");
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        let shown = document(&bytes, 2_000).unwrap();
        assert!(shown.json["verification"].as_str().unwrap().starts_with("NOT VALID"));
        assert_eq!(shown.exit(), Exit::Configuration);
        assert!(document(b"no envelope", 0).is_err());
    }

    #[test]
    fn a_proof_of_equivocation_convicts_or_says_why_not() {
        let context = Context { genesis: [1; 32], netuid: 24, run: RunId::NONE };
        let (accused, finder) = (Ed25519Signer::from_seed([5; 32]), Ed25519Signer::from_seed([6; 32]));
        let said = |root_version, sequence| {
            let current = CurrentRun { root_version, root_digest: Digest::ZERO, run: RunId([2; 16]), manifest_digest: Digest::ZERO };
            sign(&current, &context, &accused, sequence, 1_000)
        };
        let shown = |first: Vec<u8>, second: Vec<u8>| {
            let proof = Equivocation { key: "current.qsr".into(), first, second };
            document(&sign(&proof, &context, &finder, 1, 1_000), 2_000).unwrap()
        };
        let convicted = shown(said(1, 7), said(2, 7));
        assert_eq!(convicted.json["proof"]["sequence"], 7);
        assert_eq!(convicted.exit(), Exit::Done);
        for nothing in [shown(said(1, 7), said(1, 7)), shown(said(1, 7), said(2, 8)), shown(said(1, 7), b"forged".to_vec())] {
            assert!(nothing.json["proof"]["proves_nothing"].is_string(), "{}", nothing.json);
            assert_eq!(nothing.exit(), Exit::Configuration);
        }
    }
}
