//! Inputs to documents: a text file is one document, a JSONL line is one document, a folder is its files in name order.
//!
//! Files are read as streams, one document in memory at a time; `.xz` and `.gz` are decoded on the way.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::read::MultiGzDecoder;
use lzma_rust2::XzReader;
use serde::Deserialize;

use crate::DataError;

/// Longest document that is taken.
pub const DOCUMENT_BYTES_MAX: usize = 64 << 20;
/// Memory that decoding an `.xz` file may take, in KiB.
const XZ_MEMORY_KIB: u32 = 256 << 10;

/// A piece of text that belongs together; never split between training and held-out rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// The `id` of its JSONL line, the file's name without endings, or file name and line number.
    pub id: String,
    pub text: String,
}

/// Streams the documents of some inputs in a fixed order.
pub struct Documents {
    files: VecDeque<PathBuf>,
    lines: Option<Lines>,
}

/// The JSONL file that is being read.
struct Lines {
    path: PathBuf,
    reader: Box<dyn BufRead + Send>,
    line: usize,
}

/// What a file name says about its content.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    Text,
    Lines,
}

impl Documents {
    /// Lists the files of the inputs: a file as it is, a folder's known files at any depth in byte order of their paths.
    ///
    /// # Errors
    /// An input does not exist, is of an unknown form, or a folder holds no known file.
    pub fn open(inputs: &[PathBuf]) -> Result<Self, DataError> {
        let mut files = VecDeque::new();
        for input in inputs {
            let metadata = std::fs::metadata(input).map_err(DataError::reading(input))?;
            if metadata.is_dir() {
                let mut found = Vec::new();
                list(input, &mut found)?;
                if found.is_empty() {
                    return Err(DataError::NoText { path: input.clone() });
                }
                found.sort();
                files.extend(found);
            } else if form(input).is_some() {
                files.push_back(input.clone());
            } else {
                return Err(DataError::UnknownInput { path: input.clone() });
            }
        }
        Ok(Self { files, lines: None })
    }

    fn next_document(&mut self) -> Result<Option<Document>, DataError> {
        loop {
            if let Some(lines) = &mut self.lines {
                if let Some(document) = lines.next_document()? {
                    return Ok(Some(document));
                }
                self.lines = None;
            }
            let Some(path) = self.files.pop_front() else { return Ok(None) };
            let reader = decoded(&path)?;
            if form(&path) == Some(Form::Lines) {
                self.lines = Some(Lines { path, reader, line: 0 });
                continue;
            }
            let text = read_text(&path, reader)?;
            if !text.trim().is_empty() {
                return Ok(Some(Document { id: stem(&path).to_owned(), text }));
            }
        }
    }
}

impl Iterator for Documents {
    type Item = Result<Document, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.next_document().transpose()
    }
}

#[derive(Deserialize)]
struct JsonLine {
    text: String,
    #[serde(default)]
    id: Option<JsonId>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum JsonId {
    Number(u64),
    Text(String),
}

impl Lines {
    fn next_document(&mut self) -> Result<Option<Document>, DataError> {
        let mut bytes = Vec::new();
        loop {
            bytes.clear();
            let limit = DOCUMENT_BYTES_MAX as u64 + 1;
            let read = self.reader.by_ref().take(limit).read_until(b'\n', &mut bytes).map_err(DataError::reading(&self.path))?;
            if read == 0 {
                return Ok(None);
            }
            if bytes.len() > DOCUMENT_BYTES_MAX {
                return Err(DataError::DocumentTooLong { path: self.path.clone(), limit: DOCUMENT_BYTES_MAX });
            }
            self.line += 1;
            if bytes.trim_ascii().is_empty() {
                continue;
            }
            let wrong = |error: serde_json::Error| DataError::Line { path: self.path.clone(), line: self.line, reason: error.to_string() };
            let parsed: JsonLine = serde_json::from_slice(&bytes).map_err(wrong)?;
            if parsed.text.trim().is_empty() {
                continue;
            }
            let id = match parsed.id {
                Some(JsonId::Text(id)) => id,
                Some(JsonId::Number(id)) => id.to_string(),
                None => format!("{}:{}", stem(&self.path), self.line),
            };
            return Ok(Some(Document { id, text: parsed.text }));
        }
    }
}

fn list(folder: &Path, found: &mut Vec<PathBuf>) -> Result<(), DataError> {
    for entry in std::fs::read_dir(folder).map_err(DataError::reading(folder))? {
        let entry = entry.map_err(DataError::reading(folder))?;
        let (path, kind) = (entry.path(), entry.file_type().map_err(DataError::reading(folder))?);
        // Links are not followed: a loop of them would never end.
        if kind.is_dir() {
            list(&path, found)?;
        } else if kind.is_file() && form(&path).is_some() {
            found.push(path);
        }
    }
    Ok(())
}

fn file_name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

fn without_compression(name: &str) -> &str {
    name.strip_suffix(".xz").or_else(|| name.strip_suffix(".gz")).unwrap_or(name)
}

fn form(path: &Path) -> Option<Form> {
    let name = without_compression(file_name(path));
    match name.rsplit_once('.')?.1 {
        "txt" => Some(Form::Text),
        "jsonl" | "ndjson" => Some(Form::Lines),
        _ => None,
    }
}

fn stem(path: &Path) -> &str {
    let name = without_compression(file_name(path));
    name.rsplit_once('.').map_or(name, |(stem, _)| stem)
}

fn decoded(path: &Path) -> Result<Box<dyn BufRead + Send>, DataError> {
    let file = File::open(path).map_err(DataError::reading(path))?;
    let name = file_name(path);
    Ok(if name.ends_with(".xz") {
        Box::new(BufReader::new(XzReader::new_mem_limit(BufReader::new(file), true, XZ_MEMORY_KIB)))
    } else if name.ends_with(".gz") {
        Box::new(BufReader::new(MultiGzDecoder::new(file)))
    } else {
        Box::new(BufReader::new(file))
    })
}

fn read_text(path: &Path, reader: impl Read) -> Result<String, DataError> {
    let mut bytes = Vec::new();
    reader.take(DOCUMENT_BYTES_MAX as u64 + 1).read_to_end(&mut bytes).map_err(DataError::reading(path))?;
    if bytes.len() > DOCUMENT_BYTES_MAX {
        return Err(DataError::DocumentTooLong { path: path.to_owned(), limit: DOCUMENT_BYTES_MAX });
    }
    let not_text = |error: std::string::FromUtf8Error| DataError::NotText { path: path.to_owned(), at: error.utf8_error().valid_up_to() };
    String::from_utf8(bytes).map_err(not_text)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn ids(inputs: &[PathBuf]) -> Vec<String> {
        Documents::open(inputs).unwrap().map(|document| document.unwrap().id).collect()
    }

    fn gz(text: &str) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(text.as_bytes()).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn a_folder_gives_its_documents_in_name_order_whatever_their_form() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| std::fs::write(folder.path().join(name), bytes).unwrap();
        std::fs::create_dir(folder.path().join("b")).unwrap();
        write("c.txt", b"text of c");
        write("b/inner.jsonl", b"{\"id\": 7, \"text\": \"x\"}\n\n{\"text\": \"y\", \"date\": \"1790\"}\n{\"text\": \" \"}\n");
        write("a.jsonl.gz", &gz("{\"id\": \"first\", \"text\": \"z\"}"));
        write("empty.txt", b" \n");
        write("notes.md", b"not an input");
        assert_eq!(ids(&[folder.path().to_owned()]), ["first", "7", "inner:3", "c"]);
        let texts: Vec<_> = Documents::open(&[folder.path().join("c.txt")]).unwrap().map(|d| d.unwrap().text).collect();
        assert_eq!(texts, ["text of c"]);
    }

    #[test]
    fn unusable_inputs_are_named_with_a_hint() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        std::fs::write(path("a.pdf"), b"%PDF").unwrap();
        std::fs::write(path("bad.txt"), [b'a', 0xff]).unwrap();
        std::fs::write(path("bad.jsonl"), b"{\"text\": \"a\"}\n{\"txt\": \"b\"}\n").unwrap();
        std::fs::write(path("cut.jsonl.gz"), &gz(&"{\"text\": \"abcdefg\"}\n".repeat(50))[..40]).unwrap();
        std::fs::write(path("no.txt.xz"), b"this is not xz").unwrap();
        let error = |name: &str| match Documents::open(&[path(name)]) {
            Err(error) => error,
            Ok(documents) => documents.filter_map(Result::err).next().unwrap(),
        };
        assert!(matches!(error("missing.txt"), DataError::Unreadable { .. }));
        assert!(matches!(error("a.pdf"), DataError::UnknownInput { .. }));
        assert!(matches!(error("bad.txt"), DataError::NotText { at: 1, .. }));
        assert!(matches!(error("bad.jsonl"), DataError::Line { line: 2, .. }));
        assert!(matches!(error("cut.jsonl.gz"), DataError::Unreadable { .. }));
        assert!(matches!(error("no.txt.xz"), DataError::Unreadable { .. }));
        for name in ["missing.txt", "a.pdf", "bad.txt", "bad.jsonl"] {
            assert!(error(name).to_string().contains("\nhint: "), "{name}");
        }
    }
}
