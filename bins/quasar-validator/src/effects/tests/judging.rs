//! From an order to a verdict, and from verdicts to weights.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn honest_work_passes_and_earns_the_weights() {
    let published = Published::new(&Cheat::default()).await;
    published.publish_order(true, |_| {}).await;
    published
        .live(toys(&published.world), false, async |published: &Published| {
            published.reveal().await.is_some() && published.scores().await.is_some()
        })
        .await;
    assert_eq!(published.row().await, [(MINER_UID, u16::MAX)]);
    let scores = published.scores().await.unwrap();
    let score = Score { hotkey: signer().key().account(), tokens: published.case.subject.contribution.tokens, weight: u16::MAX };
    assert_eq!((scores.epoch, scores.scores), (2, vec![score]), "both cycles are in the scores");
    let (commit, reveal) = (published.commit().await.unwrap(), published.reveal().await.unwrap());
    assert_eq!((reveal.verdict.result, reveal.verdict.reason), (VerdictResult::Pass, Reason::None));
    assert_eq!((reveal.verdict.measured.replay_error_ppm, reveal.verdict.measured.replayed_steps), (0, 3));
    assert_eq!(commit.commitment, reveal.verdict.commitment(&reveal.salt));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_validator_with_an_sr25519_hotkey_audits_and_sets_weights_like_others() {
    let published = Published::with_key(&Cheat::default(), KeyKind::Sr25519).await;
    published.publish_order(true, |_| {}).await;
    published
        .live(toys(&published.world), false, async |published: &Published| {
            published.reveal().await.is_some() && published.scores().await.is_some()
        })
        .await;
    assert_eq!(published.reveal().await.unwrap().verdict.result, VerdictResult::Pass);
    assert_eq!(published.row().await, [(MINER_UID, u16::MAX)]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn work_on_other_rows_fails_and_the_weight_goes_to_the_validator_itself() {
    let published = Published::new(&Cheat { other_rows: true, ..Cheat::default() }).await;
    published.publish_order(true, |_| {}).await;
    published
        .live(toys(&published.world), false, async |published: &Published| {
            published.reveal().await.is_some() && published.row().await == [(OWN_UID, u16::MAX)]
        })
        .await;
    let verdict = published.reveal().await.unwrap().verdict;
    assert_eq!((verdict.result, verdict.reason), (VerdictResult::Mismatch, Reason::ReplayMismatch));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_between_commitment_and_reveal_reveals_the_verdict_that_was_committed() {
    let published = Published::new(&Cheat::default()).await;
    published.publish_order(false, |_| {}).await;
    published.live(toys(&published.world), false, async |published: &Published| published.commit().await.is_some()).await;
    assert!(published.reveal().await.is_none());
    let committed = published.commit().await.unwrap();
    // In the second life the audit would come to another verdict, if it were judged again.
    published.publish_order(true, |_| {}).await;
    published.live(broken(), false, async |published: &Published| published.reveal().await.is_some()).await;
    let reveal = published.reveal().await.unwrap();
    assert_eq!(reveal.verdict.result, VerdictResult::Pass);
    assert_eq!(committed.commitment, reveal.verdict.commitment(&reveal.salt));
    assert_eq!(published.commit().await.unwrap(), committed);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_order_that_differs_from_the_beacons_selection_gets_a_verdict_that_judges_nobody() {
    let published = Published::new(&Cheat::default()).await;
    published.publish_order(true, |order| order.t = 5).await;
    published.live(toys(&published.world), true, async |published: &Published| published.reveal().await.is_some()).await;
    let verdict = published.reveal().await.unwrap().verdict;
    assert_eq!((verdict.result, verdict.reason, verdict.t), (VerdictResult::NotEvaluated, Reason::NotEvaluated, T));
    assert!(published.row().await.is_empty(), "a dry run writes nothing to the chain");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_opening_that_cannot_be_unsealed_counts_as_none_because_nobody_can_tell_whose_fault_it_is() {
    let published = Published::new(&Cheat::default()).await;
    // The order delivers another key than the one that the miner sealed to.
    published.publish_order_sealed_with(true, &seal_stream::key_pair(&[7; 32]).0, |_| {}).await;
    published.live(toys(&published.world), true, async |published: &Published| published.reveal().await.is_some()).await;
    let verdict = published.reveal().await.unwrap().verdict;
    assert_eq!((verdict.result, verdict.reason), (VerdictResult::NoOpening, Reason::NoOpening));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_opening_in_volumes_is_judged_as_one_and_a_volume_that_came_is_not_fetched_again() {
    const VOLUME_BYTES: u64 = 1_000;
    let published = Published::new(&Cheat::default()).await;
    let selection = &published.case.subject.selection;
    let keys = published.run.slot(&selection.hotkey, 0);
    let key = |part: u8, volume| keys.opening_volume(&selection.audit, part, volume);
    let mut last = 0;
    for (part, bytes) in (0..).zip(published.parts()) {
        for (volume, range) in opening_volumes(bytes.len() as u64, VOLUME_BYTES) {
            published.put(&key(part, volume), bytes.slice(range.start as usize..range.end as usize)).await;
            published.volumes.lock().unwrap().extend((volume > 0).then(|| key(part, volume)));
            last = if part == 1 { volume } else { last };
        }
    }
    assert!(last >= 2, "{last}");
    published.publish_order(true, |_| {}).await;
    let mut effects = published.effects(toys(&published.world)).await;
    effects.openings.volume_bytes = VOLUME_BYTES;
    assert_eq!(effects.order(selection).await, OrderRead::Fits);
    let whole = published.store.get(&key(1, last), 1 << 20).await.unwrap().bytes;
    published.store.delete(&key(1, last)).await.unwrap();
    published.put(&key(1, last), "damaged").await;
    let judge = async || effects.judge(published.case.subject.clone(), vec![0, 1, 0]).await;
    let judged = judge().await;
    assert!(matches!(judged, Judged::Failed(_)), "{judged:?}");
    // The store has the last one whole again, and the others no more.
    published.store.delete(&key(1, last)).await.unwrap();
    published.put(&key(1, last), whole).await;
    published.store.delete(&key(1, 0)).await.unwrap();
    let judged = judge().await;
    assert!(matches!(&judged, Judged::Done(judgement) if judgement.result == VerdictResult::Pass), "{judged:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_part_that_is_not_there_or_not_what_was_announced_counts_as_none_and_one_that_is_too_long_is_not_looked_at() {
    let published = Published::new(&Cheat::default()).await;
    let selection = &published.case.subject.selection;
    let key = published.run.opening(&selection.hotkey, 0, &selection.audit, 1);
    published.publish_order(true, |_| {}).await;
    published.store.delete(&key).await.unwrap();
    let judge = async || {
        let effects = published.effects(toys(&published.world)).await;
        assert_eq!(effects.order(selection).await, OrderRead::Fits);
        effects.judge(published.case.subject.clone(), vec![0, 1, 0]).await
    };
    // Its miner called it uploaded.
    let judged = judge().await;
    assert!(matches!(&judged, Judged::Done(judgement) if judgement.result == VerdictResult::NoOpening), "{judged:?}");
    // A grant for a volume binds its length alone.
    published.put(&key, vec![7; published.parts()[1].len()]).await;
    let judged = judge().await;
    assert!(matches!(&judged, Judged::Done(judgement) if judgement.result == VerdictResult::NoOpening), "{judged:?}");
    published.publish_order(true, |order| order.opening[0].length = 1 << 20).await;
    let judged = judge().await;
    assert!(matches!(&judged, Judged::Failed(why) if why.contains("longer than")), "{judged:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn models_that_do_not_open_end_as_not_evaluated() {
    let published = Published::new(&Cheat::default()).await;
    published.publish_order(true, |_| {}).await;
    published.live(broken(), false, async |published: &Published| published.reveal().await.is_some()).await;
    assert_eq!(published.reveal().await.unwrap().verdict.result, VerdictResult::NotEvaluated);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_store_lacks_is_waited_for_and_models_that_do_not_open_are_not() {
    let published = Published::new(&Cheat::default()).await;
    published.publish_order(true, |_| {}).await;
    let subject = &published.case.subject;
    let judge = async |open_engine: OpenEngine| {
        let effects = published.effects(open_engine).await;
        assert_eq!(effects.order(&subject.selection).await, OrderRead::Fits);
        effects.judge(subject.clone(), vec![0, 1, 0]).await
    };
    let judged = judge(broken()).await;
    assert!(matches!(judged, Judged::Failed(_)), "{judged:?}");
    // The evidence is here, and the rows of the loss test are not.
    let held_out = Keys::new(NETUID).shard_tokens("held");
    published.store.delete(&held_out).await.unwrap();
    let judged = judge(toys(&published.world)).await;
    assert!(matches!(judged, Judged::Unavailable(_)), "{judged:?}");
    published.put(&held_out, token_file("held", 6)).await;
    let judged = judge(toys(&published.world)).await;
    assert!(matches!(judged, Judged::Done(_)), "{judged:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_grants_of_an_order_that_have_expired_are_not_waited_for() {
    let published = Published::new(&Cheat::default()).await;
    published.publish_order(true, |_| {}).await;
    let effects = published.effects(broken()).await;
    let selection = &published.case.subject.selection;
    assert_eq!(effects.order(selection).await, OrderRead::Fits);
    let key = published.run.payload(&selection.hotkey, 0, T);
    effects.grants.expire(&selection.audit);
    assert!(matches!(effects.grants.get(Some(&selection.audit), &key, 1 << 20).await, Err(Trouble::OrderExpired { .. })));
    assert!(matches!(effects.grants.get(Some(&selection.audit), "another", 1).await, Err(Trouble::NoGrant { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_of_an_auditor_that_is_no_verdict_counts_as_none() {
    let published = Published::new(&Cheat::default()).await;
    let effects = published.effects(broken()).await;
    let subject = &published.case.subject;
    let audit = subject.selection.audit;
    let none = Input::Verdict { audit, verdict: None };
    assert_eq!(effects.verdict(subject).await, none);
    let key = published.run.verdict_reveal(&subject.selection.validator, &audit);
    // Who may write there writes what it likes.
    let stranger = sign(&VerdictCommit { audit, commitment: Digest::ZERO }, &published.world.context, &published.orchestrator, 1, 1);
    for bytes in [b"anything".to_vec(), stranger] {
        published.put(&key, bytes).await;
        assert_eq!(effects.verdict(subject).await, none);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_could_audit_is_remembered_when_the_chain_has_forgotten_it() {
    let published = Published::new(&Cheat::default()).await;
    let block = published.case.subject.selection.beacon_block;
    let DrawRead::Drawn(seen) = published.effects(broken()).await.draw(1, block).await else { panic!("the chain knows") };
    assert_eq!(seen.validators, [published.hotkey.account()]);
    // Somebody else's list, written down when the chain knows no more.
    let written = AuditDraw { validators: vec![AccountId([7; 32])], ..(*seen).clone() };
    published.put_document(&published.run.draw(1), &published.world.context, &written).await;
    published.chain.advance(::chain::STATE_BLOCKS + 1);
    published.chain.forget(block + 1);
    assert_eq!(published.effects(broken()).await.draw(1, block).await, DrawRead::Drawn(seen.clone()));
    // Another validator goes by what was written down, unless that is no document of the orchestrator.
    let journal = || Arc::new(Journal::in_memory().unwrap());
    let other = Published { journal: journal(), ..published };
    assert_eq!(other.effects(broken()).await.draw(1, block).await, DrawRead::Drawn(Box::new(written)));
    other.put(&other.run.draw(1), "anything").await;
    assert_eq!(other.effects(broken()).await.draw(1, block).await, DrawRead::Forgotten);
    // Of a block that is not forgotten, an endpoint that does not know it lags behind.
    let newest = other.chain.advance(1).number;
    other.chain.forget(newest + 1);
    assert_eq!(other.effects(broken()).await.draw(1, newest).await, DrawRead::Failed);
}
