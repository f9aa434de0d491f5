//! The chain's side: what is read of it, and weights with their read-back.

use std::sync::Arc;

use chain::{ChainError, ChainLink, Hotkey, Metagraph, SetWeightsError, weights};
use daemon::Journal;
use protocol::AccountId;
use protocol::documents::Score;
use protocol::envelope::RunId;

use super::trouble::Trouble;
use super::verdicts::blocking;
use crate::machine::ChainView;
use crate::machine::weights::{Due, OwnNeuron, WeightsOutcome};

/// The newest weights version that this build knows; a subnet that demands a newer one wants a newer build.
pub const WEIGHTS_VERSION: u64 = 1;

/// What one validator reads from and writes to the chain.
pub struct ChainDesk {
    pub link: Arc<ChainLink>,
    pub hotkey: Arc<Hotkey>,
    pub netuid: u16,
    pub run: RunId,
    pub journal: Arc<Journal>,
    pub is_dry_run: bool,
}

impl ChainDesk {
    pub async fn block(&self) -> Result<u64, ChainError> {
        Ok(self.link.client().await?.head().await?.number)
    }

    pub async fn view(&self) -> Result<ChainView, ChainError> {
        let client = self.link.client().await?;
        let (metagraph, hyperparameters) = (client.metagraph(self.netuid).await?, client.hyperparameters(self.netuid).await?);
        let own = metagraph.by_hotkey(&self.hotkey.account()).map(|neuron| OwnNeuron {
            uid: neuron.uid,
            validator_permit: neuron.validator_permit,
            last_update: neuron.last_update,
            tempo: u64::from(hyperparameters.tempo),
            rate_limit: hyperparameters.weights_rate_limit,
        });
        let validators = metagraph.neurons.iter().filter(|neuron| neuron.validator_permit).map(|neuron| neuron.hotkey).collect();
        Ok(ChainView { block: metagraph.block.number, validators, own })
    }

    /// Hash of a finalized block. Once seen it is kept, because nodes forget and restarts ask again.
    pub async fn beacon(&self, block: u64) -> Result<Option<[u8; 32]>, Trouble> {
        let name = format!("beacon/{}/{block}", self.run);
        let (journal, key) = (self.journal.clone(), name.clone());
        if let Some(Ok(hash)) = blocking(move || journal.get(&key)).await?.map(<[u8; 32]>::try_from) {
            return Ok(Some(hash));
        }
        let hash = self.link.client().await?.block_hash(block).await?;
        if let Some(hash) = hash {
            let journal = self.journal.clone();
            blocking(move || journal.put(&name, &hash)).await?;
        }
        Ok(hash)
    }

    /// Sets weights and reads them back.
    pub async fn set_weights(&self, scores: &[(AccountId, u64)], due: Due) -> WeightsOutcome {
        match self.try_set_weights(scores, due).await {
            Ok(outcome) => outcome,
            // The text of a refusal ends with its remedy.
            Err(error) => WeightsOutcome::Refused { why: error.to_string().replace('\n', "; ") },
        }
    }

    async fn try_set_weights(&self, scores: &[(AccountId, u64)], due: Due) -> Result<WeightsOutcome, SetWeightsError> {
        let client = self.link.client().await?;
        let (metagraph, hyperparameters) = (client.metagraph(self.netuid).await?, client.hyperparameters(self.netuid).await?);
        let hotkey = self.hotkey.account();
        let own = metagraph.by_hotkey(&hotkey).ok_or(ChainError::NotRegistered { hotkey, netuid: self.netuid })?;
        let row = weights::row(scores, &metagraph, &hyperparameters, own.uid);
        let named: Vec<String> = row
            .iter()
            .map(|(uid, value)| {
                let account = metagraph.by_uid(*uid).map_or_else(|| uid.to_string(), |neuron| neuron.hotkey.to_string());
                format!("{account}={value}")
            })
            .collect();
        let named = named.join(" ");
        if self.is_dry_run {
            tracing::info!(?due, weights = named, "weights (dry run: nothing is sent)");
            return Ok(WeightsOutcome::DryRun);
        }
        // After a restart the final row may be there already.
        if due == Due::Final && client.weights(self.netuid, own.uid).await? == row {
            tracing::info!(weights = named, "the final weights are on the chain already");
            return Ok(WeightsOutcome::Set { block: own.last_update, weights: named_scores(scores, &row, &metagraph) });
        }
        let block = client.set_weights(&self.hotkey, self.netuid, &row, WEIGHTS_VERSION).await?;
        if client.weights(self.netuid, own.uid).await? != row {
            return Err(SetWeightsError::ReadBackDiffers { block });
        }
        tracing::info!(?due, %block, weights = named, "weights are on the chain");
        Ok(WeightsOutcome::Set { block: block.number, weights: named_scores(scores, &row, &metagraph) })
    }
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
