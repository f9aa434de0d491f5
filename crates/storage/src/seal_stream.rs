//! Sealing files of any length to one key: HPKE as in [`crate::seal`], with one context for a sequence of chunks (RFC 9180 §5.2).
//!
//! Layout: encapsulated key (32 bytes), then chunks of [`CHUNK_BYTES`] plaintext bytes with 16 bytes of tag each; only the last one
//! may be shorter. The context numbers the chunks, and the additional data of the last one says that it is the last: nothing can
//! be reordered, left out, or cut off.

use std::io::{self, Read, Write};

use hpke::aead::{AeadCtxR, AeadCtxS, ChaCha20Poly1305};
use hpke::kdf::HkdfSha256;
use hpke::kem::X25519HkdfSha256;
use hpke::{Deserializable, Kem, OpModeR, OpModeS, Serializable, setup_receiver, setup_sender};

use crate::seal::SealError;

/// Plaintext bytes of a chunk.
pub const CHUNK_BYTES: usize = 1 << 20;
const TAG_BYTES: usize = 16;
const KEY_BYTES: usize = 32;

#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    #[error(transparent)]
    Seal(#[from] SealError),
    #[error("the sealed file is longer than {0} bytes\nhint: its writer does not keep to the run's limits")]
    TooLong(u64),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// A key pair for one purpose: X25519 secret and public key, derived from 32 secret bytes (RFC 9180 §7.1.3).
pub fn key_pair(secret: &[u8; 32]) -> (zeroize::Zeroizing<[u8; 32]>, [u8; 32]) {
    let (secret, public) = <X25519HkdfSha256 as Kem>::derive_keypair(secret);
    (zeroize::Zeroizing::new(secret.to_bytes().into()), public.to_bytes().into())
}

/// 32 random secret bytes.
pub fn fresh_secret() -> zeroize::Zeroizing<[u8; 32]> {
    let (secret, _) = <X25519HkdfSha256 as Kem>::gen_keypair();
    zeroize::Zeroizing::new(secret.to_bytes().into())
}

/// Length of the sealed form of `length` plaintext bytes.
pub const fn sealed_length(length: u64) -> u64 {
    let chunk = CHUNK_BYTES as u64;
    let chunks = if length == 0 { 1 } else { length.div_ceil(chunk) };
    KEY_BYTES as u64 + length + chunks * TAG_BYTES as u64
}

const fn aad(is_last: bool) -> &'static [u8] {
    if is_last { b"last" } else { b"more" }
}

/// Reads until `buffer` is full or the source ends; gives the bytes read.
fn fill(source: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match source.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Hands the chunks of `source` to `work` one after the other, with whether it is the last one.
fn chunks(
    source: &mut impl Read,
    chunk_bytes: usize,
    mut work: impl FnMut(&[u8], bool) -> Result<(), StreamError>,
) -> Result<(), StreamError> {
    let (mut now, mut next) = (vec![0; chunk_bytes], vec![0; chunk_bytes]);
    let mut filled = fill(source, &mut now)?;
    loop {
        // A chunk is known to be the last one only when nothing comes behind it.
        let behind = if filled == chunk_bytes { fill(source, &mut next)? } else { 0 };
        work(&now[..filled], behind == 0)?;
        if behind == 0 {
            return Ok(());
        }
        std::mem::swap(&mut now, &mut next);
        filled = behind;
    }
}

/// Seals everything that `source` gives to the X25519 public key `recipient`.
pub fn seal(recipient: &[u8; 32], info: &[u8], source: &mut impl Read, sink: &mut impl Write) -> Result<(), StreamError> {
    let recipient = <X25519HkdfSha256 as Kem>::PublicKey::from_bytes(recipient).map_err(|_| SealError::BadRecipient)?;
    let (encapsulated, mut context): (_, AeadCtxS<ChaCha20Poly1305, HkdfSha256, X25519HkdfSha256>) =
        setup_sender(&OpModeS::Base, &recipient, info).map_err(|_| SealError::BadRecipient)?;
    sink.write_all(&encapsulated.to_bytes())?;
    chunks(source, CHUNK_BYTES, |chunk, is_last| {
        let sealed = context.seal(chunk, aad(is_last)).map_err(|_| SealError::BadRecipient)?;
        Ok(sink.write_all(&sealed)?)
    })?;
    Ok(sink.flush()?)
}

/// Opens what was sealed to the public key of the X25519 secret `secret`. At most `limit` plaintext bytes are written; what was
/// written before an error is not to be used.
pub fn open(secret: &[u8; 32], info: &[u8], source: &mut impl Read, sink: &mut impl Write, limit: u64) -> Result<(), StreamError> {
    let mut encapsulated = [0; KEY_BYTES];
    if fill(source, &mut encapsulated)? < KEY_BYTES {
        return Err(SealError::DoesNotOpen.into());
    }
    let secret = <X25519HkdfSha256 as Kem>::PrivateKey::from_bytes(secret).map_err(|_| SealError::DoesNotOpen)?;
    let encapsulated = <X25519HkdfSha256 as Kem>::EncappedKey::from_bytes(&encapsulated).map_err(|_| SealError::DoesNotOpen)?;
    let mut context: AeadCtxR<ChaCha20Poly1305, HkdfSha256, X25519HkdfSha256> =
        setup_receiver(&OpModeR::Base, &secret, &encapsulated, info).map_err(|_| SealError::DoesNotOpen)?;
    let mut written = 0;
    chunks(source, CHUNK_BYTES + TAG_BYTES, |chunk, is_last| {
        let opened = context.open(chunk, aad(is_last)).map_err(|_| SealError::DoesNotOpen)?;
        written += opened.len() as u64;
        if written > limit {
            return Err(StreamError::TooLong(limit));
        }
        Ok(sink.write_all(&opened)?)
    })?;
    Ok(sink.flush()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sealed(plaintext: &[u8]) -> ([u8; 32], Vec<u8>) {
        let (secret, public) = key_pair(&[9; 32]);
        let mut sealed = Vec::new();
        seal(&public, b"info", &mut &plaintext[..], &mut sealed).unwrap();
        (*secret, sealed)
    }

    fn opened(secret: &[u8; 32], info: &[u8], sealed: &[u8], limit: u64) -> Result<Vec<u8>, StreamError> {
        let mut plaintext = Vec::new();
        open(secret, info, &mut &sealed[..], &mut plaintext, limit).map(|()| plaintext)
    }

    #[test]
    fn files_of_every_length_around_a_chunk_open_to_what_was_sealed() {
        for length in [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES, 2 * CHUNK_BYTES + 77] {
            let plaintext: Vec<u8> = (0..length).map(|at| (at % 251) as u8).collect();
            let (secret, sealed) = sealed(&plaintext);
            assert_eq!(sealed.len() as u64, sealed_length(length as u64));
            assert!(opened(&secret, b"info", &sealed, length as u64).unwrap() == plaintext, "length {length}");
            if length > 0 {
                let over = opened(&secret, b"info", &sealed, length as u64 - 1);
                assert!(matches!(over, Err(StreamError::TooLong(_))));
            }
        }
    }

    #[test]
    fn chunks_cannot_be_cut_off_swapped_changed_or_opened_elsewhere() {
        let (secret, whole) = sealed(&vec![5; 2 * CHUNK_BYTES + 9]);
        let chunk = CHUNK_BYTES + TAG_BYTES;
        let (first, second) = (KEY_BYTES..KEY_BYTES + chunk, KEY_BYTES + chunk..KEY_BYTES + 2 * chunk);
        let swapped = [&whole[..KEY_BYTES], &whole[second.clone()], &whole[first.clone()], &whole[second.end..]].concat();
        let without_first = [&whole[..KEY_BYTES], &whole[second.start..]].concat();
        let mut flipped = whole.clone();
        flipped[second.start + 3] ^= 1;
        let cuts = [0, 31, 32, 40, first.end, second.end, whole.len() - 1].map(|at| whole[..at].to_vec());
        for damaged in cuts.into_iter().chain([swapped, without_first, flipped, [whole.clone(), vec![0]].concat()]) {
            assert!(matches!(opened(&secret, b"info", &damaged, 1 << 30), Err(StreamError::Seal(SealError::DoesNotOpen))));
        }
        assert!(opened(&secret, b"other", &whole, 1 << 30).is_err());
        assert!(opened(&key_pair(&[8; 32]).0, b"info", &whole, 1 << 30).is_err());
    }
}
