//! Openings: what a miner uploads must replay to what it committed, bit for bit on the same machine.

use model::{Batch, Trainer, TrainerState};
use protocol::documents::{Codec, OpeningManifest};
use protocol::lease::LeaseRows;
use protocol::steps::{Exchange, segment_digest, with_residual};
use protocol::{Digest, codec};

use fragments::codec::{PayloadHeader, encode};

use super::world::{FRAGMENTS, ROW_TOKENS, START_MS, STEP_MS, World, lease, parameters, token, toy};
use crate::trainer::hyper;

fn train(world: &mut World, steps: u64) {
    while world.records.last().is_none_or(|record| record.local_step < steps) {
        world.run_for(STEP_MS);
    }
}

/// Answers one pull after a fragment moved in the middle of a segment; gives the commitment's record and the payload.
fn committed(world: &mut World) -> (protocol::documents::Commitment, bytes::Bytes) {
    world.job.leases = vec![lease(1, 60)];
    train(world, 5);
    world.publish(2, 1);
    train(world, 7);
    world.open_pull(1);
    train(world, 11);
    let commitment = world.record().commitments[0].clone();
    let payload = world.plane.payloads.get(1).unwrap();
    (commitment, payload)
}

#[test]
fn an_opening_is_complete_and_replays_to_the_committed_payload() {
    let folder = tempfile::tempdir().unwrap();
    let mut world = World::new(folder.path(), START_MS);
    let (commitment, payload) = committed(&mut world);
    let audit = Digest::blake3(b"audit");
    world.notice(audit, 1);
    world.run_for(500);
    assert_eq!(world.record().openings.len(), 3);
    assert!(world.record().openings.iter().all(|part| !part.uploaded));
    world.grant_uploads();
    world.run_for(1_000);
    assert!(world.record().openings.iter().all(|part| part.uploaded));

    let manifest: OpeningManifest = codec::decode(&world.opening_part(&audit, 0), 1 << 20).unwrap();
    let elements = toy().plan().total_elements() as usize;
    let state = TrainerState::from_bytes(&world.opening_part(&audit, 1), elements).unwrap();
    assert_eq!((manifest.audit, manifest.t, manifest.start_step), (audit, 1, commitment.start_step));
    assert_eq!(segment_digest(manifest.start_step, &state.digest(), &manifest.versions), commitment.start_digest);
    let steps: Vec<u64> = manifest.steps.iter().map(|step| step.local_step).collect();
    assert_eq!(steps, (commitment.start_step..commitment.local_step).collect::<Vec<_>>());
    let routes = world.opening_part(&audit, 2);
    assert_eq!(routes.len(), manifest.steps.len() * (4 + 2 * 3));
    assert_eq!(routes[..4], 3u32.to_le_bytes());

    let mut replica = toy();
    replica.restore(&state).unwrap();
    let lease = lease(1, 60);
    let rows = LeaseRows::of(&lease);
    for (index, step) in manifest.steps.iter().enumerate() {
        let after_state: Vec<Exchange> = Exchange::after_state(&step.exchanged).copied().collect();
        for exchange in if index == 0 { &after_state } else { &step.exchanged } {
            match *exchange {
                Exchange::Applied { fragment, version } => {
                    Trainer::apply(&mut replica, usize::from(fragment), &World::values(fragment, version)).unwrap();
                }
                Exchange::Exported { fragment } => drop(replica.contribute(usize::from(fragment)).unwrap()),
            }
        }
        let tokens: Vec<u32> =
            rows.step(step.lease_step).iter().flat_map(|row| (0..ROW_TOKENS).map(|column| token(row.row, column))).collect();
        let batch = Batch { tokens: &tokens, rows: 2, row_tokens: ROW_TOKENS };
        let lr = parameters().inner.lr(lease.schedule_start + u64::from(step.lease_step));
        let report = replica.step(&batch, &hyper(&parameters().inner, lr), None, false).unwrap();
        assert_eq!(protocol::documents::micro_nats(report.loss), step.loss);
    }
    let plan = model::toy_plan(FRAGMENTS);
    let weights = replica.export(1).unwrap();
    let change: Vec<f32> = World::values(1, 0).iter().zip(&weights).map(|(base, weight)| base - weight).collect();
    let replayed = encode(&PayloadHeader::bf16(&plan, plan.digest(), 1, commitment.base_version), &change).unwrap();
    assert_eq!(Digest::blake3(&replayed), commitment.blake3);
    assert_eq!(replayed, payload);

    world.head.notices.clear();
    world.run_for(500);
    assert!(world.record().openings.is_empty());
}

#[test]
fn an_opening_of_a_payload_with_error_feedback_shows_what_had_been_withheld() {
    let folder = tempfile::tempdir().unwrap();
    let mut world = World::with_codec(folder.path(), START_MS, Codec::TopK);
    let (first, _) = committed(&mut world);
    world.head.pulls.clear();
    let feedback = world.plane.feedback.as_ref().unwrap();
    let [sent] = feedback.pending()[..] else { panic!("one payload is not settled") };
    assert_eq!((sent.t, sent.fragment, sent.base_version), (1, 1, first.base_version));
    feedback.settle(&sent, None).unwrap();
    world.open_pull(4);
    train(&mut world, 15);
    let commitment = world.record().commitments[0].clone();
    assert_eq!((commitment.t, commitment.fragment), (4, 1));
    // What is settled later does not change what the payload is bound to.
    let sent = world.plane.feedback.as_ref().unwrap().pending()[0];
    world.plane.feedback.as_ref().unwrap().settle(&sent, None).unwrap();
    let audit = Digest::blake3(b"audit");
    world.notice(audit, 4);
    world.run_for(500);
    let manifest: OpeningManifest = codec::decode(&world.opening_part(&audit, 0), 1 << 20).unwrap();
    let part = world.opening_part(&audit, 1);
    let values = 4 * model::toy_plan(FRAGMENTS).elements(1) as usize;
    let (state, residual) = part.split_at(part.len() - values - 32);
    let state = TrainerState::from_bytes(state, toy().plan().total_elements() as usize).unwrap();
    assert!(residual[..values].iter().any(|byte| *byte != 0), "the first payload left something out");
    assert_eq!(Digest::blake3(&residual[..values]).0, residual[values..]);
    let start = segment_digest(manifest.start_step, &state.digest(), &manifest.versions);
    assert_eq!(with_residual(&start, &Digest::blake3(&residual[..values])), commitment.start_digest);
}

#[test]
fn a_segment_of_an_earlier_session_is_opened_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let mut world = World::new(folder.path(), START_MS);
    let (commitment, _) = committed(&mut world);
    world.grant_uploads();
    world.run_for(500);
    assert_eq!(world.uploads, ["payload 1"]);
    world.plane.spool.flush().unwrap();
    let mut again = World::new(folder.path(), START_MS + 60_000);
    again.records.clone_from(&world.records);
    let audit = Digest::blake3(b"audit");
    again.notice(audit, 1);
    again.run_for(1_000);
    assert_eq!(again.record().openings.len(), 3);
    let manifest: OpeningManifest = codec::decode(&again.opening_part(&audit, 0), 1 << 20).unwrap();
    assert_eq!((manifest.start_step, manifest.steps.len() as u64), (commitment.start_step, commitment.local_step - commitment.start_step));
}

#[test]
fn a_segment_whose_state_is_torn_leaves_the_record_without_parts_and_training_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let mut world = World::new(folder.path(), START_MS);
    committed(&mut world);
    world.plane.spool.flush().unwrap();
    let files = std::fs::read_dir(folder.path().join("spool")).unwrap().map(|entry| entry.unwrap().path());
    let states: Vec<_> = files.filter(|path| path.extension().is_some_and(|ending| ending == "state")).collect();
    assert!(!states.is_empty());
    for state in states {
        let bytes = std::fs::read(&state).unwrap();
        std::fs::write(state, &bytes[..bytes.len() / 2]).unwrap();
    }
    world.notice(Digest::blake3(b"audit"), 1);
    world.run_for(1_000);
    assert!(world.record().openings.is_empty());
    let steps = world.record().local_step;
    train(&mut world, steps + 4);
}

#[test]
fn a_segment_that_is_gone_leaves_the_record_without_parts() {
    let folder = tempfile::tempdir().unwrap();
    let mut world = World::new(folder.path(), START_MS);
    train(&mut world, 2);
    world.notice(Digest::blake3(b"audit"), 77);
    world.run_for(1_000);
    assert!(world.record().openings.is_empty());
    train(&mut world, 4);
}
