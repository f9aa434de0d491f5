//! The chain's side: what is read of it, rows that are sent, and how weights stand, for people and for the next command.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use chain::{ChainError, ChainLink, Hotkey, STATE_BLOCKS, setter};
use daemon::driver::Inputs;
use daemon::health::Component;
use daemon::{Journal, JournalError, clock, files};
use protocol::documents::AuditDraw;
use protocol::envelope::{Document, RunId};
use protocol::{AccountId, Digest, codec};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::trouble::Trouble;
use super::verdicts::blocking;
use crate::machine::weights::{Standing, WeightsMemory};
use crate::machine::{ChainView, Input, OwnNeuron};

/// Steps of a sent row that wait to be told; there are four, and two more for each fork.
const PROGRESS_MAX: usize = 32;
/// Where the daemon leaves how weights stand, in its state folder.
pub const WEIGHTS_FILE: &str = "weights.json";

/// How weights stand, as the file says it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WeightsFile {
    pub updated_ms: u64,
    pub hotkey: String,
    pub netuid: u16,
    pub mechanism: u8,
    pub run: String,
    pub stage: String,
    pub next: String,
    pub needs_a_person: bool,
    /// Merged tokens of each hotkey that no verdict failed, and how many cycles they are from.
    pub scores: Vec<ScoreLine>,
    pub cycles: u64,
    pub is_final: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScoreLine {
    pub hotkey: String,
    pub tokens: u64,
}

/// What one validator reads from and writes to the chain.
pub struct ChainDesk {
    pub link: Arc<ChainLink>,
    pub hotkey: Arc<Hotkey>,
    pub netuid: u16,
    pub mechanism: u8,
    pub run: RunId,
    pub journal: Arc<Journal>,
    pub health: Component,
    /// Where [`WEIGHTS_FILE`] lies.
    pub file: PathBuf,
    /// Revision of what was shown last.
    pub shown: Mutex<u64>,
    /// Revision of what the journal keeps.
    pub kept: Arc<Mutex<u64>>,
    pub genesis: [u8; 32],
}

/// Where the journal keeps the rows under way. Another network, subnet, mechanism or hotkey has others.
fn memory_key(genesis: &[u8; 32], (netuid, mechanism): (u16, u8), hotkey: &AccountId) -> String {
    format!("weights/{}/{netuid}/{mechanism}/{hotkey}", Digest(*genesis))
}

/// The rows that an earlier life had under way, if there are any.
///
/// # Errors
/// The journal cannot be read.
pub fn recall(journal: &Journal, genesis: &[u8; 32], place: (u16, u8), hotkey: &AccountId) -> Result<Option<WeightsMemory>, JournalError> {
    let Some(bytes) = journal.get(&memory_key(genesis, place, hotkey))? else { return Ok(None) };
    let memory = serde_json::from_slice(&bytes);
    // The chain's own rules still keep an epoch from having two rows.
    Ok(memory.inspect_err(|error| tracing::warn!(%error, "rows that an earlier version had under way are not followed")).ok())
}

impl ChainDesk {
    pub async fn block(&self) -> Result<u64, ChainError> {
        Ok(self.link.client().await?.head().await?.number)
    }

    pub async fn view(&self) -> Result<ChainView, ChainError> {
        let metagraph = self.link.client().await?.metagraph(self.netuid).await?;
        let own = metagraph
            .by_hotkey(&self.hotkey.account())
            .map(|neuron| OwnNeuron { uid: neuron.uid, validator_permit: neuron.validator_permit });
        Ok(ChainView { block: metagraph.block.number, own })
    }

    /// Hash of a finalized block, and who could audit then; `None` where nodes have forgotten that. Once seen both are kept: nodes forget,
    /// restarts ask again, and nobody is to be believed about what was seen.
    ///
    /// # Errors
    /// The chain does not answer, or the block is not final there.
    pub async fn beacon(&self, block: u64) -> Result<(Option<Digest>, Option<Vec<AccountId>>), Trouble> {
        let name = format!("beacon/{}/{block}", self.run);
        let (journal, key) = (self.journal.clone(), name.clone());
        let kept = blocking(move || journal.get(&key)).await?.and_then(|bytes| codec::decode(&bytes, AuditDraw::PURPOSE.limit()).ok());
        let kept: Option<Digest> = match kept {
            Some((hash, Some(validators))) => return Ok((Some(hash), Some(validators))),
            kept => kept.map(|(hash, _)| hash),
        };
        let client = self.link.client().await?;
        let is_old = block + STATE_BLOCKS < client.head().await?.number;
        let hash = match kept {
            Some(hash) => hash,
            None => match client.block_hash(block).await? {
                Some(hash) => Digest(hash),
                None if is_old => return Ok((None, None)),
                None => return Err(ChainError::NotYetFinal { number: block }.into()),
            },
        };
        // Not yet forgotten: an endpoint that lags behind the others says the same of a block that it has not seen.
        let validators = if is_old { None } else { Some(client.metagraph_at(self.netuid, block).await?.validators()) };
        if kept.is_none() || validators.is_some() {
            let (journal, bytes) = (self.journal.clone(), codec::encode(&(hash, validators.clone())));
            blocking(move || journal.put(&name, &bytes)).await?;
        }
        Ok((Some(hash), validators))
    }

    /// Sends a row when the next life is sure to know of it.
    pub async fn send(&self, send: setter::Effect, memory: WeightsMemory, inputs: &Inputs<Input>) -> setter::Input {
        match self.write_down(memory).await {
            Ok(()) => self.weights(send, inputs).await,
            Err(trouble) => send.unreachable(format!("the journal cannot be written: {}", trouble.line())),
        }
    }

    /// Keeps what has become of rows under way.
    pub async fn keep(&self, memory: WeightsMemory) {
        if let Err(trouble) = self.write_down(memory).await {
            tracing::warn!(error = trouble.line(), "what became of weights cannot be written down; it is found out again after a restart");
        }
    }

    async fn write_down(&self, memory: WeightsMemory) -> Result<(), Trouble> {
        let name = memory_key(&self.genesis, (self.netuid, self.mechanism), &self.hotkey.account());
        let (journal, kept) = (self.journal.clone(), self.kept.clone());
        blocking(move || {
            let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
            if memory.revision > *kept {
                // Numbers, lists and texts: this encoding cannot fail.
                journal.put(&name, &serde_json::to_vec(&memory).unwrap_or_default())?;
                *kept = memory.revision;
            }
            Ok(())
        })
        .await
    }

    /// Does what the setter asks for; the machine hears of every step of a row that is sent.
    pub async fn weights(&self, effect: setter::Effect, inputs: &Inputs<Input>) -> setter::Input {
        let client = match self.link.client().await {
            Ok(client) => client,
            Err(error) => return effect.unreachable(error.to_string().replace('\n', "; ")),
        };
        let (tell, mut told) = mpsc::channel(PROGRESS_MAX);
        let doing = async move {
            let place = (self.netuid, self.mechanism);
            setter::execute(client.as_ref(), &self.hotkey, &effect, place, &tell).await
        };
        let forwarding = async {
            while let Some(step) = told.recv().await {
                inputs.send(Input::Weights(step)).await;
            }
        };
        tokio::join!(doing, forwarding).0
    }

    /// Shows how weights stand, on the health page and in the state folder.
    pub fn show(&self, standing: Standing) {
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        if standing.revision <= *shown {
            return;
        }
        *shown = standing.revision;
        let Standing { stage, from, .. } = standing;
        let needs_a_person = stage.needs_a_person();
        if needs_a_person {
            self.health.not_ready(format!("{stage}; {}", stage.hint()));
        } else {
            self.health.ready();
        }
        let file = WeightsFile {
            updated_ms: clock::now_ms(),
            hotkey: self.hotkey.account().to_string(),
            netuid: self.netuid,
            mechanism: self.mechanism,
            run: self.run.to_string(),
            stage: stage.to_string(),
            next: stage.hint().to_owned(),
            needs_a_person,
            scores: from.scores.iter().map(|(hotkey, tokens)| ScoreLine { hotkey: hotkey.to_string(), tokens: *tokens }).collect(),
            cycles: from.cycles,
            is_final: from.is_final,
        };
        // It is a few kilobytes, and its loss does no harm.
        let written = serde_json::to_vec_pretty(&file).map_err(Into::into).and_then(|text| files::write_whole(&self.file, &[&text]));
        if let Err(error) = written {
            tracing::warn!(file = %self.file.display(), %error, "how weights stand cannot be written down");
        }
    }
}
