//! What is kept of those who contradict themselves.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn two_grants_with_one_sequence_are_kept_as_a_proof_that_inspect_verifies() {
    let published = Published::new(&Cheat::default()).await;
    let effects = published.effects(broken()).await;
    let (own, context) = (published.hotkey.account(), &published.world.context);
    assert!(effects.grants.get(None, "nothing", 1).await.is_err(), "the first bundle is looked at");
    let other = StandingGrants {
        hotkey: own,
        slot: 0,
        session_epoch: 0,
        sealed: protocol::SealedBytes { encapsulated: [9; 32], ciphertext: vec![9; 400_000] },
    };
    let header = header_for::<StandingGrants>(context, published.orchestrator.key(), 1, clock::now_ms());
    published.put(&published.run.standing(&own, 0), sign_with_header(header, &other, &published.orchestrator)).await;
    // Looks have a least pause.
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    assert!(effects.grants.get(None, "nothing", 1).await.is_err());
    let kept: Vec<String> = names_in(published.state.path()).into_iter().filter(|name| name.starts_with("equivocation-")).collect();
    assert_eq!(kept.len(), 1, "{kept:?}");
    let shown = daemon::inspect::file(&published.state.path().join(&kept[0])).unwrap();
    assert_eq!(shown.json["proof"]["convicted"], published.orchestrator.key().account().to_string(), "{}", shown.json["proof"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn log_heads_are_kept_as_they_were_signed_and_a_second_one_of_a_size_beside_the_first() {
    let published = Published::new(&Cheat::default()).await;
    let effects = published.effects(broken()).await;
    let context = &published.world.context;
    let head = |number: u64| {
        let entries = vec![LogEntry { kind: LogKind::Merge, document: Digest::blake3(&number.to_le_bytes()) }];
        let mut frontier = Frontier::default();
        entries.iter().for_each(|entry| frontier.append(entry));
        LogHead { previous: 0, entries, frontier }
    };
    assert!(effects.log.read(1).await.unwrap().is_none(), "nothing is there");
    for number in [1, 2] {
        published.put_document(&published.run.log(1), context, &head(number)).await;
        assert_eq!(effects.log.read(1).await.unwrap(), Some(head(number)));
        assert_eq!(effects.log.read(1).await.unwrap(), Some(head(number)));
    }
    let folder = published.state.path().join("log-heads").join(context.run.to_string());
    let kept = names_in(&folder);
    assert_eq!(kept.len(), 2, "{kept:?}");
    for name in &kept {
        let shown = daemon::inspect::file(&folder.join(name)).unwrap();
        assert_eq!(shown.json["verification"], "signature valid");
    }
    published.put(&published.run.log(1), "no document").await;
    assert!(effects.log.read(1).await.is_err());
    assert_eq!(names_in(&folder), kept, "what nobody signed is not kept");

    // A head of the run is kept only where it names another log than the one before.
    let log = |number: u64| LogRef::from(&head(number).frontier);
    let heads = || names_in(&folder).len();
    effects.log.is_named(log(1)).await;
    effects.log.is_named(log(1)).await;
    assert_eq!(heads(), 2);
    effects.log.is_named(log(2)).await;
    assert_eq!(heads(), 3, "the same size with another root");
}
