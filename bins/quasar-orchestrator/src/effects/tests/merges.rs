//! Evidence, merges from tapes, rollbacks and releases: the same bytes, whoever makes them.

use super::*;

#[tokio::test]
async fn a_commitment_that_was_exchanged_after_it_was_taken_in_is_evidence_of_nothing() {
    let (bucket, folder) = (Bucket::new().await, tempfile::tempdir().unwrap());
    let (service, _journal) = bucket.orchestrator(folder.path()).await;
    let learner = Ed25519Signer::from_seed([7; 32]);
    let slot = (learner.key().account(), 0);
    let commitment = |payload: Digest, lease: u64| Commitment {
        t: 4,
        fragment: 0,
        base_version: 0,
        length: 64,
        sha256: payload,
        blake3: payload,
        steps: 1,
        tokens: 128,
        lease,
        lease_step: 1,
        local_step: 1,
        start_step: 0,
        start_digest: Digest::ZERO,
        step_chain: Digest::ZERO,
    };
    let record = |commitment: &Commitment, loss: i64| {
        let record = Progress {
            worker: "learner".into(),
            session_epoch: 1,
            slot: 0,
            protocol: 1,
            state: LearnerState::Training,
            reason: Reason::None,
            lease: 1,
            lease_step: 1,
            local_step: 1,
            step_ms: 1,
            loss,
            step_chain: Digest::ZERO,
            fragments: Vec::new(),
            commitments: vec![commitment.clone()],
            uploaded: Vec::new(),
            openings: Vec::new(),
            receipt: None,
            padding: Vec::new(),
        };
        sign(&record, &bucket.context, &learner, 1, 1_000)
    };
    // Another payload, and the same one with other work behind it.
    let [taken, other, again] = [(1, 1), (2, 1), (1, 2)].map(|(payload, lease)| commitment(Digest::blake3(&[payload]), lease));
    let newest = service.run.progress(&slot.0, slot.1);
    let evidence = service.run.commitment(&slot.0, slot.1, 4);
    // A process that has just begun knows no record yet, and the learner has put another payload into its own.
    bucket.put(&newest, record(&other, 0)).await;
    assert_eq!(service.store_commitment(slot, 4, Digest::ZERO, taken.digest()).await, Some(Err(Reason::RepeatedCommitment)));
    assert!(matches!(bucket.store.head(&evidence).await, Err(StoreError::NotFound { .. })), "nothing was kept");
    // A later record with the same commitment is as good as the one that was read.
    bucket.put(&newest, record(&taken, 1)).await;
    let kept = service.store_commitment(slot, 4, Digest::ZERO, taken.digest()).await.unwrap().unwrap();
    // What was kept stays, whatever the learner says afterwards.
    bucket.put(&newest, record(&other, 2)).await;
    assert_eq!(service.store_commitment(slot, 4, Digest::ZERO, taken.digest()).await, Some(Ok(kept)));
    for other in [other, again] {
        bucket.put(&newest, record(&other, 3)).await;
        assert_eq!(service.store_commitment(slot, 4, Digest::ZERO, other.digest()).await, Some(Err(Reason::RepeatedCommitment)));
    }
}

#[tokio::test]
async fn whoever_completes_a_step_from_its_tape_writes_the_same_bytes() {
    let (bucket, one, two) = (Bucket::new().await, tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (first, _journal) = bucket.orchestrator(one.path()).await;
    let wanted = bucket.tape(0, 0, 1, &[11, 12, 13]).await;
    let tape = first.write_tape(&wanted).await;
    let (manifest, id, length) = first.merge(tape.clone(), Vec::new(), (Digest::ZERO, 0)).await;
    assert_eq!((manifest.version, manifest.accepted().count()), (1, 3));
    let other = bucket.tape(0, 0, 2, &[11]).await;
    let objects = bucket.objects().await;
    first.fence.release().await;

    // A successor decides otherwise: the tape stands, and the merge comes out the same, from objects in the bucket alone.
    let (second, _journal) = bucket.orchestrator(two.path()).await;
    let stands = second.write_tape(&other).await;
    assert_eq!(stands, tape);
    let (again, same_id, same_length) = second.merge(stands, Vec::new(), (Digest::ZERO, 0)).await;
    assert_eq!((again, same_id, same_length), (manifest.clone(), id, length));
    let after: Vec<_> = bucket.objects().await;
    let changed: Vec<&String> = after.iter().filter(|object| !objects.contains(object)).map(|(key, _)| key).collect();
    assert_eq!(changed, [&second.run.writer_lease()], "nothing but the lease moved");
    let state = bucket.store.get(&second.run.state(0, 1), 1 << 20).await.unwrap().bytes;
    assert_eq!(Digest::blake3(&state), manifest.state);
}

#[tokio::test]
async fn where_something_else_lies_than_a_tape_gives_the_orchestrator_stops_and_nothing_names_that_version() {
    for planted in 0..4 {
        let (bucket, folder) = (Bucket::new().await, tempfile::tempdir().unwrap());
        let (service, _journal) = bucket.orchestrator(folder.path()).await;
        let [state, keyframe, manifest] = [service.run.state(0, 1), service.run.keyframe(0, 1), service.run.fragment_manifest(0, 1)];
        let (key, bytes) = match planted {
            0 => (&state, vec![7; 100]),
            1 => (&state, vec![7; 4 << 20]),
            2 => (&keyframe, vec![7; 100]),
            _ => (&manifest, vec![7; 100]),
        };
        bucket.put(key, bytes.clone()).await;
        let tape = bucket.tape(0, 0, 1, &[11, 12]).await;
        let why = stops(&service, service.merge(tape, Vec::new(), (Digest::ZERO, 0))).await;
        assert!(why.contains(key.as_str()) && why.contains("hint:"), "{why}");
        for later in [&manifest, &service.run.merge(0)].into_iter().filter(|later| *later != key) {
            assert!(matches!(bucket.store.head(later).await, Err(StoreError::NotFound { .. })), "{later}");
        }
        assert_eq!(bucket.store.get(key, 8 << 20).await.unwrap().bytes, bytes);
    }
}

/// A checkpoint with the tensors of [`plan`] and one that training leaves alone.
pub(super) fn write_base_tree(folder: &Path) {
    let bytes = 2 * ELEMENTS;
    let entry =
        |at: usize| serde_json::json!({"dtype": "BF16", "shape": [4, ELEMENTS / 4], "data_offsets": [at * bytes, (at + 1) * bytes]});
    let header = serde_json::json!({"layer0": entry(0), "layer1": entry(1), "rotary.inv_freq": entry(2)}).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend((0..3 * bytes).map(|at| (at % 59) as u8));
    std::fs::create_dir_all(folder).unwrap();
    std::fs::write(folder.join("model.safetensors"), file).unwrap();
    std::fs::write(folder.join("config.json"), "{}").unwrap();
}

#[tokio::test]
async fn a_release_is_made_again_bit_for_bit_from_the_tapes_by_somebody_who_has_seen_nothing_else() {
    let (first, one) = (Bucket::new().await, tempfile::tempdir().unwrap());
    let (second, two) = (Bucket::new().await, tempfile::tempdir().unwrap());
    let (maker, _journal) = first.orchestrator(one.path()).await;
    let (other, _journal) = second.orchestrator(two.path()).await;
    write_base_tree(&maker.base_tree);
    write_base_tree(&other.base_tree);
    let mut base = [(Digest::ZERO, 0); 2];
    for t in 0..6 {
        let (fragment, version) = ((t % 2) as usize, t / 2);
        let tape = maker.write_tape(&first.tape(t, version, 1, &[11, 12, 13][..1 + (t % 3) as usize]).await).await;
        let (manifest, _, length) = maker.merge(tape, Vec::new(), base[fragment]).await;
        assert_eq!(manifest.version, version + 1);
        base[fragment] = (manifest.keyframe, length);
    }
    let release = maker.release(vec![3, 3], 1_000).await;

    for meta in first.store.list("quasar/").await.unwrap() {
        if meta.key.contains("/tape/") || meta.key.ends_with("/payload.qfd") {
            second.put(&meta.key, first.store.get(&meta.key, 1 << 20).await.unwrap().bytes.to_vec()).await;
        }
    }
    let mut base = [(Digest::ZERO, 0); 2];
    for t in 0..6 {
        let bytes = second.store.get(&other.run.tape(t), 1 << 20).await.unwrap().bytes;
        let tape = other.open_own::<Tape>(&bytes).unwrap().document;
        let (manifest, _, length) = other.merge(tape, Vec::new(), base[(t % 2) as usize]).await;
        base[(t % 2) as usize] = (manifest.keyframe, length);
    }
    let again = other.release(vec![3, 3], 1_000).await;
    assert_eq!(again.release, release.release);
    let prefix = maker.keys.release_file(&release.release, "");
    let files = async |store: &MemoryStore| {
        let mut files = Vec::new();
        for meta in store.list(&prefix).await.unwrap().into_iter().filter(|meta| !meta.key.ends_with("manifest.qsr")) {
            files.push((meta.key.clone(), store.get(&meta.key, 1 << 20).await.unwrap().bytes));
        }
        files
    };
    let made = files(&first.store).await;
    assert!(made.iter().any(|(key, _)| key.ends_with("model.safetensors")) && made.len() >= 3, "{made:?}");
    assert_eq!(made, files(&second.store).await);
    let base_file = std::fs::read(maker.base_tree.join("model.safetensors")).unwrap();
    let moved = &made.iter().find(|(key, _)| key.ends_with("model.safetensors")).unwrap().1;
    assert_ne!(moved[..], base_file[..], "it was trained");
    assert_eq!(moved[moved.len() - 2 * ELEMENTS..], base_file[base_file.len() - 2 * ELEMENTS..], "what is not trained stays");
}

/// What lies in a folder of the state, by name.
fn left(service: &Service, folder: &str) -> Vec<String> {
    let entries = std::fs::read_dir(service.state_dir.join(folder)).unwrap();
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[tokio::test]
async fn a_release_leaves_nothing_on_the_disk_and_one_that_was_interrupted_goes_on_with_the_tree_that_is_there() {
    let (bucket, folder) = (Bucket::new().await, tempfile::tempdir().unwrap());
    let (service, _journal) = bucket.orchestrator(folder.path()).await;
    write_base_tree(&service.base_tree);
    let mut base = (Digest::ZERO, 0);
    for (t, version) in [(0, 0), (2, 1), (4, 2)] {
        let (manifest, _, length) = service.merge(bucket.tape(t, version, 1, &[11, 12]).await, Vec::new(), base).await;
        base = (manifest.keyframe, length);
    }
    // Version 1 is not on the disk any more, and is fetched.
    let made = service.release(vec![1, 0], 1_000).await;
    assert_eq!((left(&service, "releases"), left(&service, "states")), (Vec::new(), vec!["0-2.qfs".into(), "0-3.qfs".into()]));

    // Its process was killed when the tree was complete and a state that was fetched lay there; the upload is still to be done.
    let tree = service.state_dir.join("releases").join(&made.release);
    let in_bucket: Vec<String> =
        bucket.store.list(&service.keys.release_file(&made.release, "")).await.unwrap().into_iter().map(|meta| meta.key).collect();
    for key in &in_bucket {
        if let Some(name) = key.strip_prefix(&service.keys.release_file(&made.release, "")).filter(|name| !name.ends_with(".qsr")) {
            std::fs::create_dir_all(&tree).unwrap();
            std::fs::write(tree.join(name), bucket.store.get(key, 1 << 20).await.unwrap().bytes).unwrap();
        }
        bucket.store.delete(key).await.unwrap();
    }
    let of_another = service.state_dir.join("releases/run-abandoned");
    std::fs::create_dir_all(&of_another).unwrap();
    // The states are gone from everywhere: only the tree that is there can be released.
    for version in [0, 1] {
        let _ = std::fs::remove_file(service.state_path(0, version));
        bucket.store.delete(&service.run.state(0, version)).await.unwrap();
    }
    service.sweep_releases().await;
    assert_eq!(left(&service, "releases").len(), 2, "neither is in the bucket");
    let again = tokio::time::timeout(Duration::from_secs(20), service.release(vec![1, 0], 1_000)).await.unwrap();
    assert_eq!(again.release, made.release);
    let keys: Vec<String> =
        bucket.store.list(&service.keys.release_file(&made.release, "")).await.unwrap().into_iter().map(|meta| meta.key).collect();
    assert_eq!(keys, in_bucket);
    assert_eq!(left(&service, "releases"), Vec::<String>::new());

    // What is in the bucket is not made again; what was left of it is swept at the start.
    std::fs::create_dir_all(&tree).unwrap();
    std::fs::write(service.state_path(0, 9).with_extension("release"), b"state").unwrap();
    service.sweep_releases().await;
    assert_eq!((left(&service, "releases"), left(&service, "states").len()), (Vec::new(), 2));
    assert_eq!(service.release(vec![1, 0], 1_000).await, again);
}

#[tokio::test]
async fn a_release_whose_tree_was_damaged_before_its_upload_is_assembled_again() {
    let (bucket, folder) = (Bucket::new().await, tempfile::tempdir().unwrap());
    let (service, _journal) = bucket.orchestrator(folder.path()).await;
    write_base_tree(&service.base_tree);
    let made = service.release(vec![0, 0], 0).await;
    let key = service.keys.release_file(&made.release, "model.safetensors");
    let whole = bucket.store.get(&key, 1 << 20).await.unwrap().bytes;
    for meta in bucket.store.list(&service.keys.release_file(&made.release, "")).await.unwrap() {
        bucket.store.delete(&meta.key).await.unwrap();
    }
    let tree = service.state_dir.join("releases").join(&made.release);
    std::fs::create_dir_all(&tree).unwrap();
    std::fs::write(tree.join("model.safetensors"), &whole[..whole.len() - 1]).unwrap();
    service.release(vec![0, 0], 0).await;
    assert_eq!(bucket.store.get(&key, 1 << 20).await.unwrap().bytes, whole);
}

#[tokio::test]
async fn a_release_stops_at_a_file_of_another_one_and_goes_on_once_that_was_removed() {
    let (bucket, folder) = (Bucket::new().await, tempfile::tempdir().unwrap());
    let (service, _journal) = bucket.orchestrator(folder.path()).await;
    write_base_tree(&service.base_tree);
    let made = service.release(vec![0, 0], 0).await;
    let (manifest, file) = (service.keys.release_manifest(&made.release), service.keys.release_file(&made.release, "model.safetensors"));
    // Another version of the program got so far.
    bucket.store.delete(&manifest).await.unwrap();
    let whole = bucket.store.get(&file, 1 << 20).await.unwrap().bytes;
    bucket.put(&file, vec![7; whole.len()]).await;
    let why = stops(&service, service.release(vec![0, 0], 0)).await;
    assert!(why.contains(&file) && why.contains("hint:"), "{why}");
    assert!(matches!(bucket.store.head(&manifest).await, Err(StoreError::NotFound { .. })));
    assert_eq!(left(&service, "releases"), Vec::<String>::new(), "nobody knows which of the two is right: it is made anew");
    bucket.store.delete(&file).await.unwrap();
    assert_eq!(service.release(vec![0, 0], 0).await.release, made.release);
    assert_eq!(bucket.store.get(&file, 1 << 20).await.unwrap().bytes, whole);
}

#[tokio::test]
async fn a_manifest_of_a_release_that_is_not_ours_is_taken_for_none() {
    let (bucket, folder) = (Bucket::new().await, tempfile::tempdir().unwrap());
    let (service, _journal) = bucket.orchestrator(folder.path()).await;
    write_base_tree(&service.base_tree);
    let made = service.release(vec![0, 0], 0).await;
    let manifest = service.keys.release_manifest(&made.release);
    for bytes in [vec![7; 100], vec![7; 4 << 20]] {
        bucket.put(&manifest, bytes).await;
        let why = stops(&service, service.release(vec![0, 0], 0)).await;
        assert!(why.contains(&manifest), "{why}");
    }
}

#[tokio::test]
async fn a_payload_whose_check_ends_after_its_merge_does_not_stay() {
    let (bucket, folder) = (Bucket::new().await, tempfile::tempdir().unwrap());
    let (service, _journal) = bucket.orchestrator(folder.path()).await;
    let tape = bucket.tape(0, 0, 1, &[11, 12]).await;
    let late = tape.inputs[1].clone();
    service.merge(tape, Vec::new(), (Digest::ZERO, 0)).await;
    assert_eq!(left(&service, "payloads"), Vec::<String>::new());
    // The check was under way, and brings its folder back.
    service.payload(&late, 0).await;
    service.payload(&bucket.tape(2, 1, 1, &[11]).await.inputs[0], 2).await;
    assert_eq!(left(&service, "payloads"), ["0", "2"]);
    service.sweep_payloads(1);
    assert_eq!(left(&service, "payloads"), ["2"], "step 2 is still to be merged");
}

#[tokio::test]
async fn a_rollback_publishes_the_earlier_state_bit_for_bit() {
    let (bucket, folder) = (Bucket::new().await, tempfile::tempdir().unwrap());
    let (service, _journal) = bucket.orchestrator(folder.path()).await;
    for (t, version) in [(0, 0), (2, 1)] {
        let tape = bucket.tape(t, version, 1, &[11, 12]).await;
        service.merge(tape, Vec::new(), (Digest::ZERO, 0)).await;
    }
    let (before, after) = (service.state(0, 1).await, service.state(0, 2).await);
    assert_ne!(before.theta, after.theta);
    let tape = Tape { t: 4, base_version: 2, restores: Some(1), inputs: Vec::new(), ..bucket.tape(4, 2, 1, &[]).await };
    let (manifest, ..) = service.merge(tape, Vec::new(), (Digest::ZERO, 0)).await;
    assert_eq!((manifest.version, manifest.contributions.len()), (3, 0));
    let restored = service.state(0, 3).await;
    assert_eq!((&restored.theta, &restored.momentum), (&before.theta, &before.momentum));
}

#[tokio::test]
async fn a_rollback_to_a_version_that_is_deleted_leaves_the_fragment_and_the_run_goes_on() {
    let (bucket, folder) = (Bucket::new().await, tempfile::tempdir().unwrap());
    let (service, _journal) = bucket.orchestrator(folder.path()).await;
    service.claim_head(1).await.unwrap();
    let tape = Tape { restores: Some(7), inputs: Vec::new(), ..bucket.tape(0, 9, 1, &[]).await };
    let previous = (Digest::blake3(b"keyframe"), 5);
    let (manifest, ..) = service.merge(tape, Vec::new(), previous).await;
    assert_eq!((manifest.version, manifest.restores, manifest.keyframe), (9, None, previous.0));
}
