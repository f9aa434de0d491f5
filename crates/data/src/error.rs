//! What can go wrong between text and token rows.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

#[derive(Debug, thiserror::Error)]
pub enum DataError {
    #[error("{} cannot be read: {source}\nhint: check the path and its permissions", path.display())]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error("{} cannot be written: {source}\nhint: check the folder and its permissions", path.display())]
    Unwritable { path: PathBuf, source: std::io::Error },
    #[error("the disk that holds {} is full\nhint: free space there and run the command again", path.display())]
    DiskFull { path: PathBuf },
    #[error("{} is not an input that is understood\nhint: folders, .txt, .jsonl, and these as .xz or .gz are", path.display())]
    UnknownInput { path: PathBuf },
    #[error("{} holds no text\nhint: the inputs contain no document with any characters", path.display())]
    NoText { path: PathBuf },
    #[error("line {line} of {} is not usable: {reason}\nhint: a line is one JSON object with the text in \"text\" and, if there is one, a name in \"id\"", path.display())]
    Line { path: PathBuf, line: usize, reason: String },
    #[error("{} is not valid UTF-8 text (near byte {at})\nhint: convert it first, or remove it from the inputs", path.display())]
    NotText { path: PathBuf, at: usize },
    #[error("a document in {} is longer than {limit} bytes\nhint: split it into several documents", path.display())]
    DocumentTooLong { path: PathBuf, limit: usize },
    #[error("{} is not a tokenizer: {reason}\nhint: a tokenizer.json of Hugging Face's `tokenizers` library is needed", path.display())]
    Tokenizer { path: PathBuf, reason: String },
    #[error("the tokenizer has no token `{token}` to end a document\nhint: name its end-of-text token with --end-of-text")]
    NoEndOfText { token: String },
    #[error("the tokenizer failed on document `{document}`: {reason}")]
    Encode { document: String, reason: String },
    #[error("a vocabulary of {asked} entries cannot be trained: {reason}\nhint: {hint}")]
    Vocabulary { asked: usize, reason: String, hint: &'static str },
    #[error("`{id}` is to be held out, but no document has this id\nhint: ids are the \"id\" of a JSONL line or the name of a text file")]
    HeldOutUnknown { id: String },
    #[error("the {what} is not usable: {reason}")]
    Setting { what: &'static str, reason: String },
    #[error("{} already holds a prepared data set\nhint: choose another --out; shards that were published must never change", path.display())]
    OutputExists { path: PathBuf },
    #[error("{} is not a catalog of shards: {reason}\nhint: `data prepare` writes it", path.display())]
    Catalog { path: PathBuf, reason: String },
    #[error("the shard {} is not usable: {reason}\nhint: fetch or prepare it again", path.display())]
    Shard { path: PathBuf, reason: String },
    #[error(
        "token {token} at position {position} of row {row} is outside the vocabulary of {vocab_size}\nhint: the shard was made with another tokenizer"
    )]
    TokenOutside { token: u32, row: u64, position: usize, vocab_size: u32 },
    #[error("row {row} does not exist: there are {rows}")]
    NoRow { row: u64, rows: u64 },
}

impl DataError {
    pub(crate) fn reading(path: &Path) -> impl Fn(std::io::Error) -> Self {
        move |source| Self::Unreadable { path: path.to_owned(), source }
    }

    pub(crate) fn writing(path: &Path) -> impl Fn(std::io::Error) -> Self {
        move |source| match source.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Self::DiskFull { path: path.to_owned() },
            _ => Self::Unwritable { path: path.to_owned(), source },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_told_apart_from_other_failures() {
        let failed = |kind: ErrorKind| DataError::writing(Path::new("/data"))(kind.into());
        assert!(matches!(failed(ErrorKind::StorageFull), DataError::DiskFull { .. }));
        assert!(failed(ErrorKind::QuotaExceeded).to_string().contains("hint: free space"));
        assert!(matches!(failed(ErrorKind::PermissionDenied), DataError::Unwritable { .. }));
    }
}
