use super::*;
use crate::{ShardReader, tokenizer};

struct Scene {
    folder: tempfile::TempDir,
}

impl Scene {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("tokenizer.json"), tokenizer::tests::small()).unwrap();
        let lines: Vec<String> = (0..20)
            .map(|i| format!("{{\"id\": \"d{i}\", \"text\": \"document {i}: {}\"}}", "the state of the union ".repeat(i + 1)))
            .collect();
        fs::write(folder.path().join("text.jsonl"), lines.join("\n")).unwrap();
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn settings(&self, out: &str) -> PrepareSettings {
        PrepareSettings {
            inputs: vec![self.path("text.jsonl")],
            tokenizer: self.path("tokenizer.json"),
            end_of_text: None,
            sequence_length: 16,
            held_out: HeldOut::Ids(["d3", "d11"].map(str::to_owned).into()),
            shard_tokens: 200,
            shuffle_seed: None,
            name: "sample".to_owned(),
            licence: "CC0-1.0".to_owned(),
            source: "made up".to_owned(),
            out: self.path(out),
        }
    }

    /// All tokens of one side as they are on disk.
    fn tokens(&self, out: &str, catalog: &Catalog, held_out: bool) -> Vec<u32> {
        let mut tokens = Vec::new();
        for shard in catalog.side(held_out) {
            let path = Catalog::tokens_path(&self.path(out), shard);
            let reader = ShardReader::open_verified(&path, shard).unwrap();
            (0..reader.rows()).for_each(|row| tokens.extend_from_slice(reader.row(row).unwrap()));
        }
        tokens
    }
}

#[test]
fn rows_are_the_documents_in_order_each_with_its_end_and_only_the_last_rest_is_dropped() {
    let scene = Scene::new();
    let catalog = prepare(&scene.settings("out")).unwrap();
    assert_eq!(catalog, Catalog::load(&scene.path("out")).unwrap());
    let tokenizer = Tokenizer::load(&scene.path("tokenizer.json"), None).unwrap();
    for held_out in [false, true] {
        let mut expected = Vec::new();
        for document in Documents::open(&[scene.path("text.jsonl")]).unwrap().map(Result::unwrap) {
            if ["d3", "d11"].contains(&document.id.as_str()) == held_out {
                expected.extend(tokenizer.encode(&document.text).unwrap());
                expected.push(tokenizer.end_of_text());
            }
        }
        let tokens = scene.tokens("out", &catalog, held_out);
        let split = if held_out { &catalog.held_out } else { &catalog.training };
        assert_eq!(tokens, expected[..tokens.len()]);
        assert_eq!(tokens.len() as u64, split.tokens);
        assert_eq!(expected.len() as u64, split.tokens + split.dropped_tokens);
        assert!(split.dropped_tokens < 16 && split.tokens == split.rows * 16);
    }
    assert_eq!((catalog.training.documents, catalog.held_out.documents), (18, 2));
    assert!(catalog.side(false).count() > 3, "the sample is meant to need several shards");
    assert!(catalog.side(false).all(|shard| shard.rows <= 12 && shard.licence == "CC0-1.0"));
}

#[test]
fn the_same_inputs_give_the_same_bytes_and_other_inputs_other_ids() {
    let scene = Scene::new();
    let (first, second) = (prepare(&scene.settings("a")).unwrap(), prepare(&scene.settings("b")).unwrap());
    assert_eq!(first, second);
    assert_eq!(scene.tokens("a", &first, false), scene.tokens("b", &second, false));
    let other = PrepareSettings { held_out: HeldOut::None, ..scene.settings("c") };
    let third = prepare(&other).unwrap();
    let ids = |catalog: &Catalog| catalog.shards.iter().map(|shard| shard.id.clone()).collect::<BTreeSet<_>>();
    assert_ne!(ids(&first), ids(&third));
    assert_eq!(third.held_out, Split::default());
}

#[test]
fn a_manifest_lies_beside_each_shard_and_nothing_unfinished_is_left() {
    let scene = Scene::new();
    let catalog = prepare(&scene.settings("out")).unwrap();
    let names: BTreeSet<String> =
        fs::read_dir(scene.path("out/shards")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(names, catalog.shards.iter().map(|shard| shard.id.clone()).collect());
    for shard in &catalog.shards {
        let bytes = fs::read(scene.path("out/shards").join(&shard.id).join(MANIFEST_FILE)).unwrap();
        assert_eq!(serde_json::from_slice::<ShardManifest>(&bytes).unwrap(), *shard);
    }
    let copied = fs::read(scene.path("out/tokenizer.json")).unwrap();
    assert_eq!(Digest::blake3(&copied), catalog.tokenizer);
}

#[test]
fn one_document_in_n_is_held_out_whatever_else_is_in_the_inputs() {
    let rule = HeldOut::OneIn(4);
    let held: Vec<usize> = (0..4000).filter(|i| rule.contains(&format!("d{i}"))).collect();
    assert!((800..1200).contains(&held.len()), "{}", held.len());
    assert!(HeldOut::OneIn(1).contains("anything") && !HeldOut::None.contains("anything"));
}

#[test]
fn an_output_that_is_finished_is_never_touched_and_an_unfinished_one_is_started_anew() {
    let scene = Scene::new();
    fs::create_dir_all(scene.path("out/shards/.unfinished-train")).unwrap();
    fs::write(scene.path("out/shards/.unfinished-train/tokens.bin"), b"half a row").unwrap();
    let catalog = prepare(&scene.settings("out")).unwrap();
    assert_eq!(fs::read_dir(scene.path("out/shards")).unwrap().count(), catalog.shards.len());
    let error = prepare(&scene.settings("out")).unwrap_err();
    assert!(matches!(error, DataError::OutputExists { .. }) && error.to_string().contains("hint: choose another --out"));
}

#[test]
fn wrong_settings_are_refused_with_the_reason() {
    let scene = Scene::new();
    let base = || scene.settings("out");
    let ids = |id: &str| HeldOut::Ids([id.to_owned()].into());
    let wrong = [
        PrepareSettings { inputs: vec![], ..base() },
        PrepareSettings { sequence_length: 1, ..base() },
        PrepareSettings { held_out: HeldOut::OneIn(0), ..base() },
        PrepareSettings { name: "a/b".to_owned(), ..base() },
        PrepareSettings { name: String::new(), ..base() },
    ];
    for settings in wrong {
        assert!(matches!(prepare(&settings), Err(DataError::Setting { .. })), "{settings:?}");
    }
    let unknown = PrepareSettings { held_out: ids("d99"), ..base() };
    assert!(matches!(prepare(&unknown), Err(DataError::HeldOutUnknown { id }) if id == "d99"));
    let short = PrepareSettings { sequence_length: 100_000, ..base() };
    assert!(matches!(prepare(&short), Err(DataError::NoText { .. })));
    assert!(!scene.path("out/catalog.json").exists());
}

#[test]
fn a_catalog_that_contradicts_itself_is_refused() {
    let scene = Scene::new();
    let catalog = prepare(&scene.settings("out")).unwrap();
    let path = scene.path("out/catalog.json");
    let changes: [fn(&mut Catalog); 5] = [
        |catalog| catalog.version = 9,
        |catalog| catalog.sequence_length = 17,
        |catalog| catalog.shards[0].rows = u64::MAX,
        |catalog| catalog.shards[0].id = "../escape".to_owned(),
        |catalog| catalog.shards[0].file.chunks.clear(),
    ];
    for change in changes {
        let mut altered = catalog.clone();
        change(&mut altered);
        fs::write(&path, serde_json::to_vec(&altered).unwrap()).unwrap();
        assert!(matches!(Catalog::load(&scene.path("out")), Err(DataError::Catalog { .. })));
    }
}

#[test]
fn ids_are_read_from_a_file_with_comments() {
    let scene = Scene::new();
    fs::write(scene.path("ids"), "# held out\nd3\n\n d11 \n").unwrap();
    assert_eq!(HeldOut::ids_from_file(&scene.path("ids")).unwrap(), scene.settings("out").held_out);
    fs::write(scene.path("ids"), "# nothing\n").unwrap();
    assert!(HeldOut::ids_from_file(&scene.path("ids")).is_err());
}

#[test]
fn shuffling_moves_training_rows_inside_their_shard_and_the_same_seed_does_it_again() {
    let scene = Scene::new();
    let plain = prepare(&scene.settings("plain")).unwrap();
    let shuffled = |out: &str, seed| prepare(&PrepareSettings { shuffle_seed: Some(seed), ..scene.settings(out) }).unwrap();
    let once = shuffled("once", 7);
    assert_eq!(once.shards, shuffled("again", 7).shards);
    assert_ne!(once.shards, shuffled("other", 8).shards);
    assert_eq!(scene.tokens("once", &once, true), scene.tokens("plain", &plain, true), "held-out rows keep their order");
    let rows_of = |out: &str, catalog: &Catalog| -> Vec<Vec<u32>> {
        let rows = |shard: &ShardManifest| {
            let reader = ShardReader::open_verified(&Catalog::tokens_path(&scene.path(out), shard), shard).unwrap();
            let mut rows: Vec<Vec<u32>> = (0..reader.rows()).map(|row| reader.row(row).unwrap().to_vec()).collect();
            rows.sort();
            rows.concat()
        };
        catalog.side(false).map(rows).collect()
    };
    assert_eq!(rows_of("once", &once), rows_of("plain", &plain), "each shard has the same rows");
    assert_ne!(scene.tokens("once", &once, false), scene.tokens("plain", &plain, false));
}
