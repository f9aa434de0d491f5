//! Text to token shards.
//!
//! Documents are tokenised in input order and concatenated, each followed by the end-of-text token; the stream is cut into rows
//! of `sequence_length` tokens and rows into shards. A row that a document does not fill goes on with the next one, also from
//! one shard to the next; only what is left after the last document is dropped, and counted. Held-out documents make a stream
//! of their own, so that no row mixes the two sides.
//!
//! The output folder holds `shards/ID/{tokens.bin, manifest.json}`, `tokenizer.json` and, written last, `catalog.json`. A
//! shard's id ends in its digest: other content gets another id, and the same inputs give the same bytes everywhere.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use protocol::{Digest, ShardManifest};

use crate::catalog::{CATALOG_FILE, Catalog, MANIFEST_FILE, SHARDS_FOLDER, Split, TOKENIZER_FILE, TOKENS_FILE, is_key_segment};
use crate::{DataError, Document, Documents, ShardWriter, Tokenizer};

/// Tokens of a shard unless the operator says otherwise.
pub const SHARD_TOKENS_DEFAULT: u64 = 1 << 26;
/// Longest row.
const SEQUENCE_LENGTH_MAX: u32 = 1 << 20;
/// Documents that are tokenised together, bounded in number and text.
const BATCH_DOCUMENTS: usize = 256;
const BATCH_BYTES: usize = 8 << 20;
/// Hexadecimal characters of the digest in a shard's id.
const ID_DIGEST_CHARS: usize = 16;

/// Which documents are held out, always whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HeldOut {
    None,
    /// The documents with these ids.
    Ids(BTreeSet<String>),
    /// One in this many, by the digest of the id: the same documents whatever else is in the inputs.
    OneIn(u64),
}

impl HeldOut {
    /// Reads ids from a file, one a line; empty lines and lines that start with `#` are skipped.
    ///
    /// # Errors
    /// The file is unreadable or names nothing.
    pub fn ids_from_file(path: &Path) -> Result<Self, DataError> {
        let text = fs::read_to_string(path).map_err(DataError::reading(path))?;
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        let ids: BTreeSet<String> = lines.map(str::to_owned).collect();
        if ids.is_empty() {
            return Err(DataError::Setting { what: "list of held-out documents", reason: format!("{} names none", path.display()) });
        }
        Ok(Self::Ids(ids))
    }

    /// Whether a document with this id is held out.
    pub fn contains(&self, id: &str) -> bool {
        match self {
            Self::None => false,
            Self::Ids(ids) => ids.contains(id),
            Self::OneIn(n) => {
                let digest = Digest::derive("quasar held-out document", &[id.as_bytes()]);
                let number = digest.0.first_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes));
                number.is_multiple_of(*n)
            }
        }
    }

    fn describe(&self) -> String {
        match self {
            Self::None => "none".to_owned(),
            Self::Ids(ids) => format!("{} documents by id", ids.len()),
            Self::OneIn(n) => format!("one document in {n}, by digest of its id"),
        }
    }
}

/// What to prepare.
#[derive(Clone, Debug)]
pub struct PrepareSettings {
    /// Text files, JSONL files, folders; see [`crate::documents`].
    pub inputs: Vec<PathBuf>,
    /// A `tokenizer.json`.
    pub tokenizer: PathBuf,
    /// Name of its end-of-text token, if it has an unusual one.
    pub end_of_text: Option<String>,
    pub sequence_length: u32,
    pub held_out: HeldOut,
    /// Tokens of a shard, rounded down to whole rows, at least one.
    pub shard_tokens: u64,
    /// Training rows are put into random order inside each shard, so that a range of rows is a fair sample of the text; `None` keeps
    /// the order of the documents. A shard is held in memory for it.
    pub shuffle_seed: Option<u64>,
    /// Start of the shards' ids: letters, digits, `.`, `_`, `=`, `-`.
    pub name: String,
    /// Licence and source of the text, for the manifests.
    pub licence: String,
    pub source: String,
    /// Output folder; must not hold a prepared data set.
    pub out: PathBuf,
}

/// Prepares a data set; see the module's text.
///
/// # Errors
/// Unusable settings, inputs or tokenizer, or a disk that fails. Without `catalog.json` a folder counts as unfinished: the next
/// call starts it anew.
pub fn prepare(settings: &PrepareSettings) -> Result<Catalog, DataError> {
    check(settings)?;
    let tokenizer = Tokenizer::load(&settings.tokenizer, settings.end_of_text.as_deref())?;
    let documents = Documents::open(&settings.inputs)?;
    let shards = clear_output(&settings.out)?;
    let mut sides = [false, true].map(|held_out| Side::new(settings, &tokenizer, &shards, held_out));
    let mut unseen = match &settings.held_out {
        HeldOut::Ids(ids) => ids.clone(),
        _ => BTreeSet::new(),
    };
    let (mut batch, mut bytes) = (Vec::new(), 0);
    for document in documents {
        let document = document?;
        unseen.remove(&document.id);
        bytes += document.text.len();
        batch.push(document);
        if batch.len() >= BATCH_DOCUMENTS || bytes >= BATCH_BYTES {
            take_batch(&batch, settings, &tokenizer, &mut sides)?;
            batch.clear();
            bytes = 0;
        }
    }
    take_batch(&batch, settings, &tokenizer, &mut sides)?;
    if let Some(id) = unseen.pop_first() {
        return Err(DataError::HeldOutUnknown { id });
    }
    let [training, held_out] = sides.map(Side::finish);
    let ((training, mut manifests), (held_out, held_out_manifests)) = (training?, held_out?);
    if manifests.is_empty() {
        let path = settings.inputs.first().cloned().unwrap_or_default();
        return Err(DataError::NoText { path });
    }
    manifests.extend(held_out_manifests);
    let catalog = Catalog {
        version: Catalog::VERSION,
        tokenizer: tokenizer.digest(),
        vocab_size: tokenizer.vocab_size(),
        end_of_text: tokenizer.end_of_text(),
        sequence_length: settings.sequence_length,
        held_out_rule: settings.held_out.describe(),
        training,
        held_out,
        shards: manifests,
    };
    let copied = fs::read(&settings.tokenizer).map_err(DataError::reading(&settings.tokenizer))?;
    write_durably(&settings.out.join(TOKENIZER_FILE), &copied)?;
    write_json(&settings.out.join(CATALOG_FILE), &catalog)?;
    Ok(catalog)
}

fn check(settings: &PrepareSettings) -> Result<(), DataError> {
    let refuse = |what, reason: &str| Err(DataError::Setting { what, reason: reason.to_owned() });
    if settings.inputs.is_empty() {
        return refuse("list of inputs", "it is empty");
    }
    if !(2..=SEQUENCE_LENGTH_MAX).contains(&settings.sequence_length) {
        return refuse("sequence length", "from 2 to 1048576 tokens are possible");
    }
    if settings.held_out == HeldOut::OneIn(0) {
        return refuse("held-out share", "one document in none");
    }
    // Room for the side, a number and the digest within a segment.
    if !is_key_segment(&settings.name) || settings.name.len() > 64 {
        return refuse("name", "up to 64 letters, digits and ._=- are possible");
    }
    Ok(())
}

/// Makes the output folder ready and gives its folder of shards.
fn clear_output(out: &Path) -> Result<PathBuf, DataError> {
    if out.join(CATALOG_FILE).exists() {
        return Err(DataError::OutputExists { path: out.to_owned() });
    }
    let shards = out.join(SHARDS_FOLDER);
    if shards.exists() {
        fs::remove_dir_all(&shards).map_err(DataError::writing(&shards))?;
    }
    fs::create_dir_all(&shards).map_err(DataError::writing(&shards))?;
    Ok(shards)
}

fn take_batch(batch: &[Document], settings: &PrepareSettings, tokenizer: &Tokenizer, sides: &mut [Side<'_>; 2]) -> Result<(), DataError> {
    for (document, tokens) in batch.iter().zip(tokenizer.encode_batch(batch)?) {
        let side = usize::from(settings.held_out.contains(&document.id));
        sides[side].take(&tokens)?;
    }
    Ok(())
}

/// One of the two streams: training or held-out.
struct Side<'a> {
    settings: &'a PrepareSettings,
    tokenizer: &'a Tokenizer,
    shards: &'a Path,
    held_out: bool,
    rows_per_shard: u64,
    /// Tokens that do not fill a row yet.
    rest: Vec<u32>,
    writer: Option<(PathBuf, ShardWriter)>,
    /// Rows of the shard that waits to be shuffled.
    waiting: Vec<u32>,
    split: Split,
    manifests: Vec<ShardManifest>,
}

impl<'a> Side<'a> {
    fn new(settings: &'a PrepareSettings, tokenizer: &'a Tokenizer, shards: &'a Path, held_out: bool) -> Self {
        Self {
            settings,
            tokenizer,
            shards,
            held_out,
            rows_per_shard: (settings.shard_tokens / u64::from(settings.sequence_length)).max(1),
            rest: Vec::new(),
            writer: None,
            waiting: Vec::new(),
            split: Split::default(),
            manifests: Vec::new(),
        }
    }

    fn name(&self) -> &'static str {
        if self.held_out { "heldout" } else { "train" }
    }

    fn take(&mut self, tokens: &[u32]) -> Result<(), DataError> {
        self.split.documents += 1;
        self.rest.extend_from_slice(tokens);
        self.rest.push(self.tokenizer.end_of_text());
        let row_tokens = self.settings.sequence_length as usize;
        let stream = std::mem::take(&mut self.rest);
        let rows = stream.chunks_exact(row_tokens);
        self.rest = rows.remainder().to_vec();
        for row in rows {
            self.push(row)?;
        }
        Ok(())
    }

    fn push(&mut self, row: &[u32]) -> Result<(), DataError> {
        let Some(seed) = self.settings.shuffle_seed.filter(|_| !self.held_out) else { return self.write(row) };
        self.waiting.extend_from_slice(row);
        if self.waiting.len() as u64 == self.rows_per_shard * row.len() as u64 {
            self.write_shuffled(seed)?;
        }
        Ok(())
    }

    /// Writes the waiting rows in an order that seed and number of the shard give.
    fn write_shuffled(&mut self, seed: u64) -> Result<(), DataError> {
        let row_tokens = self.settings.sequence_length as usize;
        let rows = std::mem::take(&mut self.waiting);
        let number = self.manifests.len() as u64;
        let key = Digest::derive("quasar/v1/shuffle", &[&seed.to_le_bytes(), &number.to_le_bytes()]);
        for row in protocol::lease::row_order(&key, (rows.len() / row_tokens) as u32) {
            let start = row as usize * row_tokens;
            self.write(&rows[start..start + row_tokens])?;
        }
        Ok(())
    }

    fn write(&mut self, row: &[u32]) -> Result<(), DataError> {
        let (folder, mut writer) = match self.writer.take() {
            Some(open) => open,
            None => {
                let folder = self.shards.join(format!(".unfinished-{}", self.name()));
                fs::create_dir(&folder).map_err(DataError::writing(&folder))?;
                let writer = ShardWriter::create(&folder.join(TOKENS_FILE), self.settings.sequence_length)?;
                (folder, writer)
            }
        };
        writer.push(row)?;
        if writer.rows() == self.rows_per_shard {
            return self.close(folder, writer);
        }
        self.writer = Some((folder, writer));
        Ok(())
    }

    /// Ends a shard: record, id, manifest, then the folder gets its name.
    fn close(&mut self, folder: PathBuf, writer: ShardWriter) -> Result<(), DataError> {
        let rows = writer.rows();
        let file = writer.finish(TOKENS_FILE)?;
        let digest = file.blake3.to_string();
        let id = format!("{}-{}-{:05}-{}", self.settings.name, self.name(), self.manifests.len(), &digest[..ID_DIGEST_CHARS]);
        let tokens = rows * u64::from(self.settings.sequence_length);
        let manifest = ShardManifest {
            id,
            rows,
            row_tokens: self.settings.sequence_length,
            tokens,
            file,
            tokenizer: self.tokenizer.digest(),
            vocab_size: self.tokenizer.vocab_size(),
            licence: self.settings.licence.clone(),
            source: self.settings.source.clone(),
            held_out: self.held_out,
        };
        write_json(&folder.join(MANIFEST_FILE), &manifest)?;
        let named = self.shards.join(&manifest.id);
        fs::rename(&folder, &named).map_err(DataError::writing(&named))?;
        self.split.rows += rows;
        self.split.tokens += tokens;
        self.manifests.push(manifest);
        Ok(())
    }

    fn finish(mut self) -> Result<(Split, Vec<ShardManifest>), DataError> {
        if let Some(seed) = self.settings.shuffle_seed {
            self.write_shuffled(seed)?;
        }
        if let Some((folder, writer)) = self.writer.take() {
            self.close(folder, writer)?;
        }
        self.split.dropped_tokens = self.rest.len() as u64;
        Ok((self.split, self.manifests))
    }
}

fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<(), DataError> {
    let mut bytes = serde_json::to_vec_pretty(value).map_err(|error| DataError::writing(path)(error.into()))?;
    bytes.push(b'\n');
    write_durably(path, &bytes)
}

/// Writes a file whole or not at all.
fn write_durably(path: &Path, bytes: &[u8]) -> Result<(), DataError> {
    let failed = DataError::writing(path);
    let temporary = path.with_extension("tmp");
    let mut file = File::create(&temporary).map_err(&failed)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(&failed)?;
    fs::rename(&temporary, path).map_err(&failed)
}

#[cfg(test)]
mod tests;
