//! What a life of the machine leaves to the next one, and that neither sends what the other has sent.

use super::*;

/// A fresh machine that knows what `setter` would have left in the journal.
fn next_life(setter: &Setter, number: u64) -> Setter {
    let stored = serde_json::to_vec(&setter.memory()).unwrap();
    let mut next = Setter::new(settings());
    next.recall(time(number), serde_json::from_slice(&stored).unwrap());
    next
}

/// The next life with the same scores, which has looked at the chain.
fn revived(setter: &Setter, number: u64, seen: Input) -> Setter {
    let mut next = next_life(setter, number);
    next.handle(time(number), scores());
    assert_eq!(next.poll_effect(), Some(Effect::Look));
    next.handle(time(number), seen);
    next
}

#[test]
fn a_machine_that_was_stored_whole_looks_for_the_row_that_was_on_its_way() {
    let mut setter = seen(view(1100));
    sent(&mut setter);
    let stored = serde_json::to_string(&setter).unwrap();
    let mut setter: Setter = serde_json::from_str(&stored).unwrap();
    setter.resume(time(1110));
    setter.handle(time(1110), Input::Tick);
    assert_eq!(setter.poll_effect(), Some(Effect::Look));
    let mut landed = view(1110);
    landed.last_updates[1] = 1101;
    landed.row = ROW.to_vec();
    setter.handle(time(1110), Input::View(Box::new(landed)));
    assert_eq!(setter.stage(), &Stage::OnChain { row: ROW.to_vec(), block: 1101 });
}

#[test]
fn a_commit_of_an_earlier_life_is_followed_until_the_chain_shows_its_row() {
    let (setter, commit) = committed();
    let mut next = revived(&setter, 1200, later(1200, 7, &[], &[commit]));
    assert_eq!(next.stage(), &Stage::Committed { block: 1103, round: commit.round, reveal_block: 1360 });
    assert_eq!(next.poll_effect(), None, "it is not committed again");
    // Once more, after the reveal.
    let mut next = revived(&next, 1364, later(1364, 8, &ROW, &[]));
    assert_eq!(outcomes(&mut next), [RevealOutcome::Revealed]);
    assert!(next.awaited().is_empty());
    sent(&mut next);
    // Or after it was dropped.
    let mut next = revived(&setter, 1364, later(1364, 8, &[], &[]));
    assert_eq!(outcomes(&mut next), [RevealOutcome::Missed]);
}

#[test]
fn a_commit_that_landed_while_the_process_was_down_is_found_committed_or_opened() {
    let mut hidden = view(1100);
    hidden.hyperparameters.commit_reveal = true;
    let mut setter = seen(hidden);
    let (_, request) = sent(&mut setter);
    let How::Timelocked { round, .. } = request.how else { panic!("timelocked") };
    let commit = PendingCommit { epoch: 7, block: 1103, round };
    let mut next = revived(&setter, 1200, later(1200, 7, &[], &[commit]));
    assert_eq!(next.stage(), &Stage::Committed { block: 1103, round, reveal_block: 1360 });
    assert_eq!((next.awaited().len(), next.poll_effect()), (1, None), "it is not committed again");
    let mut next = revived(&setter, 1364, later(1364, 8, &ROW, &[]));
    assert!(std::iter::from_fn(|| next.poll_report()).any(|report| matches!(report, Report::OnChain { row, .. } if row == ROW)));
}

#[test]
fn a_row_that_may_still_lie_in_a_pool_is_given_time_before_it_is_sent_again() {
    let mut setter = seen(view(1100));
    let (attempt, _) = sent(&mut setter);
    let mut next = revived(&setter, 1101, Input::View(Box::new(view(1101))));
    assert!(matches!(next.stage(), Stage::Unsure { .. }), "{}", next.stage());
    assert_eq!(next.poll_effect(), None);
    // One restart after the other does not lengthen it.
    let mut next = revived(&next, 1107, Input::View(Box::new(view(1107))));
    assert_eq!((next.poll_effect(), next.deadline()), (None, Some(time(1107) + 1_000)));
    next.handle(time(1108), Input::View(Box::new(view(1108))));
    assert_eq!(sent(&mut next).0, attempt + 1);
}

#[test]
fn an_epoch_takes_one_commit_whoever_made_it() {
    let unknown = PendingCommit { epoch: 7, block: 1103, round: 5 };
    for is_final in [false, true] {
        let mut setter = Setter::new(SetterSettings { refresh_ms: Some(1), ..settings() });
        setter.handle(time(1300), Input::Scores { scores: vec![(account(0), 1)], is_final });
        setter.poll_effect();
        setter.handle(time(1300), later(1300, 7, &ROW, &[unknown]));
        assert_eq!(setter.poll_effect(), None);
        assert_eq!(setter.stage(), &Stage::NotDue { from_block: 1360 });
        assert!(!setter.is_final_set());
        // The next epoch takes the next one.
        setter.handle(time(1364), later(1364, 8, &ROW, &[]));
        assert_eq!(sent(&mut setter).1.row, [(0, 65535)]);
    }
}

#[test]
fn a_row_of_earlier_scores_that_lands_late_is_not_taken_for_the_final_one() {
    let mut setter = seen(view(1100));
    let (attempt, _) = sent(&mut setter);
    setter.handle(time(1101), Input::Scores { scores: vec![(account(0), 1)], is_final: true });
    let landed = Landed { block: block(1103), commit: None };
    setter.handle(time(1104), Input::Ended { attempt, outcome: Outcome::Landed(landed) });
    assert!(!setter.is_final_set());
    let mut after = view(1210);
    after.last_updates[1] = 1103;
    after.row = ROW.to_vec();
    setter.handle(time(1210), Input::View(Box::new(after)));
    setter.poll_effect();
    assert_eq!(sent(&mut setter).1.row, [(0, 65535)]);
}

/// What happens to a row that is on its way, and to the chain around it.
#[derive(Clone, Copy, Debug)]
enum Luck {
    Lands,
    LandsUnseen,
    Refused(bool),
    Lost,
    NotSent,
    Restart,
    LandsUnseenBeforeARestart,
}

proptest::proptest! {
    /// Whatever happens, no epoch gets two rows, and after all trouble the next row lands.
    #[test]
    fn no_epoch_gets_two_rows_and_trouble_ends(
        lucks in proptest::collection::vec((0u8..8, 1u64..80), 1..60),
        is_hidden in proptest::bool::ANY,
    ) {
        let mut setter = Setter::new(settings());
        let (mut number, mut row, mut last_update) = (1100u64, Vec::new(), 0u64);
        let mut commits: Vec<PendingCommit> = Vec::new();
        let mut rows_in_epoch = std::collections::BTreeMap::<u64, u32>::new();
        setter.handle(time(number), scores());
        let calm = std::iter::repeat_n((0, 40), 12);
        for (luck, blocks) in lucks.into_iter().chain(calm) {
            let luck = match luck {
                0 => Luck::Lands,
                1 => Luck::LandsUnseen,
                2 => Luck::Refused(true),
                3 => Luck::Refused(false),
                4 => Luck::Lost,
                5 => Luck::NotSent,
                6 => Luck::Restart,
                _ => Luck::LandsUnseenBeforeARestart,
            };
            number += blocks;
            setter.handle(time(number), Input::Tick);
            while let Some(effect) = setter.poll_effect() {
                let epoch = 7 + (number - EPOCH_START) / 360;
                match effect {
                    Effect::Look => {
                        let Input::View(mut now) = later(number, epoch, &row, &commits) else { unreachable!() };
                        now.hyperparameters.commit_reveal = is_hidden;
                        now.last_updates[1] = last_update;
                        setter.handle(time(number), Input::View(now));
                    }
                    Effect::Send { attempt, request } => {
                        number += 2;
                        let mut land = || {
                            let epoch = 7 + (number - EPOCH_START) / 360;
                            *rows_in_epoch.entry(epoch).or_default() += 1;
                            last_update = number;
                            match request.how {
                                How::Plain => {
                                    row = request.row.clone();
                                    None
                                }
                                How::Timelocked { round, .. } => {
                                    commits.push(PendingCommit { epoch, block: number, round });
                                    commits.last().copied()
                                }
                            }
                        };
                        let outcome = match luck {
                            Luck::Lands => {
                                let commit = land();
                                Outcome::Landed(Landed { block: block(number), commit })
                            }
                            Luck::LandsUnseen => {
                                land();
                                Outcome::Unknown { why: "unseen".to_owned() }
                            }
                            Luck::Refused(true) => Outcome::Refused(WeightsRefusal::Nonce),
                            Luck::Refused(false) => Outcome::Refused(WeightsRefusal::NoValidatorPermit),
                            Luck::Lost => Outcome::Unknown { why: "lost".to_owned() },
                            Luck::NotSent => Outcome::NotSent { why: "no route".to_owned() },
                            Luck::Restart | Luck::LandsUnseenBeforeARestart => {
                                if matches!(luck, Luck::LandsUnseenBeforeARestart) {
                                    land();
                                }
                                setter = next_life(&setter, number);
                                setter.handle(time(number), scores());
                                break;
                            }
                        };
                        setter.handle(time(number), Input::Ended { attempt, outcome });
                    }
                }
                // The chain opens what is due.
                let epoch = 7 + (number - EPOCH_START) / 360;
                commits.retain(|commit| {
                    let is_due = epoch > commit.epoch;
                    if is_due {
                        row = ROW.to_vec();
                    }
                    !is_due
                });
            }
        }
        proptest::prop_assert!(rows_in_epoch.values().all(|rows| *rows == 1), "{rows_in_epoch:?}");
        let epoch = 7 + (number - EPOCH_START) / 360;
        proptest::prop_assert!(rows_in_epoch.contains_key(&epoch) || rows_in_epoch.contains_key(&(epoch - 1)), "{rows_in_epoch:?}, now {epoch}");
    }
}
