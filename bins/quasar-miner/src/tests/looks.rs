//! Looks at a real object server: none waits for another, and whoever contradicts himself is convicted.

use std::sync::Arc;
use std::time::Duration;

use protocol::Digest;
use protocol::documents::{CatalogPage, CatalogRef, CurrentRun, Head, Job, PullGrants, StandingGrants};
use tokio::sync::mpsc;

use super::published::Published;
use super::world::SLOT;
use crate::edge::Edge;
use crate::machine::{Effect, Found, Input, Look};

async fn look(edge: &Arc<Edge>, at: Look) -> Found {
    let (inputs, mut queue) = mpsc::channel(1);
    edge.clone().execute(Effect::Look(at), inputs).await;
    match queue.recv().await {
        Some(Input::Looked { found, .. }) => found,
        other => panic!("{other:?}"),
    }
}

async fn assert_found(edge: &Arc<Edge>, at: Look) {
    let found = look(edge, at).await;
    assert!(!matches!(found, Found::Nothing | Found::Failed), "{at:?}: {found:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn while_one_look_hangs_the_others_are_answered_and_it_is_given_up_in_time() {
    let published = Published::new().await;
    let edge = published.edge().await;
    published.hang(&published.run.job(&published.hotkey.account(), SLOT));
    let job = tokio::spawn({
        let edge = edge.clone();
        async move { look(&edge, Look::Job).await }
    });
    // Its request is under way by then.
    tokio::time::sleep(Duration::from_millis(200)).await;
    for at in Look::ALL.into_iter().filter(|at| *at != Look::Job) {
        assert_found(&edge, at).await;
    }
    assert!(!job.is_finished());
    let found = tokio::time::timeout(Duration::from_secs(15), job).await.expect("it is given up before the connection is");
    assert_eq!(found.unwrap(), Found::Failed);
    published.answer();
    assert_found(&edge, Look::Job).await;
    assert_eq!(look(&edge, Look::Job).await, Found::Nothing, "it is told once");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_whose_catalog_does_not_come_in_time_is_told_at_the_next_look() {
    let published = Published::new().await;
    let edge = published.edge().await;
    assert_found(&edge, Look::Head).await;
    let page = CatalogPage { page: 1, previous: published.head.catalog.digest, shards: Vec::new() };
    let digest = published.publish(&published.run.catalog(1), &page, 1).await;
    let head = Head { catalog: CatalogRef { page: 1, digest }, ..published.head.clone() };
    published.publish(&published.run.head(), &head, 2).await;
    published.hang(&published.run.catalog(1));
    assert_eq!(look(&edge, Look::Head).await, Found::Failed);
    published.answer();
    assert_eq!(look(&edge, Look::Head).await, Found::Head(Box::new(head)));
    assert_eq!(look(&edge, Look::Head).await, Found::Nothing, "it is told once");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_documents_with_one_sequence_are_kept_as_a_proof_that_inspect_verifies_whatever_is_looked_at() {
    let published = Published::new().await;
    let (run, hotkey) = (&published.run, published.hotkey.account());
    let edge = published.edge().await;
    for at in Look::ALL {
        assert_found(&edge, at).await;
    }
    published.assert_convicted(0);
    published.contradict::<Head>(&run.head(), |head| head.block += 1).await;
    published.contradict::<Job>(&run.job(&hotkey, SLOT), |job| job.session_epoch += 1).await;
    published.contradict::<StandingGrants>(&run.standing(&hotkey, SLOT), |grants| grants.session_epoch += 1).await;
    published.contradict::<PullGrants>(&run.pull_grants(&hotkey, SLOT), |grants| grants.session_epoch += 1).await;
    published.contradict::<CurrentRun>(&published.keys.current(), |current| current.manifest_digest = Digest::ZERO).await;
    for (at, proofs) in Look::ALL.into_iter().zip(1..) {
        assert_eq!(look(&edge, at).await, Found::Failed, "{at:?}");
        published.assert_convicted(proofs);
    }
}
