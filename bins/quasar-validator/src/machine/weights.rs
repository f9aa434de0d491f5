//! Weights. When a row is due, how the subnet wants it, what stands in the way and what became of it is decided by the chain's setter
//! ([`chain::setter`]), a machine of its own. This part hands it the scores, remembers what each row was made from, and says what
//! people should hear.

use std::collections::VecDeque;

use chain::Metagraph;
use chain::setter::{self, Report, RevealOutcome, Setter, SetterSettings, Stage};
use protocol::AccountId;
use protocol::documents::Score;
use protocol::envelope::RunId;
use serde::{Deserialize, Serialize};

use super::Effect;

/// The newest weights version that this build knows; a subnet that demands a newer one wants a newer build.
pub const WEIGHTS_VERSION: u64 = 1;
/// Rows that are remembered with what they were made from: those under way, and those that wait to be opened.
const MADE_MAX: usize = 16;

/// What the operator chooses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WeightSettings {
    pub netuid: u16,
    pub mechanism: u8,
    /// Weights are set again within an epoch when they are older than this and the rate limit allows it.
    pub refresh_ms: u64,
    /// First and longest pause after a refusal or a lost row.
    pub retry_base_ms: u64,
    pub retry_max_ms: u64,
    /// Longest time without a look at the chain.
    pub look_max_ms: u64,
    /// Nothing is sent.
    pub is_dry_run: bool,
}

/// Scores, and how many cycles' merges are in them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScoreList {
    pub scores: Vec<(AccountId, u64)>,
    pub cycles: u64,
    /// Nothing will be added: the run is complete.
    pub is_final: bool,
}

/// How weights stand, for health pages and the state folder. Later ones have higher revisions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standing {
    pub revision: u64,
    pub stage: Stage,
    pub from: ScoreList,
}

/// A row and what it was made from.
pub type Made = (Vec<(u16, u16)>, ScoreList);

/// What the journal keeps for the next life: rows that are under way or committed, and what they were made from. Later ones have
/// higher revisions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WeightsMemory {
    #[serde(skip)]
    pub revision: u64,
    pub run: RunId,
    pub setter: setter::Memory,
    /// Rows of this run, oldest first.
    pub made: VecDeque<Made>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Weights {
    setter: Setter,
    run: RunId,
    /// The newest scores; `None` before the first.
    from: Option<ScoreList>,
    /// Rows and what they were made from, oldest first.
    made: VecDeque<Made>,
    /// What the journal has of the setter.
    kept: setter::Memory,
    revision: u64,
}

impl Weights {
    /// For `own`; something that is awaited is looked for every `look_ms`.
    pub fn new(own: AccountId, run: RunId, settings: WeightSettings, look_ms: u64) -> Self {
        let setter = Setter::new(SetterSettings {
            mechanism: settings.mechanism,
            look_ms,
            look_max_ms: settings.look_max_ms.max(look_ms),
            retry_base_ms: settings.retry_base_ms,
            retry_max_ms: settings.retry_max_ms,
            refresh_ms: Some(settings.refresh_ms),
            is_dry_run: settings.is_dry_run,
            ..SetterSettings::new(settings.netuid, own, WEIGHTS_VERSION)
        });
        Self { setter, run, from: None, made: VecDeque::new(), kept: setter::Memory::default(), revision: 0 }
    }

    /// Goes on with what an earlier life has left, of this run or of one before it; to be called before anything else.
    pub fn recall(&mut self, now_ms: u64, memory: WeightsMemory) {
        if memory.run == self.run {
            self.made = memory.made;
        }
        self.kept = memory.setter.clone();
        self.setter.recall(now_ms, memory.setter);
        for awaited in self.setter.awaited() {
            let (committed_in, opened_from_block) = (awaited.commit.block, awaited.reveal_block);
            tracing::info!(
                committed_in,
                opened_from_block,
                "weights that were committed before the restart are followed until they are opened"
            );
        }
    }

    /// Rows are made from these scores from now on. Before the first ones the chain is not even looked at.
    pub fn score(&mut self, now_ms: u64, from: ScoreList, effects: &mut VecDeque<Effect>) {
        if self.from.as_ref() != Some(&from) {
            let ScoreList { scores, is_final, .. } = from.clone();
            self.from = Some(from);
            self.handle(now_ms, setter::Input::Scores { scores, is_final }, effects);
            self.show(effects);
        }
    }

    /// A fact about the chain or a row under way, or just that time has passed.
    pub fn handle(&mut self, now_ms: u64, input: setter::Input, effects: &mut VecDeque<Effect>) {
        if self.from.is_none() {
            return;
        }
        self.setter.handle(now_ms, input);
        // What has become of rows comes before the next one is sent.
        while let Some(report) = self.setter.poll_report() {
            self.tell(report, effects);
        }
        while let Some(effect) = self.setter.poll_effect() {
            if let (setter::Effect::Send { request, .. }, Some(from)) = (&effect, &self.from) {
                // A row that is neither committed nor under way will never be seen.
                let awaited = self.setter.awaited();
                self.made.retain(|(row, _)| awaited.iter().any(|awaited| awaited.row == *row));
                self.made.push_back((chain::weights::as_stored(&request.row), from.clone()));
                if self.made.len() > MADE_MAX {
                    self.made.pop_front();
                }
                let memory = self.memory();
                effects.push_back(Effect::SendWeights { send: effect, memory: Box::new(memory) });
            } else {
                effects.push_back(Effect::Weights(effect));
            }
        }
        if self.setter.memory() != self.kept {
            let memory = self.memory();
            effects.push_back(Effect::KeepWeights(Box::new(memory)));
        }
    }

    /// What is to be kept from now on.
    fn memory(&mut self) -> WeightsMemory {
        self.revision += 1;
        self.kept = self.setter.memory();
        WeightsMemory { revision: self.revision, run: self.run, setter: self.kept.clone(), made: self.made.clone() }
    }

    pub fn deadline(&self) -> Option<u64> {
        self.from.as_ref().and(self.setter.deadline())
    }

    /// Whether the chain shows the row of the final scores.
    pub fn is_final_set(&self) -> bool {
        self.setter.is_final_set()
    }

    fn tell(&mut self, report: Report, effects: &mut VecDeque<Effect>) {
        match report {
            Report::Stage(stage) => {
                match &stage {
                    // Told with more by the reports that follow.
                    Stage::OnChain { .. } | Stage::Committed { .. } => {}
                    stage if stage.needs_a_person() => tracing::warn!(hint = stage.hint(), "{stage}"),
                    stage => tracing::info!(next = stage.hint(), "{stage}"),
                }
                self.show(effects);
            }
            Report::OnChain { row, block, .. } => {
                let Some(view) = self.setter.view() else { return };
                let own = view.metagraph.by_hotkey(self.setter.hotkey());
                if own.is_some_and(|own| row == [(own.uid, u16::MAX)]) {
                    let hint = "look at verdicts and merges if miners are at work";
                    tracing::warn!(block, hint, "no work was accepted: the whole weight is on this validator itself");
                }
                tracing::info!(block, weights = spelled(&row, &view.metagraph), "weights are on the chain");
                // A row of an earlier run is not known with its scores; it counts all the same.
                if let Some(place) = self.made.iter().position(|(made, _)| *made == row) {
                    let from = self.made[place].1.clone();
                    self.made.drain(..=place);
                    let scores = named_scores(&from.scores, &row, &view.metagraph);
                    effects.push_back(Effect::PublishScores { epoch: from.cycles, block, scores });
                }
            }
            Report::Committed(awaited) => {
                tracing::info!(
                    block = awaited.commit.block,
                    round = awaited.commit.round,
                    opened_from_block = awaited.reveal_block,
                    "weights are committed"
                );
            }
            Report::Reveal { awaited, outcome } => match outcome {
                RevealOutcome::Revealed => {
                    tracing::info!(committed_in = awaited.commit.block, "the chain has opened the committed weights")
                }
                RevealOutcome::Missed => tracing::error!(
                    committed_in = awaited.commit.block,
                    round = awaited.commit.round,
                    hint = "permit, stake and registration are checked again when a row is opened; another process may use the same hotkey",
                    "the chain has not opened the committed weights, or has dropped them"
                ),
                RevealOutcome::Unseen => tracing::warn!(
                    committed_in = awaited.commit.block,
                    "whether the committed weights were opened was not seen; the chain shows a later row by now"
                ),
            },
        }
    }

    fn show(&mut self, effects: &mut VecDeque<Effect>) {
        self.revision += 1;
        let (stage, from) = (self.setter.stage().clone(), self.from.clone().unwrap_or_default());
        effects.push_back(Effect::ShowWeights(Box::new(Standing { revision: self.revision, stage, from })));
    }
}

/// A row with the hotkeys that its uids stand for.
fn spelled(row: &[(u16, u16)], metagraph: &Metagraph) -> String {
    let name = |uid: u16| metagraph.by_uid(uid).map_or_else(|| uid.to_string(), |neuron| neuron.hotkey.to_string());
    row.iter().map(|(uid, value)| format!("{}={value}", name(*uid))).collect::<Vec<_>>().join(" ")
}

/// The row with the hotkeys that it stands for, and their scores.
fn named_scores(scores: &[(AccountId, u64)], row: &[(u16, u16)], metagraph: &Metagraph) -> Vec<Score> {
    let named = |(uid, weight): &(u16, u16)| {
        let hotkey = metagraph.by_uid(*uid)?.hotkey;
        let tokens = scores.iter().find(|(account, _)| *account == hotkey).map_or(0, |(_, tokens)| *tokens);
        Some(Score { hotkey, tokens, weight: *weight })
    };
    row.iter().filter_map(named).collect()
}

#[cfg(test)]
mod tests {
    use chain::setter::{Input, Obstacle, Outcome};
    use chain::{Landed, PendingCommit, WeightsRefusal};

    use super::*;
    use crate::machine::fixture::{account, view};

    const OWN: u8 = 9;

    fn settings() -> WeightSettings {
        WeightSettings {
            netuid: 24,
            mechanism: 0,
            refresh_ms: 1_000_000_000,
            retry_base_ms: 100,
            retry_max_ms: 1_000,
            look_max_ms: 60_000,
            is_dry_run: false,
        }
    }

    /// Machine and what it wants.
    struct Desk {
        weights: Weights,
        effects: VecDeque<Effect>,
    }

    impl Desk {
        fn new(settings: WeightSettings) -> Self {
            Self { weights: Weights::new(account(OWN), RunId([1; 16]), settings, 1_000), effects: VecDeque::new() }
        }

        fn score(&mut self, now_ms: u64, scores: &[(u8, u64)], cycles: u64) {
            let scores = scores.iter().map(|(hotkey, score)| (account(*hotkey), *score)).collect();
            self.weights.score(now_ms, ScoreList { scores, cycles, is_final: false }, &mut self.effects);
        }

        fn give(&mut self, now_ms: u64, input: Input) {
            self.weights.handle(now_ms, input, &mut self.effects);
        }

        fn take<T>(&mut self, what: impl Fn(&Effect) -> Option<T>) -> Option<T> {
            let found = self.effects.iter().position(|effect| what(effect).is_some())?;
            what(&self.effects.remove(found)?)
        }

        fn sent(&mut self) -> (u64, Vec<(u16, u16)>) {
            let sent = |effect: &Effect| match effect {
                Effect::SendWeights { send: setter::Effect::Send { attempt, request }, .. } => Some((*attempt, request.row.clone())),
                _ => None,
            };
            self.take(sent).expect("a row is sent")
        }

        fn published(&mut self) -> Option<(u64, u64, Vec<Score>)> {
            self.take(|effect| match effect {
                Effect::PublishScores { epoch, block, scores } => Some((*epoch, *block, scores.clone())),
                _ => None,
            })
        }

        fn shown(&mut self) -> Option<Stage> {
            let mut last = None;
            while let Some(standing) = self.take(|effect| match effect {
                Effect::ShowWeights(standing) => Some(standing.clone()),
                _ => None,
            }) {
                last = Some(standing.stage);
            }
            last
        }
    }

    fn landed(block: u64, commit: Option<PendingCommit>) -> Outcome {
        Outcome::Landed(Landed { block: chain::BlockRef { number: block, hash: [1; 32] }, commit })
    }

    #[test]
    fn nothing_is_asked_of_the_chain_before_there_are_scores() {
        let mut desk = Desk::new(settings());
        desk.give(0, Input::Tick);
        assert!(desk.effects.is_empty() && desk.weights.deadline().is_none());
        desk.score(0, &[], 0);
        assert!(desk.effects.contains(&Effect::Weights(setter::Effect::Look)));
    }

    #[test]
    fn a_row_that_was_read_back_is_published_with_the_scores_that_it_was_made_from() {
        let mut desk = Desk::new(settings());
        desk.score(0, &[(1, 10), (2, 20)], 3);
        desk.give(0, Input::View(Box::new(view(100, &[1, 2, OWN]))));
        let (attempt, row) = desk.sent();
        assert_eq!(row, [(0, 32768), (1, 65535)]);
        // Scores go on while the row is under way.
        desk.score(1, &[(1, 99), (2, 20)], 4);
        assert_eq!(desk.published(), None, "sent is not set");
        desk.give(2, Input::Ended { attempt, outcome: landed(101, None) });
        let scores = vec![Score { hotkey: account(1), tokens: 10, weight: 32768 }, Score { hotkey: account(2), tokens: 20, weight: 65535 }];
        assert_eq!(desk.published(), Some((3, 101, scores)));
        assert!(matches!(desk.shown(), Some(Stage::OnChain { block: 101, .. })));
    }

    #[test]
    fn without_accepted_work_the_whole_weight_is_set_on_the_validator_itself() {
        for scores in [&[][..], &[(1, 0)], &[(77, 5)]] {
            let mut desk = Desk::new(settings());
            desk.score(0, scores, 0);
            let mut alone = view(100, &[1, 2, OWN]);
            // It needs no permit for that.
            alone.metagraph.neurons[2].validator_permit = false;
            desk.give(0, Input::View(Box::new(alone)));
            assert_eq!(desk.sent().1, [(2, u16::MAX)]);
        }
    }

    #[test]
    fn where_commit_reveal_is_on_the_row_is_committed_and_published_when_the_chain_has_opened_it() {
        let mut desk = Desk::new(settings());
        let mut hidden = view(100, &[1, OWN]);
        hidden.hyperparameters.commit_reveal = true;
        desk.score(hidden.timestamp_ms, &[(1, 10)], 7);
        desk.give(hidden.timestamp_ms, Input::View(Box::new(hidden.clone())));
        let (attempt, row) = desk.sent();
        let commit = PendingCommit { epoch: hidden.epoch.index, block: 102, round: 5 };
        desk.give(hidden.timestamp_ms + 1, Input::Ended { attempt, outcome: landed(102, Some(commit)) });
        assert_eq!(desk.published(), None);
        assert!(matches!(desk.shown(), Some(Stage::Committed { block: 102, .. })));
        let mut opened = view(200, &[1, OWN]);
        opened.hyperparameters.commit_reveal = true;
        opened.epoch.index = hidden.epoch.index + 1;
        opened.row = row;
        opened.last_updates[1] = 102;
        desk.give(opened.timestamp_ms, Input::View(Box::new(opened)));
        assert_eq!(desk.published().map(|(epoch, block, _)| (epoch, block)), Some((7, 200)));
    }

    #[test]
    fn what_a_row_under_way_was_made_from_is_durable_before_it_is_sent_and_known_to_the_next_life() {
        let mut hidden = view(100, &[1, OWN]);
        hidden.hyperparameters.commit_reveal = true;
        let mut desk = Desk::new(settings());
        desk.score(hidden.timestamp_ms, &[(1, 10)], 7);
        desk.give(hidden.timestamp_ms, Input::View(Box::new(hidden.clone())));
        let (row, round, memory) = desk
            .take(|effect| match effect {
                Effect::SendWeights { send: setter::Effect::Send { request, .. }, memory } => match &request.how {
                    chain::How::Timelocked { round, .. } => Some((request.row.clone(), *round, memory.clone())),
                    chain::How::Plain => None,
                },
                _ => None,
            })
            .expect("a row is committed");
        // The process ends before it hears of the commit, and the next life has other scores.
        let stored = serde_json::to_vec(&memory).unwrap();
        let mut desk = Desk::new(settings());
        desk.weights.recall(hidden.timestamp_ms, serde_json::from_slice(&stored).unwrap());
        desk.score(hidden.timestamp_ms, &[(1, 99)], 8);
        let commit = PendingCommit { epoch: hidden.epoch.index, block: 102, round };
        let mut landed = hidden.clone();
        (landed.metagraph.block.number, landed.last_updates[1], landed.commits) = (105, 102, vec![commit]);
        desk.give(hidden.timestamp_ms + 1, Input::View(Box::new(landed)));
        assert!(matches!(desk.shown(), Some(Stage::Committed { block: 102, .. })));
        let keeps = |effect: &Effect| matches!(effect, Effect::KeepWeights(_)).then_some(());
        assert_eq!(desk.take(keeps), Some(()), "the commit is to be followed by a third life too");
        let mut opened = view(200, &[1, OWN]);
        opened.hyperparameters.commit_reveal = true;
        opened.epoch.index = hidden.epoch.index + 1;
        (opened.row, opened.last_updates[1]) = (row, 102);
        desk.give(opened.timestamp_ms, Input::View(Box::new(opened)));
        let (epoch, _, scores) = desk.published().expect("the row counts");
        assert_eq!((epoch, scores[0].tokens), (7, 10), "by the scores that it was made from");
    }

    #[test]
    fn what_stands_in_the_way_is_shown_with_its_remedy() {
        let mut desk = Desk::new(settings());
        desk.score(0, &[(1, 10)], 1);
        let mut powerless = view(100, &[1, OWN]);
        powerless.metagraph.neurons[1].validator_permit = false;
        desk.give(0, Input::View(Box::new(powerless)));
        let stage = desk.shown().unwrap();
        assert_eq!(stage, Stage::Blocked(Obstacle::NoPermit));
        assert!(stage.needs_a_person() && stage.hint().contains("stake"));
        desk.give(60_000, Input::View(Box::new(view(105, &[1, OWN]))));
        let (attempt, _) = desk.sent();
        desk.give(60_001, Input::Ended { attempt, outcome: Outcome::Refused(WeightsRefusal::TooFast) });
        let stage = desk.shown().unwrap();
        assert!(stage.to_string().contains("rate limit") && !stage.needs_a_person(), "{stage}");
    }

    #[test]
    fn a_dry_run_shows_the_row_and_sends_nothing() {
        let mut desk = Desk::new(WeightSettings { is_dry_run: true, ..settings() });
        desk.score(0, &[(1, 10)], 1);
        desk.give(0, Input::View(Box::new(view(100, &[1, OWN]))));
        assert!(matches!(desk.shown(), Some(Stage::DryRun { request }) if request.row == [(0, 65535)]));
        assert!(!desk.effects.iter().any(|effect| matches!(effect, Effect::SendWeights { .. })));
    }
}
