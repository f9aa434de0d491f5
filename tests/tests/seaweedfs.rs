//! The main job against an S3 server that is not ours, as separate processes.

use std::process::Command;

use protocol::codec;
use protocol::documents::MergeManifest;
use protocol::envelope::{Document, Purpose, verify_as_stated};
use quasar_tests::seaweed::{ACCESS_KEY, SECRET_KEY, Seaweed, VARIABLE};
use quasar_tests::{bin_dir, binary};
use storage::{ObjectStore, S3Settings, S3Store};

const BUCKET: &str = "quasar-e2e";
const FRAGMENTS: usize = 24;

#[test]
fn a_devnet_on_seaweedfs_merges_audits_and_releases() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let Some(server) = Seaweed::start(&folder.path().join("seaweedfs")) else {
        eprintln!("SKIPPED: {VARIABLE} does not name SeaweedFS; `cargo xtask setup --s3` installs it and `cargo xtask test` names it");
        return;
    };
    let output = Command::new(binary("quasar-orchestrator"))
        .args(["devnet", "--miners", "2", "--validators", "1", "--cycles", "1", "--json", "--timeout-sec", "1200"])
        .args(["--s3-endpoint", &server.endpoint, "--s3-bucket", BUCKET])
        .env("QUASAR_DEVNET_S3_ACCESS_KEY", ACCESS_KEY)
        .env("QUASAR_DEVNET_S3_SECRET_KEY", SECRET_KEY)
        .arg("--dir")
        .arg(folder.path().join("devnet"))
        .arg("--bin-dir")
        .arg(bin_dir())
        .output()
        .expect("the devnet starts");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let text = String::from_utf8_lossy(&output.stdout);
    let summary: serde_json::Value =
        serde_json::from_str(text.lines().last().expect("a last line")).expect("the last line is one JSON object");
    assert_eq!(summary["ok"], true, "{summary}");
    assert_eq!(summary["verdicts"]["fail"], 0, "{summary}");
    assert!(summary["verdicts"]["pass"].as_u64().is_some_and(|passed| passed > 0), "the run ends when its audits are over: {summary}");

    // What the summary says lies in that server's bucket, and nowhere on the devnet's own disk.
    assert!(!folder.path().join("devnet/bucket").exists());
    let merges = tokio::runtime::Runtime::new().expect("a runtime").block_on(merges_in(&server.endpoint));
    assert!(merges.len() >= FRAGMENTS, "{} merges", merges.len());
}

async fn merges_in(endpoint: &str) -> Vec<MergeManifest> {
    let store = S3Store::new(S3Settings {
        endpoint: Some(endpoint.to_owned()),
        region: "us-east-1".to_owned(),
        bucket: BUCKET.to_owned(),
        access_key: Some(ACCESS_KEY.to_owned()),
        secret_key: Some(SECRET_KEY.to_owned()),
        path_style: true,
    })
    .expect("the store's settings are sound");
    let mut merges = Vec::new();
    for object in store.list("quasar/").await.expect("the bucket is listed") {
        if object.key.contains("/merges/") {
            let bytes = store.get(&object.key, Purpose::MergeManifest.file_limit()).await.expect("a listed object is there").bytes;
            let (envelope, _) = verify_as_stated(&bytes).expect("a signed document");
            merges.push(codec::decode(&envelope.payload, MergeManifest::PURPOSE.limit()).expect("it decodes"));
        }
    }
    merges
}
