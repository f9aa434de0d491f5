use std::io::Write as _;

use super::*;

const OWNER: &str = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY";

fn environment(pairs: &[(&str, &str)]) -> Sources {
    let environment = pairs.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect();
    Sources { environment, ..Sources::default() }
}

fn file(text: &str) -> (tempfile::NamedTempFile, Sources) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    let sources = Sources { file: Some(file.path().to_owned()), ..Sources::default() };
    (file, sources)
}

fn error(role: Role, sources: &Sources) -> SettingsError {
    Settings::load(role, sources).unwrap_err()
}

#[test]
fn later_layers_win_and_every_value_knows_its_origin() {
    let (_file, mut sources) =
        file("netuid = 1\nnetwork = \"test\"\n[s3]\nbucket = \"from-file\"\nregion = \"eu-1\"\n[validator]\npoll_interval_sec = 2.5\n");
    sources.environment = environment(&[("QUASAR_NETUID", "2"), ("QUASAR_S3_BUCKET", "from-environment")]).environment;
    sources.flags = vec![("netuid", "3".to_owned())];
    let settings = Settings::load(Role::Validator, &sources).unwrap();
    assert_eq!(settings.netuid(), Ok(3));
    let origin = |key: &str| settings.value(key).unwrap().origin.clone();
    assert_eq!(origin("netuid"), Origin::Flag("netuid".to_owned()));
    assert_eq!(origin("s3.bucket"), Origin::Environment("QUASAR_S3_BUCKET".to_owned()));
    assert_eq!(origin("network"), Origin::File(sources.file.clone().unwrap()));
    assert_eq!(origin("validator.device"), Origin::Default);
    let store = settings.store().unwrap();
    assert_eq!((store.bucket.as_str(), store.region.as_str(), store.path_style), ("from-environment", "eu-1", false));
    assert_eq!(settings.validator().poll_interval_ms, 2_500);
    assert_eq!(settings.network().unwrap().endpoints, ["wss://test.finney.opentensor.ai:443"]);
}

#[test]
fn an_unknown_key_is_refused_with_the_nearest_one() {
    let (_file, sources) = file("[walet]\nname = \"a\"\n");
    let text = error(Role::Miner, &sources).to_string();
    assert!(text.contains("unknown key `walet`"), "{text}");
    let (_file, sources) = file("[wallet]\nnaem = \"a\"\n");
    let text = error(Role::Miner, &sources).to_string();
    assert!(text.contains("`wallet.naem`") && text.contains("hint: did you mean `wallet.name`?"), "{text}");
}

#[test]
fn a_key_of_another_role_is_refused_with_its_owner() {
    let (_file, sources) = file("[s3]\nsecret_key = \"hush\"\n");
    let text = error(Role::Miner, &sources).to_string();
    assert!(text.contains("a miner does not read") && text.contains("the orchestrator's file") && !text.contains("hush"), "{text}");
}

#[test]
fn a_syntax_error_names_the_line_and_quotes_nothing() {
    let (_file, sources) = file("netuid = 1\n[s3]\nsecret_key = hush-hush\n");
    let problem = error(Role::Orchestrator, &sources);
    assert!(matches!(problem, SettingsError::Syntax { line: 3, .. }), "{problem}");
    assert!(!problem.to_string().contains("hush"), "{problem}");
}

#[test]
fn a_missing_or_huge_file_is_an_error_with_a_hint() {
    let sources = Sources { file: Some("/nonexistent/quasar.toml".into()), ..Sources::default() };
    assert!(error(Role::Miner, &sources).to_string().contains("hint: check --settings"));
    let (_file, sources) = file(&"# long\n".repeat(200_000));
    assert!(error(Role::Miner, &sources).to_string().contains("longer than"));
}

#[test]
fn dropped_and_unknown_variables_are_refused_and_those_of_the_run_manifest_are_noticed() {
    let text = error(Role::Miner, &environment(&[("QUASAR_SAVE_PERSISTENT_STATES", "1")])).to_string();
    assert!(text.contains("hint: unset it: local snapshots are always saved"), "{text}");
    let text = error(Role::Miner, &environment(&[("QUASAR_NETWROK", "test")])).to_string();
    assert!(text.contains("did you mean `QUASAR_NETWORK`?"), "{text}");
    let settings = Settings::load(Role::Miner, &environment(&[("QUASAR_SEQUENCE_LENGTH", "2048")])).unwrap();
    assert_eq!(settings.notices, ["QUASAR_SEQUENCE_LENGTH has no effect: its value comes from the signed run manifest"]);
    // One environment may serve all roles of a machine.
    assert!(Settings::load(Role::Validator, &environment(&[("QUASAR_MINER_DEVICES", "0")])).unwrap().notices.is_empty());
}

#[test]
fn only_an_orchestrator_has_bucket_credentials() {
    let keys = [("QUASAR_S3_BUCKET", "b"), ("QUASAR_S3_ACCESS_KEY", "AK"), ("AWS_SECRET_ACCESS_KEY", "SK")];
    let settings = Settings::load(Role::Orchestrator, &environment(&keys)).unwrap();
    let store = settings.store().unwrap();
    assert_eq!((store.access_key.as_deref(), store.secret_key.as_deref()), (Some("AK"), Some("SK")));
    assert!(!format!("{store:?}").contains("SK"));
    let settings = Settings::load(Role::Miner, &environment(&keys)).unwrap();
    assert_eq!(settings.store().unwrap().access_key, None);
    assert!(settings.notices[0].contains("QUASAR_S3_ACCESS_KEY has no effect"));
    let half = environment(&keys[..2]);
    assert!(matches!(
        Settings::load(Role::Orchestrator, &half).unwrap().store(),
        Err(SettingsError::Credentials { missing: "s3.secret_key" })
    ));
    let told = environment(&[("QUASAR_S3_BUCKET", "b"), ("QUASAR_S3_ANONYMOUS", "0")]);
    assert!(matches!(Settings::load(Role::Miner, &told).unwrap().store(), Err(SettingsError::NotAnonymous { .. })));
}

#[test]
fn secrets_are_masked_in_both_forms_of_show() {
    let sources = environment(&[("QUASAR_S3_SECRET_KEY", "hush"), ("QUASAR_S3_ACCESS_KEY", "quiet"), ("QUASAR_NETUID", "24")]);
    let settings = Settings::load(Role::Orchestrator, &sources).unwrap();
    let (text, json) = (show::text(&settings), show::json(&settings));
    for shown in [text.as_str(), &json.to_string()] {
        assert!(!shown.contains("hush") && !shown.contains("quiet") && shown.contains("********"), "{shown}");
    }
    assert!(text.lines().any(|line| line.starts_with("netuid ") && line.ends_with("environment QUASAR_NETUID")), "{text}");
    assert_eq!(json["settings"]["netuid"], serde_json::json!({ "value": "24", "origin": "environment QUASAR_NETUID" }));
    assert_eq!(json["settings"]["network"], serde_json::json!({ "value": null, "origin": "not set" }));
}

#[test]
fn a_missing_value_names_the_places_where_it_can_be_set() {
    let settings = Settings::load(Role::Miner, &Sources::default()).unwrap();
    let text = settings.network().unwrap_err().to_string();
    assert!(text.contains("hint: set --network or QUASAR_NETWORK or `network` in the configuration file"), "{text}");
    assert!(settings.owner_identity().is_err() && settings.wallet().is_err() && settings.store().is_err());
}

#[test]
fn validate_lists_every_problem_once() {
    let sources = environment(&[("QUASAR_NETUID", "70000"), ("QUASAR_MINER_LAUNCH_MODE", "grouped"), ("QUASAR_OWNER_IDENTITY", OWNER)]);
    let problems = Settings::check(Role::Miner, &sources);
    let texts: Vec<String> = problems.iter().map(ToString::to_string).collect();
    let mentions = |word: &str| texts.iter().filter(|text| text.contains(word)).count();
    assert_eq!((mentions("`netuid`"), mentions("grouped"), mentions("`network`"), mentions("owner")), (1, 1, 1, 0), "{texts:#?}");
    let whole = environment(&[
        ("QUASAR_NETUID", "24"),
        ("QUASAR_NETWORK", "finney"),
        ("QUASAR_OWNER_IDENTITY", OWNER),
        ("QUASAR_S3_BUCKET", "b"),
        ("QUASAR_WALLET_NAME", "w"),
        ("QUASAR_HOTKEY_NAME", "h"),
    ]);
    assert_eq!(Settings::check(Role::Miner, &whole), []);
}

#[test]
fn the_local_network_is_described_by_a_file_and_endpoints_can_be_overridden() {
    let mut chain = tempfile::NamedTempFile::new().unwrap();
    write!(chain, "{{\"genesis\": \"0x{}\", \"endpoint\": \"ws://127.0.0.1:9944\", \"netuid\": 2}}", "ab".repeat(32)).unwrap();
    let path = chain.path().to_str().unwrap().to_owned();
    let local = [("QUASAR_NETWORK", "local"), ("QUASAR_LOCAL_CHAIN", path.as_str())];
    let network = Settings::load(Role::Miner, &environment(&local)).unwrap().network().unwrap();
    assert_eq!((network.name, network.genesis), (NetworkName::Local, [0xab; 32]));
    assert_eq!(network.endpoints, ["ws://127.0.0.1:9944"]);
    let overridden = [local[0], local[1], ("QUASAR_CHAIN_ENDPOINTS", "ws://127.0.0.1:1, ws://127.0.0.1:2")];
    let network = Settings::load(Role::Miner, &environment(&overridden)).unwrap().network().unwrap();
    assert_eq!(network.endpoints, ["ws://127.0.0.1:1", "ws://127.0.0.1:2"]);
    for wrong in ["{", "{\"genesis\": \"0x12\", \"endpoint\": \"ws://x\"}", &format!("{{\"genesis\": \"{}\"}}", "ab".repeat(32))] {
        std::fs::write(chain.path(), wrong).unwrap();
        let problem = Settings::load(Role::Miner, &environment(&local)).unwrap().network().unwrap_err();
        assert!(problem.to_string().contains("hint: the devnet writes it"), "{problem}");
    }
    let without = environment(&[("QUASAR_NETWORK", "local")]);
    assert!(Settings::load(Role::Miner, &without).unwrap().network().unwrap_err().to_string().contains("--local-chain"));
}

#[test]
fn the_public_networks_are_known_by_their_genesis() {
    for (name, begins, endpoints) in [("finney", [0x2f, 0x05], 2), ("test", [0x8f, 0x9c], 1)] {
        let settings = Settings::load(Role::Miner, &environment(&[("QUASAR_NETWORK", name)])).unwrap();
        let network = settings.network().unwrap();
        assert_eq!((&network.genesis[..2], network.endpoints.len()), (&begins[..], endpoints));
    }
}

#[test]
fn state_directories_have_the_old_names_too_and_a_default_in_the_home_directory() {
    let named = |name| Settings::load(Role::Miner, &environment(&[(name, "/a")])).unwrap().state_dir();
    for name in ["QUASAR_STATE_DIR", "QUASAR_LEARNER_STATE_DIR", "QUASAR_MINER_CACHE_DIR"] {
        assert_eq!(named(name), Ok(PathBuf::from("/a")));
    }
    let both = environment(&[("QUASAR_LEARNER_STATE_DIR", "/a"), ("QUASAR_MINER_CACHE_DIR", "/b")]);
    let settings = Settings::load(Role::Miner, &both).unwrap();
    assert_eq!(settings.state_dir(), Ok(PathBuf::from("/a")));
    assert_eq!(settings.notices, ["QUASAR_MINER_CACHE_DIR has no effect beside QUASAR_LEARNER_STATE_DIR"]);
    let home = environment(&[("HOME", "/home/m")]);
    let settings = Settings::load(Role::Miner, &home).unwrap();
    assert_eq!(settings.state_dir(), Ok(PathBuf::from("/home/m/.quasar/miner")));
    assert_eq!(Settings::load(Role::Miner, &Sources::default()).unwrap().state_dir().map_err(|_| ()), Err(()));
}

#[test]
fn learners_are_named_after_the_worker_or_the_prefix() {
    let named = |pairs: &[(&str, &str)]| Settings::load(Role::Miner, &environment(pairs)).unwrap().miner();
    assert_eq!(named(&[("QUASAR_MINER_WORKER_ID", "w")]).worker_name(0, 1), "w");
    assert_eq!(named(&[("QUASAR_MINER_WORKER_ID", "w")]).worker_name(1, 2), "w-1");
    assert_eq!(named(&[]).worker_name(3, 1), "worker-3");
}

#[test]
fn the_password_of_a_hotkey_comes_from_the_named_file_or_from_systemds_credential() {
    let folder = tempfile::tempdir().unwrap();
    let named = [("QUASAR_WALLET_NAME", "w"), ("QUASAR_HOTKEY_NAME", "h"), ("CREDENTIALS_DIRECTORY", folder.path().to_str().unwrap())];
    let password_file = |sources: &Sources| Settings::load(Role::Miner, sources).unwrap().wallet().unwrap().password_file;
    let mut sources = environment(&named);
    assert_eq!(password_file(&sources), None, "the unit hands over no such credential");
    let credential = folder.path().join("hotkey-password");
    std::fs::write(&credential, "hush").unwrap();
    assert_eq!(password_file(&sources), Some(credential));
    sources.environment.insert("QUASAR_HOTKEY_PASSWORD_FILE".to_owned(), "/run/password".to_owned());
    assert_eq!(password_file(&sources), Some("/run/password".into()));
}
