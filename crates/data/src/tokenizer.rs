//! Tokenizers: any `tokenizer.json` of Hugging Face's library, and training a small byte-level BPE of our own.
//!
//! Text is data: a document that spells a special token (`<|endoftext|>`) gets ordinary tokens for it, never the special id, so
//! that no document can end another. Nothing is added, cut or padded.

use std::path::Path;

use protocol::Digest;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, TokenizerImpl};

use crate::{DataError, Document};

/// Special tokens of the tokenizers that we train, in the order of their ids.
pub const START_OF_TEXT: &str = "<|startoftext|>";
pub const END_OF_TEXT: &str = "<|endoftext|>";
/// Names under which tokenizers have an end of text, tried in this order.
const END_OF_TEXT_NAMES: &[&str] = &[END_OF_TEXT, "<|end_of_text|>", "</s>"];
/// Largest `tokenizer.json` that is read; those of 250,000 entries have about 20 MB.
const FILE_BYTES_MAX: u64 = 128 << 20;
/// Two special tokens and the 256 bytes.
const VOCABULARY_MIN: usize = 258;
/// A pair that occurs once teaches nothing.
const PAIR_FREQUENCY_MIN: u64 = 2;

/// A loaded tokenizer.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    digest: Digest,
    vocab_size: u32,
    end_of_text: u32,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("digest", &self.digest).field("vocab_size", &self.vocab_size).finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Loads a `tokenizer.json`; `end_of_text` names the token that ends a document, if it has an unusual name.
    ///
    /// # Errors
    /// The file is unreadable, no tokenizer, or without an end of text.
    pub fn load(path: &Path, end_of_text: Option<&str>) -> Result<Self, DataError> {
        let length = std::fs::metadata(path).map_err(DataError::reading(path))?.len();
        if length > FILE_BYTES_MAX {
            let reason = format!("it has {length} bytes, more than {FILE_BYTES_MAX}");
            return Err(DataError::Tokenizer { path: path.to_owned(), reason });
        }
        let bytes = std::fs::read(path).map_err(DataError::reading(path))?;
        Self::from_bytes(&bytes, end_of_text).map_err(|error| match error {
            DataError::Tokenizer { reason, .. } => DataError::Tokenizer { path: path.to_owned(), reason },
            other => other,
        })
    }

    /// The same from the bytes of such a file.
    ///
    /// # Errors
    /// No tokenizer, or without an end of text.
    pub fn from_bytes(bytes: &[u8], end_of_text: Option<&str>) -> Result<Self, DataError> {
        let broken = |reason: String| DataError::Tokenizer { path: "(memory)".into(), reason };
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(|error| broken(error.to_string()))?;
        inner.with_truncation(None).map_err(|error| broken(error.to_string()))?;
        inner.with_padding(None);
        inner.set_encode_special_tokens(true);
        let names = end_of_text.map_or(END_OF_TEXT_NAMES.to_vec(), |name| vec![name]);
        let missing = || DataError::NoEndOfText { token: names.join("`, `") };
        let end_of_text = names.iter().find_map(|name| inner.token_to_id(name)).ok_or_else(missing)?;
        // Ids may have gaps: what counts is the largest.
        let largest = inner.get_vocab(true).into_values().max().unwrap_or(0);
        let vocab_size = largest.checked_add(1).ok_or_else(|| broken("an id is out of range".to_owned()))?;
        Ok(Self { inner, digest: Digest::blake3(bytes), vocab_size, end_of_text })
    }

    /// BLAKE3 of the file.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// One more than the largest id.
    pub fn vocab_size(&self) -> u32 {
        self.vocab_size
    }

    /// The id that follows each document.
    pub fn end_of_text(&self) -> u32 {
        self.end_of_text
    }

    /// Token ids of a text, nothing added.
    ///
    /// # Errors
    /// The tokenizer's model fails on it.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, DataError> {
        let failed = |error: tokenizers::Error| DataError::Encode { document: "(text)".to_owned(), reason: error.to_string() };
        Ok(self.inner.encode_fast(text, false).map_err(failed)?.get_ids().to_vec())
    }

    /// Token ids of several documents, in their order, on all cores.
    ///
    /// # Errors
    /// The tokenizer's model fails on one of them.
    pub fn encode_batch(&self, documents: &[Document]) -> Result<Vec<Vec<u32>>, DataError> {
        let texts: Vec<&str> = documents.iter().map(|document| document.text.as_str()).collect();
        let failed = |error: tokenizers::Error| {
            let document = documents.first().map_or(String::new(), |document| format!("{} or one of the next", document.id));
            DataError::Encode { document, reason: error.to_string() }
        };
        let encodings = self.inner.encode_batch_fast(texts, false).map_err(failed)?;
        Ok(encodings.into_iter().map(|encoding| encoding.get_ids().to_vec()).collect())
    }

    /// Text of some ids; special tokens are left out.
    ///
    /// # Errors
    /// The tokenizer's decoder fails on them.
    pub fn decode(&self, ids: &[u32]) -> Result<String, DataError> {
        let failed = |error: tokenizers::Error| DataError::Encode { document: "(ids)".to_owned(), reason: error.to_string() };
        self.inner.decode(ids, true).map_err(failed)
    }
}

/// Trains a byte-level BPE of exactly `vocab_size` entries and gives its `tokenizer.json`. Id 0 is [`START_OF_TEXT`], id 1 is
/// [`END_OF_TEXT`], then the 256 bytes. The same documents give the same file.
///
/// # Errors
/// A document cannot be read, the vocabulary is too small for the bytes, or the text too short for the vocabulary.
pub fn train(documents: impl Iterator<Item = Result<Document, DataError>>, vocab_size: usize) -> Result<Vec<u8>, DataError> {
    let refused = |reason: String, hint: &'static str| DataError::Vocabulary { asked: vocab_size, reason, hint };
    if vocab_size < VOCABULARY_MIN {
        return Err(refused(format!("{VOCABULARY_MIN} are needed for the bytes and the special tokens"), "ask for more entries"));
    }
    let texts: Vec<String> = documents.map(|document| document.map(|document| document.text)).collect::<Result<_, _>>()?;
    let specials = [START_OF_TEXT, END_OF_TEXT].map(|token| AddedToken::from(token, true)).to_vec();
    let mut trainer = BpeTrainerBuilder::new()
        .vocab_size(vocab_size)
        .min_frequency(PAIR_FREQUENCY_MIN)
        .show_progress(false)
        .special_tokens(specials)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    let mut tokenizer: TokenizerImpl<BPE, NormalizerWrapper, ByteLevel, ByteLevel, ByteLevel> = TokenizerImpl::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true))).with_decoder(Some(ByteLevel::default()));
    let failed = |error: tokenizers::Error| refused(error.to_string(), "check the inputs");
    tokenizer.train(&mut trainer, texts.iter()).map_err(failed)?;
    let reached = tokenizer.get_vocab_size(true);
    if reached != vocab_size {
        return Err(refused(format!("the text yields only {reached}"), "give it more text or ask for fewer entries"));
    }
    Ok(tokenizer.to_string(false).map_err(failed)?.into_bytes())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A tokenizer of 280 entries for tests of other modules.
    pub(crate) fn small() -> Vec<u8> {
        train(sample(), 280).unwrap()
    }

    fn sample() -> impl Iterator<Item = Result<Document, DataError>> {
        let texts =
            ["the state of the union is strong, the states of the union are many", "the union of the states, the strength of the state"];
        texts.into_iter().cycle().take(8).map(|text| Ok(Document { id: "x".to_owned(), text: text.to_owned() }))
    }

    #[test]
    fn training_twice_gives_the_same_file_with_the_special_tokens_first() {
        let bytes = small();
        assert_eq!(bytes, small());
        let tokenizer = Tokenizer::from_bytes(&bytes, None).unwrap();
        assert_eq!((tokenizer.vocab_size(), tokenizer.end_of_text()), (280, 1));
        assert_eq!(tokenizer.inner.token_to_id(START_OF_TEXT), Some(0));
    }

    #[test]
    fn any_text_survives_encoding_and_decoding() {
        let tokenizer = Tokenizer::from_bytes(&small(), None).unwrap();
        for text in ["the state of the union", " leading  spaces\n\tand\r\nlines", "Grüße, 日本 🚀", ""] {
            let ids = tokenizer.encode(text).unwrap();
            assert!(ids.iter().all(|id| *id < 280 && *id > 1));
            assert_eq!(tokenizer.decode(&ids).unwrap(), text);
        }
        assert!(tokenizer.encode("the state of the union").unwrap().len() < 15, "nothing was merged");
    }

    #[test]
    fn a_text_cannot_spell_the_end_of_a_document() {
        let tokenizer = Tokenizer::from_bytes(&small(), None).unwrap();
        let ids = tokenizer.encode("a<|endoftext|>b").unwrap();
        assert!(!ids.contains(&tokenizer.end_of_text()));
        assert_eq!(tokenizer.decode(&ids).unwrap(), "a<|endoftext|>b");
    }

    #[test]
    fn too_small_a_vocabulary_or_too_little_text_is_an_error_with_a_hint() {
        assert!(train(sample(), 100).unwrap_err().to_string().contains("hint: ask for more"));
        assert!(train(sample(), 60_000).unwrap_err().to_string().contains("hint: give it more text"));
    }

    #[test]
    fn what_is_no_tokenizer_or_has_no_end_of_text_is_refused() {
        assert!(matches!(Tokenizer::from_bytes(b"{}", None), Err(DataError::Tokenizer { .. })));
        assert!(matches!(Tokenizer::from_bytes(&small(), Some("<eot>")), Err(DataError::NoEndOfText { .. })));
        assert!(matches!(Tokenizer::load(Path::new("/nonexistent"), None), Err(DataError::Unreadable { .. })));
    }
}
