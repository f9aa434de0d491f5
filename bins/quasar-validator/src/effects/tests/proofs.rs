//! What is kept of those who contradict themselves.

use protocol::envelope::peek;

use super::*;

impl Published {
    /// Replaces the orchestrator's document at `key` by another one with its sequence.
    async fn contradict<D: Document>(&self, key: &str, change: impl FnOnce(&mut D)) {
        let file = self.store.get(key, D::PURPOSE.file_limit()).await.unwrap().bytes;
        let header = peek(&file).unwrap().0.header;
        let context = Context { run: header.run, ..self.world.context };
        let mut document = open_stored::<D>(&file, &context, Expect::Key(&self.orchestrator.key())).unwrap().document;
        change(&mut document);
        self.put(key, sign(&document, &context, &self.orchestrator, header.sequence, clock::now_ms())).await;
    }

    /// One proof lies in the state folder, and it convicts the orchestrator.
    fn assert_convicted(&self) {
        let is_proof = |name: &String| name.starts_with("equivocation-") && name.ends_with(".qsr");
        let kept: Vec<String> = names_in(self.state.path()).into_iter().filter(is_proof).collect();
        assert_eq!(kept.len(), 1, "{kept:?}");
        let shown = daemon::inspect::file(&self.state.path().join(&kept[0])).unwrap();
        assert_eq!(shown.exit(), Exit::Done, "{}", shown.json["proof"]);
        assert_eq!(shown.json["proof"]["convicted"], self.orchestrator.key().account().to_string(), "{}", shown.json["proof"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_grants_with_one_sequence_are_kept_as_a_proof_that_inspect_verifies() {
    let published = Published::new(&Cheat::default()).await;
    let effects = published.effects(broken()).await;
    assert!(effects.grants.get(None, "nothing", 1).await.is_err(), "the first bundle is looked at");
    let other = protocol::SealedBytes { encapsulated: [9; 32], ciphertext: vec![9; 400_000] };
    let key = published.run.standing(&published.hotkey.account(), 0);
    published.contradict::<StandingGrants>(&key, |grants| grants.sealed = other).await;
    // Looks have a least pause.
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    assert!(effects.grants.get(None, "nothing", 1).await.is_err());
    published.assert_convicted();
}

#[tokio::test(flavor = "multi_thread")]
async fn two_heads_with_one_sequence_are_kept_as_a_proof_that_inspect_verifies() {
    let published = Published::new(&Cheat::default()).await;
    let effects = published.effects(broken()).await;
    assert!(effects.head().await.is_some());
    published.contradict::<Head>(&published.run.head(), |head| head.block += 1).await;
    assert!(effects.head().await.is_none());
    published.assert_convicted();
}

#[tokio::test(flavor = "multi_thread")]
async fn two_pointers_to_the_current_run_with_one_sequence_are_kept_as_a_proof_while_a_run_is_followed() {
    let published = Published::new(&Cheat::default()).await;
    let effects = published.effects(broken()).await;
    assert!(!effects.moved().await);
    published.contradict::<CurrentRun>(&Keys::new(NETUID).current(), |current| current.run = RunId([9; 16])).await;
    assert!(!effects.moved().await, "it counts for nothing");
    published.assert_convicted();
}

#[cfg(feature = "libtorch")]
#[tokio::test(flavor = "multi_thread")]
async fn two_pointers_to_the_current_run_with_one_sequence_are_kept_as_a_proof_while_a_run_is_looked_for() {
    let published = Published::new(&Cheat::default()).await;
    let roots = Roots::unremembered(published.chain.genesis(), NETUID, published.owner.key().account());
    let look = || crate::run::find(&published.public, &roots, None, &published.hotkey, published.state.path());
    assert!(look().await.is_ok());
    published.contradict::<CurrentRun>(&Keys::new(NETUID).current(), |current| current.run = RunId([9; 16])).await;
    assert!(look().await.is_err());
    published.assert_convicted();
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
