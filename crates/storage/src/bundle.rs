//! Grant bundles: a list of presigned requests, sealed to the X25519 key of one hotkey inside a signed envelope.

use protocol::envelope::{Context, Header, Purpose};
use protocol::{GrantBundle, SealedBytes, codec};

use crate::seal::{self, SealError};
use zeroize::Zeroizing;

/// Largest plaintext of a bundle: what fits into the largest envelope that carries one.
const BUNDLE_BYTES_MAX: usize = 1 << 20;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BundleError {
    #[error(transparent)]
    Seal(#[from] SealError),
    #[error("the sealed bundle is damaged: {0}")]
    Malformed(protocol::codec::CodecError),
}

/// Seals `bundle` to the X25519 key `recipient` for the envelope with `header`.
pub fn seal_to(
    context: &Context,
    purpose: Purpose,
    header: &Header,
    recipient: &[u8; 32],
    bundle: &GrantBundle,
) -> Result<SealedBytes, BundleError> {
    seal_bytes(context, purpose, header, recipient, &codec::encode(bundle))
}

/// Seals any other secret to the X25519 key `recipient` for the envelope with `header`.
pub fn seal_bytes(
    context: &Context,
    purpose: Purpose,
    header: &Header,
    recipient: &[u8; 32],
    plaintext: &[u8],
) -> Result<SealedBytes, BundleError> {
    Ok(seal::seal(recipient, &context.seal_info(purpose), &header.digest().0, plaintext)?)
}

/// Opens a bundle that came in the envelope with `header`; `secret` is the hotkey's X25519 secret.
pub fn open(context: &Context, header: &Header, sealed: &SealedBytes, secret: &[u8; 32]) -> Result<GrantBundle, BundleError> {
    codec::decode(&open_bytes(context, header, sealed, secret)?, BUNDLE_BYTES_MAX).map_err(BundleError::Malformed)
}

/// Opens what [`seal_bytes`] sealed.
pub fn open_bytes(context: &Context, header: &Header, sealed: &SealedBytes, secret: &[u8; 32]) -> Result<Zeroizing<Vec<u8>>, BundleError> {
    let purpose = Purpose::from_number(header.purpose).ok_or(BundleError::Seal(SealError::DoesNotOpen))?;
    Ok(seal::open(secret, &context.seal_info(purpose), &header.digest().0, sealed)?)
}

#[cfg(test)]
mod tests {
    use protocol::documents::StandingGrants;
    use protocol::envelope::{RunId, header_for};
    use protocol::{Ed25519Signer, GrantRequest, Method, Signer};

    use super::*;

    #[test]
    fn a_bundle_opens_for_its_hotkey_in_its_own_envelope_only() {
        let (orchestrator, hotkey) = (Ed25519Signer::from_seed([1; 32]), Ed25519Signer::from_seed([2; 32]));
        let context = Context { genesis: [3; 32], netuid: 24, run: RunId([4; 16]) };
        let header = header_for::<StandingGrants>(&context, orchestrator.key(), 1, 1_000);
        let request = GrantRequest {
            method: Method::Get,
            key: "a/b".into(),
            url: "https://store/a/b".into(),
            headers: vec![],
            length: None,
            sha256: None,
            expires_ms: 9,
        };
        let bundle = GrantBundle { requests: vec![request] };
        let recipient = protocol::x25519_public(&hotkey.key().account()).unwrap();
        let sealed = seal_to(&context, Purpose::StandingGrants, &header, &recipient, &bundle).unwrap();
        assert_eq!(open(&context, &header, &sealed, &hotkey.x25519_secret()).unwrap(), bundle);
        let other = header_for::<StandingGrants>(&context, orchestrator.key(), 2, 1_000);
        assert!(open(&context, &other, &sealed, &hotkey.x25519_secret()).is_err());
        assert!(open(&context, &header, &sealed, &orchestrator.x25519_secret()).is_err());
    }
}
