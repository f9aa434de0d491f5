//! The wire format does not change by accident: each type of document encodes and signs to the very bytes that are committed
//! here, and these bytes open.

extern crate quasar_protocol as protocol;

mod samples;

use std::path::Path;

use protocol::Signer;
use protocol::documents::payload_json;
use protocol::envelope::{Purpose, verify_as_stated};

#[test]
fn every_document_has_the_bytes_that_are_committed_and_they_open() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let samples = samples::all();
    for (name, bytes) in &samples {
        let committed = std::fs::read(folder.join(format!("{name}.qsr"))).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(committed, *bytes, "{name} changed on the wire: that is a new protocol version with a vector of its own");
        let (envelope, _) = verify_as_stated(&committed).unwrap();
        assert_eq!(envelope.header.signer, samples::signer().key());
        let purpose = Purpose::from_number(envelope.header.purpose).unwrap();
        assert!(committed.len() <= purpose.limit() + 256, "{name}");
        payload_json(purpose, &envelope.payload).unwrap();
    }
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), samples.len(), "each vector belongs to a document");
}

#[test]
fn every_cut_and_every_flipped_bit_of_every_document_is_refused() {
    for (name, bytes) in samples::all() {
        for at in (0..bytes.len()).step_by(7) {
            let mut changed = bytes.clone();
            changed[at] ^= 1 << (at % 8);
            assert!(verify_as_stated(&changed).is_err(), "{name}: bit in byte {at}");
            assert!(verify_as_stated(&bytes[..at]).is_err(), "{name}: cut at {at}");
        }
    }
}
