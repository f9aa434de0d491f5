//! By a view of the chain: whether a row is due, what stands in its way, how it is sent, and when to look again.

use super::{AwaitedReveal, Obstacle, Setter, Stage};
use crate::epoch;
use crate::error::WeightsRefusal;
use crate::timelock::COMMIT_REVEAL_VERSION;
use crate::view::{How, WeightsRequest, WeightsView};
use crate::weights;

impl Setter {
    /// The next look comes when the block that is waited for should be there, counted from when the view came: deciding again
    /// by the same view does not put it off.
    pub(super) fn plan_look(&mut self, stage: &Stage) {
        let Some(view) = &self.view else { return };
        let (head, since_ms) = (view.block().number, self.view_ms);
        let until = |block: u64| since_ms.saturating_add(block.saturating_sub(head).saturating_mul(view.block_ms));
        let mut at = match stage {
            Stage::NotDue { from_block } | Stage::TooSoon { from_block } | Stage::RevealFirst { until_block: from_block } => {
                until(*from_block)
            }
            _ => since_ms,
        };
        for awaited in &self.awaited {
            at = at.min(until(awaited.look_block()));
        }
        self.look_at_ms = at.clamp(since_ms + self.settings.look_ms, since_ms + self.settings.look_max_ms);
    }

    /// The row by the newest view and how the subnet wants it, whether or not it is due or would be taken.
    pub fn proposal(&self, now_ms: u64) -> Result<WeightsRequest, Stage> {
        match &self.view {
            Some(view) => self.propose(now_ms, view),
            None => Err(Stage::Starting),
        }
    }

    fn propose(&self, now_ms: u64, view: &WeightsView) -> Result<WeightsRequest, Stage> {
        let blocked = |obstacle| Err(Stage::Blocked(obstacle));
        let Some(scores) = &self.scores else { return Err(Stage::NoScores) };
        let Some(own) = view.metagraph.by_hotkey(&self.settings.hotkey) else { return blocked(Obstacle::NotRegistered) };
        let parameters = &view.hyperparameters;
        if parameters.weights_version > self.settings.version_key {
            let (required, ours) = (parameters.weights_version, self.settings.version_key);
            return blocked(Obstacle::VersionTooOld { required, ours });
        }
        let head = view.block().number;
        if view.epoch.next_epoch_block(head).is_none() {
            return blocked(Obstacle::NoEpochs);
        }
        let row = weights::row(&scores.list, &view.metagraph, parameters, own.uid);
        let how = if parameters.commit_reveal {
            if view.commit_version != COMMIT_REVEAL_VERSION {
                return blocked(Obstacle::CommitVersion { required: view.commit_version, ours: COMMIT_REVEAL_VERSION });
            }
            let Ok(reveal) = view.epoch.reveal(head, view.reveal_period_epochs) else { return blocked(Obstacle::NoEpochs) };
            let apart_ms = now_ms.abs_diff(view.timestamp_ms);
            if apart_ms > self.settings.clock_skew_max_ms {
                return blocked(Obstacle::Clock { apart_ms, is_ahead: now_ms > view.timestamp_ms });
            }
            // By the chain's own time of the same block: our clock then cannot lead to a wrong round.
            let round = epoch::reveal_round(&reveal, head, view.timestamp_ms, view.block_ms, &view.beacon);
            How::Timelocked { round, commit_version: view.commit_version, beacon: view.beacon.clone() }
        } else {
            How::Plain
        };
        let (netuid, mechanism) = (self.settings.netuid, self.settings.mechanism);
        Ok(WeightsRequest { netuid, mechanism, row, version_key: self.settings.version_key, how })
    }

    /// The row to send now, or why none is sent.
    pub(super) fn judge(&self, now_ms: u64, view: &WeightsView) -> Result<WeightsRequest, Stage> {
        let blocked = |obstacle| Err(Stage::Blocked(obstacle));
        let request = self.propose(now_ms, view)?;
        // Both are there, or there were no request.
        let Some(scores) = &self.scores else { return Err(Stage::NoScores) };
        let Some(own) = view.metagraph.by_hotkey(&self.settings.hotkey) else { return blocked(Obstacle::NotRegistered) };
        let (parameters, head) = (&view.hyperparameters, view.block().number);
        let last_update = view.last_update(own).max(self.last_row.as_ref().map_or(0, |last| last.block));
        let is_due = self.is_due(now_ms, view, &request.row, last_update, scores.is_final);
        let from_block = last_update + parameters.weights_rate_limit;
        // A committed row that is opened after this one was set would replace it.
        let opens_soon = |awaited: &&AwaitedReveal| awaited.target_epoch == view.epoch.index && head < awaited.patience_block();
        if let Some(awaited) = self.awaited.iter().find(opens_soon).filter(|_| request.how == How::Plain) {
            return Err(Stage::RevealFirst { until_block: awaited.patience_block() });
        }
        match view.check(&self.settings.hotkey, &request) {
            // The view may be older than our own read-back.
            Ok(()) if last_update > 0 && head < from_block && is_due => Err(Stage::TooSoon { from_block }),
            Err(WeightsRefusal::TooFast) if is_due => Err(Stage::TooSoon { from_block }),
            Err(WeightsRefusal::StakeTooLow) => blocked(Obstacle::StakeTooLow { stake: own.stake, threshold: parameters.stake_threshold }),
            Err(WeightsRefusal::NoValidatorPermit) => blocked(Obstacle::NoPermit),
            Err(WeightsRefusal::MechanismMissing) => {
                blocked(Obstacle::NoMechanism { mechanism: self.settings.mechanism, count: view.mechanisms })
            }
            Ok(()) | Err(WeightsRefusal::TooFast) if !is_due => {
                Err(Stage::NotDue { from_block: view.epoch.next_epoch_block(head).unwrap_or(head) })
            }
            Ok(()) => Ok(request),
            Err(reason) => blocked(Obstacle::Rule(reason)),
        }
    }

    /// Whether the chain shows the row of the final scores already, as after a restart.
    pub(super) fn is_final_shown(&self) -> bool {
        let (Some(view), Some(scores)) = (&self.view, self.scores.as_ref().filter(|scores| scores.is_final)) else { return false };
        let own = view.metagraph.by_hotkey(&self.settings.hotkey);
        self.awaited.is_empty()
            && own.is_some_and(|own| weights::row(&scores.list, &view.metagraph, &view.hyperparameters, own.uid) == view.row)
    }

    /// A row is due when this epoch has none, or when it is the final one and differs, or when it is too old. An epoch takes one commit,
    /// whoever made it: both would be opened at once, and only one of them counts.
    fn is_due(&self, now_ms: u64, view: &WeightsView, row: &[(u16, u16)], last_update: u64, is_final: bool) -> bool {
        if view.hyperparameters.commit_reveal && view.commits.iter().any(|commit| commit.epoch == view.epoch.index) {
            return false;
        }
        if last_update == 0 || last_update < view.epoch.last_epoch_block {
            return true;
        }
        let last_row = self.last_row.as_ref();
        if is_final && !self.is_final_set {
            // After a restart the final row may be there already.
            let sent = last_row.map_or(view.row.as_slice(), |last| &last.row);
            if sent != row {
                return true;
            }
        }
        self.settings.refresh_ms.is_some_and(|refresh_ms| last_row.is_some_and(|last| last.set_ms + refresh_ms <= now_ms))
    }
}
