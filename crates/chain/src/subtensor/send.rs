//! Sending a row of weights, in the open or timelocked, and reading it back from the finalized block that contains it.

use parity_scale_codec::Encode as _;
use subxt::dynamic::{self, Value};
use subxt::tx::Payload;
use subxt::utils::H256;

use super::SubtensorClient;
use super::read::{self, AtBlock, SUBTENSOR};
use super::submit::Failure;
use crate::error::{ChainError, SetWeightsError, WeightsRefusal};
use crate::hotkey::Hotkey;
use crate::timelock::{self, COMMIT_REVEAL_VERSION, WeightsPayload};
use crate::types::BlockRef;
use crate::view::{How, Landed, PendingCommit, Progress, WeightsRequest, mechanism_index};
use crate::weights;

type Telling<'a> = &'a (dyn Fn(Progress) + Send + Sync);

impl SubtensorClient {
    pub(super) async fn send(&self, hotkey: &Hotkey, request: &WeightsRequest, progress: Telling<'_>) -> Result<Landed, SetWeightsError> {
        let refuse = |reason| Err(SetWeightsError::Refused(reason));
        if request.row.iter().all(|(_, value)| *value == 0) {
            return refuse(WeightsRefusal::EmptyRow);
        }
        let Some(index) = mechanism_index(request.netuid, request.mechanism) else { return refuse(WeightsRefusal::MechanismMissing) };
        let _turn = self.writing.lock().await;
        let account = hotkey.account();
        let (uid, before) = self
            .at_head("send_weights", |at| async move {
                let uid = read::uid_of(&at, request.netuid, &account).await?;
                let before = match uid {
                    Some(uid) => read::last_update(&at, index, uid).await?,
                    None => 0,
                };
                Ok((uid, before))
            })
            .await?;
        let Some(uid) = uid else { return refuse(WeightsRefusal::NotRegistered) };
        match &request.how {
            How::Plain => self.send_plain(hotkey, request, index, uid, before, progress).await,
            How::Timelocked { round, commit_version, beacon } => {
                if *commit_version != COMMIT_REVEAL_VERSION {
                    return refuse(WeightsRefusal::CommitVersion { required: *commit_version, ours: COMMIT_REVEAL_VERSION });
                }
                let payload = WeightsPayload::new(&account, &request.row, request.version_key).encode();
                let ciphertext = timelock::seal(beacon, *round, &payload)?;
                self.send_timelocked(hotkey, request, index, *round, &ciphertext, progress).await
            }
        }
    }

    async fn send_plain(
        &self,
        hotkey: &Hotkey,
        request: &WeightsRequest,
        index: u16,
        uid: u16,
        before: u64,
        progress: Telling<'_>,
    ) -> Result<Landed, SetWeightsError> {
        let expected = &weights::as_stored(&request.row);
        let is_there = |at: AtBlock| async move {
            Ok(read::last_update(&at, index, uid).await? > before && read::weights(&at, index, uid).await? == *expected)
        };
        let block = self.landed(hotkey, &plain_call(request), is_there, progress).await?;
        let stored = self.read_back(block, |at| async move { read::weights(&at, index, uid).await }).await?;
        if stored == *expected { Ok(Landed { block, commit: None }) } else { Err(SetWeightsError::ReadBackDiffers { block }) }
    }

    async fn send_timelocked(
        &self,
        hotkey: &Hotkey,
        request: &WeightsRequest,
        index: u16,
        round: u64,
        ciphertext: &[u8],
        progress: Telling<'_>,
    ) -> Result<Landed, SetWeightsError> {
        let account = hotkey.account();
        let find = |at: AtBlock| async move {
            let commits = read::commits(&at, request.netuid, index, &account).await?;
            Ok::<Option<PendingCommit>, subxt::Error>(commits.into_iter().find(|(_, bytes)| bytes == ciphertext).map(|(commit, _)| commit))
        };
        let call = timelocked_call(request, ciphertext, round);
        let block = self.landed(hotkey, &call, |at| async move { Ok(find(at).await?.is_some()) }, progress).await?;
        match self.read_back(block, find).await? {
            Some(commit) => Ok(Landed { block, commit: Some(commit) }),
            None => Err(SetWeightsError::ReadBackDiffers { block }),
        }
    }

    /// Sends a call of weights and gives the finalized block that contains it.
    async fn landed<C, F, Fut>(&self, hotkey: &Hotkey, call: &C, is_there: F, progress: Telling<'_>) -> Result<BlockRef, SetWeightsError>
    where
        C: Payload + Sync,
        F: Fn(AtBlock) -> Fut + Send + Sync,
        Fut: Future<Output = Result<bool, subxt::Error>> + Send,
    {
        let reason = match self.write(hotkey, call, is_there, progress).await {
            Ok(block) => return Ok(block),
            Err(Failure::PoolCode(code)) => WeightsRefusal::from_pool_code(code),
            Err(Failure::Nonce) => WeightsRefusal::Nonce,
            Err(Failure::BadProof) => WeightsRefusal::BadProof,
            Err(Failure::Pool(reason)) => WeightsRefusal::Other(reason),
            Err(Failure::Dispatch(name)) => WeightsRefusal::from_dispatch_error(name.strip_prefix("SubtensorModule::").unwrap_or(&name)),
            Err(Failure::Unknown) => return Err(self.not_finalized()),
            Err(Failure::NotSent(error)) => return Err(error.into()),
        };
        Err(SetWeightsError::Refused(reason))
    }

    fn not_finalized(&self) -> SetWeightsError {
        SetWeightsError::NotFinalized { millis: self.connections.deadlines.finality_ms }
    }

    /// Reads at a block that was seen finalized. Where that fails, the row may well be there: it is not known.
    async fn read_back<T, F, Fut>(&self, block: BlockRef, question: F) -> Result<T, SetWeightsError>
    where
        F: Fn(AtBlock) -> Fut + Send + Sync,
        Fut: Future<Output = Result<T, subxt::Error>> + Send,
    {
        let question = &question;
        let answer = self.connections.ask("read back", |link| async move {
            let at = link.api.at_block(H256(block.hash)).await?;
            question(at).await
        });
        answer.await.map_err(|error| match error {
            ChainError::Answer { .. } => error.into(),
            _ => self.not_finalized(),
        })
    }
}

/// The call that sets a row in the open.
pub(super) fn plain_call(request: &WeightsRequest) -> impl Payload + Sync + use<> {
    let (uids, values): (Vec<u16>, Vec<u16>) = request.row.iter().copied().unzip();
    let list = |numbers: Vec<u16>| Value::unnamed_composite(numbers.into_iter().map(Value::from));
    let mut arguments = vec![Value::from(request.netuid)];
    // The plain call is older than mechanisms: it is understood by every runtime.
    let name = if request.mechanism == 0 { "set_weights" } else { "set_mechanism_weights" };
    if request.mechanism > 0 {
        arguments.push(Value::from(request.mechanism));
    }
    arguments.extend([list(uids), list(values), Value::from(request.version_key)]);
    dynamic::transaction(SUBTENSOR, name, arguments)
}

/// The call that commits a timelocked row.
pub(super) fn timelocked_call(request: &WeightsRequest, ciphertext: &[u8], round: u64) -> impl Payload + Sync + use<> {
    let mut arguments = vec![Value::from(request.netuid)];
    let name = if request.mechanism == 0 { "commit_timelocked_weights" } else { "commit_timelocked_mechanism_weights" };
    if request.mechanism > 0 {
        arguments.push(Value::from(request.mechanism));
    }
    arguments.extend([Value::from_bytes(ciphertext), Value::from(round), Value::from(COMMIT_REVEAL_VERSION)]);
    dynamic::transaction(SUBTENSOR, name, arguments)
}
