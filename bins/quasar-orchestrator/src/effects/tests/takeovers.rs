//! What a process that begins goes on from: its journal, or the bucket.

use super::*;

#[tokio::test]
async fn a_successor_without_the_disk_goes_on_from_the_bucket_alone() {
    let (bucket, one, two) = (Bucket::new().await, tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (first, journal) = bucket.orchestrator(one.path()).await;
    let head = first.claim_head(1).await.unwrap();
    let (recovered, _) = takeover::recover(&first, &journal, head.clone(), bucket.fresh()).await.unwrap();
    let snapshot = recovered.machine.to_snapshot(5_000).unwrap();
    first.put_latest(&first.run.snapshot(), 1, || Ok(Bytes::from(snapshot.clone()))).await;
    // After the snapshot: one merge whole, one taped only, two leases, and the head knows of three steps.
    let merged = first.write_tape(&bucket.tape(0, 0, 1, &[11, 12]).await).await;
    let (manifest, ..) = first.merge(merged, Vec::new(), (Digest::ZERO, 0)).await;
    first.write_tape(&bucket.tape(1, 0, 1, &[11]).await).await;
    // Records are written beside each other: that of the lease between them is missing.
    for (index, start) in [(0u8, 0u64), (2, 96)] {
        // Ids of a writer's first life begin at its epoch.
        let id = (1 << LEASE_EPOCH_SHIFT) + u64::from(index);
        let rows = vec![RowRange { shard: "a".into(), start, end: start + 96 }];
        let lease = Lease { id, rows, seed: Digest::ZERO, batch_rows: 4, steps: 24, schedule_start: 0, deadline_ms: 0 };
        first.publish_job(id, &Job { hotkey: miner(11 + index), slot: 0, session_epoch: 7, leases: vec![lease] }).await;
    }
    first.publish_head(&Head { outer_step: 3, ..head }).await;
    first.fence.release().await;
    drop(journal);

    let (second, journal) = bucket.orchestrator(two.path()).await;
    let head = second.claim_head(second.fence.epoch().await).await.unwrap();
    let (recovered, input) = takeover::recover(&second, &journal, head.clone(), bucket.fresh()).await.unwrap();
    assert!(matches!(input, Input::Claimed { epoch: 2 }));
    let machine = &recovered.machine;
    assert_eq!((machine.fragment_versions(), machine.closed_below()), (vec![1, 0], 1));
    assert_eq!(machine.ledger().totals().leased_rows, 192);
    assert_eq!(machine.status().contributions, manifest.accepted().count() as u64);
    // A crash right here finds the journal complete: the same machine, and the taped step is merged.
    drop(recovered);
    let mut again = recover(&journal, || -> Orchestrator { unreachable!() }).unwrap();
    assert_eq!((again.machine.fragment_versions(), again.machine.ledger().totals().leased_rows), (vec![1, 0], 192));
    again.machine.handle(again.last_ms, input);
    let merges = std::iter::from_fn(|| again.machine.poll_effect())
        .filter(|effect| matches!(effect, crate::machine::Effect::Merge { tape, .. } if tape.t == 1))
        .count();
    assert_eq!(merges, 1);
}

#[tokio::test]
async fn a_disk_that_was_set_back_to_an_older_copy_does_not_move_the_head_back() {
    let (bucket, folder) = (Bucket::new().await, tempfile::tempdir().unwrap());
    let (service, journal) = bucket.orchestrator(folder.path()).await;
    let head = service.claim_head(1).await.unwrap();
    let (old, _) = takeover::recover(&service, &journal, head.clone(), bucket.fresh()).await.unwrap();
    assert!(!old.machine.is_behind(&head));
    // The journal remembers nothing of this merge and of the head that names it.
    let merged = service.write_tape(&bucket.tape(0, 0, 1, &[11, 12]).await).await;
    let (manifest, _, length) = service.merge(merged, Vec::new(), (Digest::ZERO, 0)).await;
    let mut later = Head { outer_step: 1, closed_below: 1, ..head };
    later.fragments[0] = FragmentHead { version: manifest.version, length, digest: manifest.keyframe };
    service.publish_head(&later).await;
    let head = service.claim_head(2).await.unwrap();
    let (recovered, _) = takeover::recover(&service, &journal, head.clone(), bucket.fresh()).await.unwrap();
    assert_eq!((recovered.machine.fragment_versions(), recovered.machine.closed_below()), (vec![1, 0], 1));
    // The journal holds that from now on.
    let again = recover(&journal, || -> Orchestrator { unreachable!() }).unwrap();
    assert!(!again.machine.is_behind(&head));
}

#[tokio::test]
async fn objects_that_contradict_each_other_are_refused_and_left_alone() {
    let (bucket, folder) = (Bucket::new().await, tempfile::tempdir().unwrap());
    let (service, journal) = bucket.orchestrator(folder.path()).await;
    let head = service.claim_head(1).await.unwrap();
    let tape = service.write_tape(&bucket.tape(0, 0, 1, &[11]).await).await;
    let manifest = MergeManifest {
        t: 0,
        fragment: 1,
        base_version: 0,
        version: 1,
        block: 0,
        closing: false,
        restores: None,
        contributions: Vec::new(),
        keyframe: Digest::ZERO,
        state: Digest::ZERO,
        step_norm: 0,
        step_limit_ppm: 1_000_000,
    };
    bucket.publish(&service.run.merge(tape.t), &manifest).await;
    let before = bucket.objects().await;
    let refused = takeover::recover(&service, &journal, head.clone(), bucket.fresh()).await.err().unwrap();
    assert_eq!(refused.exit, Exit::Configuration);
    assert!(refused.to_string().contains("contradicts the tape") && refused.to_string().contains("hint:"), "{refused}");
    assert_eq!(bucket.objects().await, before);
    // A snapshot of a newer version, and one that is damaged.
    let mut snapshot = bucket.fresh().to_snapshot(1).unwrap();
    snapshot[16] += 1;
    bucket.put(&service.run.snapshot(), snapshot.clone()).await;
    let refused = takeover::recover(&service, &journal, head.clone(), bucket.fresh()).await.err().unwrap();
    assert_eq!(refused.exit, Exit::Configuration);
    assert!(refused.to_string().contains("layout"), "{refused}");
    bucket.put(&service.run.snapshot(), b"not a snapshot".to_vec()).await;
    let refused = takeover::recover(&service, &journal, head, bucket.fresh()).await.err().unwrap();
    assert_eq!(refused.exit, Exit::Configuration);
    assert!(refused.to_string().contains("damaged") && refused.to_string().contains("hint:"), "{refused}");
    assert!(journal.is_empty().unwrap(), "nothing was begun");
}

#[tokio::test]
async fn tapes_and_merges_that_do_not_lead_to_the_head_are_refused_and_left_alone() {
    let first = Bucket::new().await;
    let tapes = [first.tape(0, 0, 1, &[11]).await, first.tape(1, 0, 1, &[11]).await, first.tape(2, 1, 1, &[11]).await];
    type Change = fn(&mut [Option<Tape>; 3], &mut Head);
    let cases: [(&str, Change); 6] = [
        ("is missing", |tapes, _| tapes[1] = None),
        ("of another outer step", |tapes, _| tapes[1].as_mut().unwrap().t = 3),
        ("of another outer step", |tapes, _| tapes[1].as_mut().unwrap().fragment = 7),
        ("does not begin with version 1", |tapes, _| tapes[2].as_mut().unwrap().base_version = 0),
        ("ahead of the tapes", |_, head| head.fragments[1].version = 2),
        ("is missing", |_, head| head.closed_below = 4),
    ];
    for (why, change) in cases {
        let (bucket, folder) = (Bucket::new().await, tempfile::tempdir().unwrap());
        let (service, journal) = bucket.orchestrator(folder.path()).await;
        let mut head = service.claim_head(1).await.unwrap();
        (head.outer_step, head.closed_below) = (3, 3);
        for t in 0..3u64 {
            // Their payloads lie in the bucket.
            bucket.tape(t, t / 2, 1, &[11]).await;
        }
        let mut changed = tapes.clone().map(Some);
        for tape in &tapes {
            // The merges are whole, whatever becomes of the tapes.
            service.merge(tape.clone(), Vec::new(), (Digest::ZERO, 0)).await;
        }
        change(&mut changed, &mut head);
        for (t, tape) in (0..).zip(changed) {
            if let Some(tape) = tape {
                bucket.publish(&service.run.tape(t), &tape).await;
            }
        }
        let before = bucket.objects().await;
        let refused = takeover::recover(&service, &journal, head, bucket.fresh()).await.err().unwrap();
        assert_eq!(refused.exit, Exit::Configuration);
        assert!(refused.to_string().contains(why) && refused.to_string().contains("hint:"), "{why}: {refused}");
        assert!(bucket.objects().await == before && journal.is_empty().unwrap(), "{why}");
    }
}

#[tokio::test]
async fn a_page_holds_published_training_shards_of_the_run_and_a_successor_finds_it() {
    let (bucket, folder) = (Bucket::new().await, tempfile::tempdir().unwrap());
    let (service, journal) = bucket.orchestrator(&folder.path().join("a")).await;
    let (keys, outside) = (Keys::new(NETUID), bucket.context.without_run());
    let shard = |id: &str| ShardManifest {
        id: id.into(),
        rows: 7,
        row_tokens: parameters().sequence_length,
        tokens: 7 * u64::from(parameters().sequence_length),
        file: FileRecord::of_bytes("tokens.bin", b"tokens"),
        tokenizer: Digest::ZERO,
        vocab_size: 16,
        licence: "public domain".into(),
        source: "a test".into(),
        held_out: false,
    };
    for (name, shard) in [
        ("good", shard("good")),
        ("held", ShardManifest { held_out: true, ..shard("held") }),
        ("short", ShardManifest { row_tokens: 3, ..shard("short") }),
        ("other-name", shard("good")),
    ] {
        bucket.put(&keys.shard_manifest(name), sign(&shard, &outside, &*bucket.signer, 1, 1)).await;
    }
    let first = service.manifest.catalog.last().map_or(Digest::ZERO, |page| page.digest);
    let page = async |ids: &[&str]| {
        let ids: Vec<String> = ids.iter().map(|id| (*id).to_owned()).collect();
        service.write_page(1, first, &ids).await
    };
    for (id, why) in
        [("nothing", "is not published"), ("held", "is held out"), ("short", "rows of 3 tokens"), ("other-name", "contradicts itself")]
    {
        let refused = page(&["good", id]).await.unwrap_err();
        assert!(refused.contains(why), "{refused}");
    }
    assert!(bucket.store.get(&service.run.catalog(1), 1 << 20).await.is_err(), "nothing was written");
    let stored = page(&["good"]).await.unwrap();
    assert_eq!((stored.shards.len(), stored.shards[0].rows), (1, 7));
    assert_eq!(page(&["good"]).await.unwrap(), stored, "what lies there stands");
    drop(journal);

    let head = service.claim_head(2).await.unwrap();
    let (_, journal) = bucket.orchestrator(&folder.path().join("b")).await;
    let (recovered, _) = takeover::recover(&service, &journal, head, bucket.fresh()).await.unwrap();
    assert_eq!(recovered.machine.newest_page(), stored.reference);
    assert!(recovered.machine.ledger().has_shard("good"));
}

#[tokio::test]
async fn a_journal_that_others_have_written_past_is_put_aside() {
    let (bucket, one, two) = (Bucket::new().await, tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (first, journal) = bucket.orchestrator(one.path()).await;
    let head = first.claim_head(1).await.unwrap();
    takeover::recover(&first, &journal, head, bucket.fresh()).await.unwrap();
    first.fence.release().await;
    drop((first, journal));
    let (second, _journal) = bucket.orchestrator(two.path()).await;
    second.claim_head(2).await.unwrap();
    second.fence.release().await;
    // Back on the first machine: its journal knows nothing of the second one's time.
    let (_third, journal) = bucket.orchestrator(one.path()).await;
    assert!(journal.is_empty().unwrap());
    let aside =
        std::fs::read_dir(one.path()).unwrap().flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with("journal-until-"));
    assert_eq!(aside.count(), 1, "it is kept under another name");
}

#[tokio::test]
async fn a_journal_of_another_version_is_refused_before_anybody_asks_for_the_lease() {
    let (bucket, folder) = (Bucket::new().await, tempfile::tempdir().unwrap());
    let (service, journal) = bucket.orchestrator(folder.path()).await;
    let head = service.claim_head(1).await.unwrap();
    takeover::recover(&service, &journal, head, bucket.fresh()).await.unwrap();
    journal.put("driver/layout", &u32::MAX.to_le_bytes()).unwrap();
    let bytes = bucket.store.get(&service.run.writer_lease(), 1 << 16).await.unwrap().bytes;
    let last = service.open_own::<protocol::documents::WriterLease>(&bytes).unwrap().document;
    drop((service, journal));
    let refused = takeover::open_journal(folder.path(), Some(&last)).err().unwrap();
    assert_eq!(refused.exit, Exit::Configuration);
    assert!(refused.to_string().contains("layout"), "{refused}");
    // Where somebody else wrote since, it is history in any case.
    let other = protocol::documents::WriterLease { instance: [9; 16], ..last };
    assert!(takeover::open_journal(folder.path(), Some(&other)).is_ok());
}
