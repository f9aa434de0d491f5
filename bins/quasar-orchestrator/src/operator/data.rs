//! `data prepare | train-tokenizer | publish`.

use std::path::PathBuf;

use bytes::Bytes;
use daemon::Failure;
use data::catalog::Catalog;
use data::documents::Documents;
use data::prepare::{HeldOut, PrepareSettings, prepare as prepare_shards};
use storage::{PutCondition, StoreError, transfer};

use crate::office::{Office, unserved};

/// Turn text, JSONL or folders of them into token shards
#[derive(Debug, clap::Args)]
pub struct PrepareArgs {
    /// Text files, JSONL files with a "text" field, or folders; .gz and .xz are read as they are
    #[arg(long, value_name = "PATH", required = true, num_args = 1..)]
    input: Vec<PathBuf>,
    /// tokenizer.json of the model
    #[arg(long, value_name = "FILE")]
    tokenizer: PathBuf,
    /// Tokens of a row
    #[arg(long, value_name = "N")]
    sequence_length: u32,
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// File with ids of documents that are held out, one a line
    #[arg(long, value_name = "FILE", conflicts_with = "held_out_one_in")]
    held_out: Option<PathBuf>,
    /// Hold out one document in N, chosen by the digest of its id
    #[arg(long, value_name = "N")]
    held_out_one_in: Option<u64>,
    /// Put training rows into a random order inside each shard; the same seed gives the same order
    #[arg(long, value_name = "SEED")]
    shuffle_seed: Option<u64>,
    /// Start of the shards' names
    #[arg(long, value_name = "NAME", default_value = "shard")]
    name: String,
    /// Tokens of a shard
    #[arg(long, value_name = "N", default_value_t = 67_108_864)]
    shard_tokens: u64,
    /// Licence of the text, for the manifests
    #[arg(long, value_name = "TEXT")]
    licence: String,
    /// Where the text comes from, for the manifests
    #[arg(long, value_name = "TEXT")]
    source: String,
    /// Name of the tokenizer's end-of-text token, if it has an unusual one
    #[arg(long, value_name = "TOKEN")]
    end_of_text: Option<String>,
}

pub fn prepare(arguments: PrepareArgs) -> Result<(), Failure> {
    let held_out = match (&arguments.held_out, arguments.held_out_one_in) {
        (Some(file), _) => HeldOut::ids_from_file(file).map_err(Failure::configuration)?,
        (None, Some(n)) => HeldOut::OneIn(n),
        (None, None) => HeldOut::None,
    };
    let catalog = prepare_shards(&PrepareSettings {
        inputs: arguments.input,
        tokenizer: arguments.tokenizer,
        end_of_text: arguments.end_of_text,
        sequence_length: arguments.sequence_length,
        held_out,
        shard_tokens: arguments.shard_tokens,
        shuffle_seed: arguments.shuffle_seed,
        name: arguments.name,
        licence: arguments.licence,
        source: arguments.source,
        out: arguments.out.clone(),
    })
    .map_err(Failure::configuration)?;
    println!(
        "prepared {} training rows and {} held-out rows of {} tokens in {} shards under {}",
        catalog.training.rows,
        catalog.held_out.rows,
        catalog.sequence_length,
        catalog.shards.len(),
        arguments.out.display()
    );
    Ok(())
}

/// Train a byte-level BPE tokenizer
#[derive(Debug, clap::Args)]
pub struct TrainTokenizerArgs {
    #[arg(long, value_name = "PATH", required = true, num_args = 1..)]
    input: Vec<PathBuf>,
    /// File with ids of documents that are left out, one a line
    #[arg(long, value_name = "FILE")]
    held_out: Option<PathBuf>,
    #[arg(long, value_name = "N", default_value_t = 4096)]
    vocab_size: usize,
    /// tokenizer.json to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

pub fn train_tokenizer(arguments: &TrainTokenizerArgs) -> Result<(), Failure> {
    let documents = Documents::open(&arguments.input).map_err(Failure::configuration)?;
    let held_out = match &arguments.held_out {
        Some(file) => HeldOut::ids_from_file(file).map_err(Failure::configuration)?,
        None => HeldOut::None,
    };
    let documents = documents.filter(|document| document.as_ref().map_or(true, |document| !held_out.contains(&document.id)));
    let json = data::tokenizer::train(documents, arguments.vocab_size).map_err(Failure::configuration)?;
    std::fs::write(&arguments.out, json)
        .map_err(|error| Failure::unavailable(anyhow::anyhow!("{} cannot be written: {error}", arguments.out.display())))?;
    println!("wrote {}", arguments.out.display());
    Ok(())
}

/// Upload prepared shards and sign their manifests
#[derive(Debug, clap::Args)]
pub struct PublishArgs {
    /// Folder that `data prepare` wrote
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
}

pub async fn publish(office: &Office, arguments: PublishArgs) -> Result<(), Failure> {
    let catalog = Catalog::load(&arguments.dir).map_err(Failure::configuration)?;
    for shard in &catalog.shards {
        let path = Catalog::tokens_path(&arguments.dir, shard);
        if !transfer::is_complete(&shard.file, &path)
            .map_err(|error| Failure::configuration(anyhow::anyhow!("{}: {error}", path.display())))?
        {
            return Err(Failure::configuration(anyhow::anyhow!("{} is not the file that the catalog describes", path.display()))
                .hint("run `data prepare` again"));
        }
        let hint = "the name of a shard holds a digest of its tokens, and other bytes lie there: delete the object, then publish again";
        office.upload_once(&office.keys.shard_tokens(&shard.id), &shard.file, &path, hint).await?;
        // The id holds a digest of the tokens: what is there already says the same.
        let manifest = Bytes::from(office.sign(shard, &office.context));
        match office.store.put(&office.keys.shard_manifest(&shard.id), manifest, PutCondition::IfAbsent).await {
            Ok(_) | Err(StoreError::PreconditionFailed { .. }) => {}
            Err(error) => return Err(unserved(error)),
        }
        println!("published shard {} ({} rows{})", shard.id, shard.rows, if shard.held_out { ", held out" } else { "" });
    }
    Ok(())
}
