//! `chain status`, `chain weights` and `chain set-weights`: what the chain shows of this validator, what would be sent, and which rule
//! stands against it.

use std::collections::BTreeMap;
use std::path::Path;

use chain::identity::tokens;
use chain::setter::{Input, Obstacle, Setter, SetterSettings, Stage};
use chain::{Chain, ChainHealth, How, Hyperparameters, WeightsRequest, WeightsView, setter};
use daemon::network::{self, block_on};
use daemon::settings::{CommonArgs, Role};
use daemon::{Exit, Failure, Settings, clock, identity};
use protocol::AccountId;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use crate::effects::chain::{WEIGHTS_FILE, WeightsFile};
use crate::machine::weights::WEIGHTS_VERSION;

/// Largest file of scores that is read.
const SCORES_BYTES_MAX: u64 = 4 << 20;
/// Steps of a sent row that wait to be read here: nobody does, the end counts.
const PROGRESS_MAX: usize = 64;

#[derive(Debug, thiserror::Error)]
enum ScoresError {
    #[error("no scores are known: {file} is not there\nhint: the running validator writes it; or name a file with --scores")]
    None { file: String },
    #[error("{file} cannot be read: {reason}\nhint: it is one JSON object, {{\"SS58\": number, …}}")]
    Unusable { file: String, reason: String },
}

/// One entry of a row.
#[derive(Clone, Debug, Serialize)]
struct Entry {
    uid: u16,
    hotkey: String,
    value: u16,
    /// Its part of the row, in millionths.
    share_ppm: u64,
}

/// Whose weights, and where.
struct Place {
    account: AccountId,
    netuid: u16,
    mechanism: u8,
}

impl Place {
    fn of(settings: &Settings) -> Result<Self, Failure> {
        let account = identity::wallet(settings)?.load_hotkeypub().map_err(Failure::configuration)?.account();
        Ok(Self { account, netuid: settings.netuid()?, mechanism: settings.validator().weight_mechanism })
    }

    async fn view(&self, chain: &dyn Chain) -> Result<WeightsView, Failure> {
        Ok(chain.weights_view(self.netuid, self.mechanism, &self.account).await?)
    }
}

fn entries(row: &[(u16, u16)], view: &WeightsView) -> Vec<Entry> {
    let sum: u64 = row.iter().map(|(_, value)| u64::from(*value)).sum::<u64>().max(1);
    let entry = |(uid, value): &(u16, u16)| Entry {
        uid: *uid,
        hotkey: view.metagraph.by_uid(*uid).map_or_else(String::new, |neuron| neuron.hotkey.to_string()),
        value: *value,
        share_ppm: u64::from(*value) * 1_000_000 / sum,
    };
    row.iter().map(entry).collect()
}

fn print_row(row: &[Entry]) {
    for Entry { uid, hotkey, value, share_ppm } in row {
        println!("  uid {uid:<5} {hotkey:<48}  {value:>5}  {:>6.2} %", *share_ppm as f64 / 1e4);
    }
}

/// What the daemon wrote down, if it did.
fn daemon_file(settings: &Settings) -> Result<Option<WeightsFile>, Failure> {
    let path = settings.state_dir()?.join(WEIGHTS_FILE);
    if !path.exists() {
        return Ok(None);
    }
    let unusable = |reason: String| Failure::configuration(ScoresError::Unusable { file: path.display().to_string(), reason });
    let bytes = read_limited(&path).map_err(unusable)?;
    serde_json::from_slice(&bytes).map(Some).map_err(|error| unusable(error.to_string()))
}

fn read_limited(path: &Path) -> Result<Vec<u8>, String> {
    let length = std::fs::metadata(path).map_err(|error| error.to_string())?.len();
    if length > SCORES_BYTES_MAX {
        return Err(format!("it has {length} bytes"));
    }
    std::fs::read(path).map_err(|error| error.to_string())
}

/// The connection, the rules, our neuron, and how the daemon's weights stand.
pub fn status(common: &CommonArgs, json: bool) -> Result<Exit, Failure> {
    let settings = common.settings(Role::Validator, ())?;
    let (place, link, file) = (Place::of(&settings)?, network::link(&settings)?, daemon_file(&settings)?);
    let (health, genesis, view, list) = block_on(async {
        let client = link.client().await?;
        let view = place.view(client.as_ref()).await?;
        let list = client.hyperparameter_list(place.netuid).await?;
        Ok((client.health(), client.genesis(), view, list))
    })?;
    let own = view.metagraph.by_hotkey(&place.account);
    let next_epoch = view.epoch.next_epoch_block(view.block().number);
    if json {
        let listed: BTreeMap<String, String> = list.into_iter().map(|entry| (entry.name, entry.value)).collect();
        let own = own.map(|own| {
            json!({ "uid": own.uid, "stake_rao": own.stake, "validator_permit": own.validator_permit, "last_update": view.last_update(own) })
        });
        let object = json!({
            "endpoint": health.endpoint,
            "genesis": hex(&genesis),
            "spec_version": health.spec_version,
            "block": view.block().number,
            "block_hash": hex(&view.block().hash),
            "block_time_ms": view.timestamp_ms,
            "netuid": place.netuid,
            "mechanism": place.mechanism,
            "hotkey": place.account.to_string(),
            "neuron": own,
            "neurons": view.metagraph.neurons.len(),
            "epoch": view.epoch.index,
            "next_epoch_block": next_epoch,
            "rules": rules(&view.hyperparameters),
            "hyperparameters": listed,
            "waiting_commits": view.commits,
            "daemon": file,
        });
        println!("{object:#}");
        return Ok(Exit::Done);
    }
    print_place(&health, &view, &place);
    match own {
        None => println!("hotkey      {} is not registered", place.account),
        Some(own) => {
            let permit = if own.validator_permit { "a validator permit" } else { "no validator permit" };
            let last = match view.last_update(own) {
                0 => "never".to_owned(),
                block => format!("in block {block}"),
            };
            println!("hotkey      {} is uid {}, with {permit} and {} of stake", place.account, own.uid, tokens(own.stake));
            let waiting = match view.commits.len() {
                0 => "nothing committed waits to be opened".to_owned(),
                1 => "1 committed row waits to be opened".to_owned(),
                count => format!("{count} committed rows wait to be opened"),
            };
            println!("weights     last set {last}; {waiting}");
        }
    }
    let parameters = &view.hyperparameters;
    let next = next_epoch.map_or_else(|| "none".to_owned(), |block| format!("begins at block {block}"));
    println!("epoch       {} of {} blocks; the next {next}", view.epoch.index, parameters.tempo);
    println!(
        "rules       rate limit {} blocks, at least {} entries, version {} (this build: {WEIGHTS_VERSION}), commit-reveal {}, stake threshold {}",
        parameters.weights_rate_limit,
        parameters.min_allowed_weights,
        parameters.weights_version,
        if parameters.commit_reveal { "on" } else { "off" },
        tokens(parameters.stake_threshold)
    );
    match file {
        Some(file) if file.hotkey != place.account.to_string() || file.netuid != place.netuid => {
            println!("daemon      the state folder is that of {} on subnet {}", file.hotkey, file.netuid);
        }
        Some(file) => {
            let age = clock::now_ms().saturating_sub(file.updated_ms) / 1000;
            println!("daemon      {age} s ago: {}", file.stage);
            println!("            next: {}", file.next);
        }
        None => println!("daemon      nothing in the state folder: it has not run here"),
    }
    Ok(Exit::Done)
}

fn print_place(health: &ChainHealth, view: &WeightsView, place: &Place) {
    println!("endpoint    {} (runtime {})", health.endpoint, health.spec_version);
    let age_ms = clock::now_ms().saturating_sub(view.timestamp_ms);
    println!("block       {}, {} s old by this clock", view.block(), age_ms / 1000);
    println!(
        "subnet      {}, mechanism {} of {}, {} neurons",
        place.netuid,
        place.mechanism,
        view.mechanisms,
        view.metagraph.neurons.len()
    );
}

fn rules(parameters: &Hyperparameters) -> Value {
    json!({
        "weights_rate_limit": parameters.weights_rate_limit,
        "min_allowed_weights": parameters.min_allowed_weights,
        "max_weight_limit": parameters.max_weight_limit,
        "weights_version": parameters.weights_version,
        "weights_version_of_this_build": WEIGHTS_VERSION,
        "commit_reveal": parameters.commit_reveal,
        "stake_threshold_rao": parameters.stake_threshold,
    })
}

fn hex(bytes: &[u8; 32]) -> String {
    format!("0x{}", protocol::Digest(*bytes))
}

/// The row that the chain shows for this validator.
pub fn weights(common: &CommonArgs, json: bool) -> Result<Exit, Failure> {
    let settings = common.settings(Role::Validator, ())?;
    let (place, link) = (Place::of(&settings)?, network::link(&settings)?);
    let (health, view) = block_on(async {
        let client = link.client().await?;
        let view = place.view(client.as_ref()).await?;
        Ok((client.health(), view))
    })?;
    let row = entries(&view.row, &view);
    let last_update = view.metagraph.by_hotkey(&place.account).map(|own| view.last_update(own));
    if json {
        let object = json!({
            "block": view.block().number,
            "netuid": place.netuid,
            "mechanism": place.mechanism,
            "hotkey": place.account.to_string(),
            "is_registered": last_update.is_some(),
            "last_update": last_update,
            "row": row,
            "waiting_commits": view.commits,
        });
        println!("{object:#}");
        return Ok(Exit::Done);
    }
    print_place(&health, &view, &place);
    match (last_update, row.is_empty()) {
        (None, _) => println!("the hotkey {} is not registered", place.account),
        (_, true) => println!("the chain shows no row of {}", place.account),
        (Some(block), false) => println!("row of {}, last update in block {block}:", place.account),
    }
    print_row(&row);
    for commit in &view.commits {
        println!("  committed in block {}, opened by beacon round {}", commit.block, commit.round);
    }
    Ok(Exit::Done)
}

/// Scores by hand, or those that the daemon left.
fn scores(settings: &Settings, file: Option<&Path>) -> Result<Vec<(AccountId, u64)>, Failure> {
    let (name, texts): (String, BTreeMap<String, u64>) = match file {
        Some(path) => {
            let name = path.display().to_string();
            let unusable = |reason: String| Failure::configuration(ScoresError::Unusable { file: name.clone(), reason });
            let bytes = read_limited(path).map_err(unusable)?;
            let texts = serde_json::from_slice(&bytes).map_err(|error| unusable(error.to_string()))?;
            (name, texts)
        }
        None => {
            let name = settings.state_dir()?.join(WEIGHTS_FILE).display().to_string();
            let left = daemon_file(settings)?.ok_or_else(|| Failure::configuration(ScoresError::None { file: name.clone() }))?;
            (name, left.scores.into_iter().map(|line| (line.hotkey, line.tokens)).collect())
        }
    };
    let parsed = texts.into_iter().map(|(address, score)| {
        let account = address.parse().map_err(|error| {
            let reason = format!("`{address}` is no address: {error}").replace('\n', "; ");
            Failure::configuration(ScoresError::Unusable { file: name.clone(), reason })
        })?;
        Ok((account, score))
    });
    parsed.collect()
}

/// Sets weights once, or says what a run without `--dry-run` would send and what would become of it.
pub fn set_weights(common: &CommonArgs, file: Option<&Path>, json: bool) -> Result<Exit, Failure> {
    let settings = common.settings(Role::Validator, ())?;
    let (place, link, scores) = (Place::of(&settings)?, network::link(&settings)?, scores(&settings, file)?);
    // The secret is needed for sending only.
    let hotkey = if settings.dry_run() { None } else { Some(identity::hotkey(&settings)?) };
    let (setter, view) = block_on(async {
        let client = link.client().await?;
        let view = place.view(client.as_ref()).await?;
        let mut setter = Setter::new(SetterSettings {
            mechanism: place.mechanism,
            is_dry_run: hotkey.is_none(),
            ..SetterSettings::new(place.netuid, place.account, WEIGHTS_VERSION)
        });
        // As the final row of a run: it is set even if this epoch has a row, unless that is the same.
        setter.handle(clock::now_ms(), Input::Scores { scores, is_final: true });
        let (tell, _heard) = mpsc::channel(PROGRESS_MAX);
        while let Some(effect) = setter.poll_effect() {
            let answer = match (&effect, &hotkey) {
                (setter::Effect::Look, _) => Input::View(Box::new(place.view(client.as_ref()).await?)),
                (setter::Effect::Send { .. }, Some(hotkey)) => {
                    setter::execute(client.as_ref(), hotkey, &effect, (place.netuid, place.mechanism), &tell).await
                }
                (setter::Effect::Send { .. }, None) => break,
            };
            setter.handle(clock::now_ms(), answer);
        }
        Ok((setter, view))
    })?;
    let (proposal, stage) = (setter.proposal(clock::now_ms()), setter.stage());
    let rule = proposal.as_ref().ok().map(|request| view.check(&place.account, request));
    // The chain adds what is inherited and what is staked on the root network: here that can only be a warning.
    let threshold = view.hyperparameters.stake_threshold;
    let low_stake = view.metagraph.by_hotkey(&place.account).map(|own| own.stake).filter(|stake| *stake < threshold);
    if json {
        let rule = rule.map(|rule| match rule {
            Ok(()) => Value::Null,
            Err(reason) => json!({ "reason": reason.to_string(), "hint": reason.hint() }),
        });
        let object = json!({
            "block": view.block().number,
            "netuid": place.netuid,
            "mechanism": place.mechanism,
            "hotkey": place.account.to_string(),
            "dry_run": hotkey.is_none(),
            "row": proposal.as_ref().ok().map(|request| entries(&request.row, &view)),
            "reveal_round": proposal.as_ref().ok().and_then(round),
            "refused_by": rule,
            "is_stake_below_threshold": low_stake.is_some(),
            "is_on_chain": setter.is_final_set(),
            "stage": stage.to_string(),
            "hint": stage.hint(),
        });
        println!("{object:#}");
    } else {
        if let Ok(request) = &proposal {
            let how = round(request).map_or_else(|| "in the open".to_owned(), |round| format!("locked to beacon round {round}"));
            println!("row for subnet {}, mechanism {}, {how}:", place.netuid, place.mechanism);
            print_row(&entries(&request.row, &view));
        }
        match rule {
            Some(Ok(())) => println!("rules       none would refuse it at block {}", view.block().number),
            Some(Err(reason)) => println!("rules       refused at block {}: {reason}; {}", view.block().number, reason.hint()),
            None => {}
        }
        if let Some(stake) = low_stake {
            let (stake, threshold) = (tokens(stake), tokens(threshold));
            println!(
                "stake       {stake} on the subnet, {threshold} are wanted: refused unless the rest is inherited or staked on the root network"
            );
        }
        println!("now         {stage}");
        println!("next        {}", stage.hint());
    }
    Ok(exit(stage, setter.is_final_set()))
}

fn round(request: &WeightsRequest) -> Option<u64> {
    match request.how {
        How::Plain => None,
        How::Timelocked { round, .. } => Some(round),
    }
}

/// 0: set, committed, or it would be. 75: a matter of time. 69: the chain did not answer. 78: a person must change something.
fn exit(stage: &Stage, is_shown: bool) -> Exit {
    match stage {
        _ if is_shown => Exit::Done,
        Stage::OnChain { .. } | Stage::Committed { .. } | Stage::DryRun { .. } => Exit::Done,
        Stage::Unreachable { .. } | Stage::Unsure { .. } | Stage::Sending { .. } | Stage::Starting => Exit::Unavailable,
        Stage::Blocked(Obstacle::NotRegistered) => Exit::TryLater,
        stage if stage.needs_a_person() => Exit::Configuration,
        _ => Exit::TryLater,
    }
}

#[cfg(test)]
mod tests {
    use chain::WeightsRefusal;

    use super::*;

    #[test]
    fn exit_codes_tell_a_matter_of_time_from_what_a_person_must_change() {
        for (stage, code) in [
            (Stage::OnChain { row: vec![(1, 65535)], block: 9 }, Exit::Done),
            (Stage::TooSoon { from_block: 9 }, Exit::TryLater),
            (Stage::RevealFirst { until_block: 9 }, Exit::TryLater),
            (Stage::Refused { reason: WeightsRefusal::Nonce, retry_at_ms: 0 }, Exit::TryLater),
            (Stage::Blocked(Obstacle::NotRegistered), Exit::TryLater),
            (Stage::Blocked(Obstacle::NoPermit), Exit::Configuration),
            (Stage::Blocked(Obstacle::Clock { apart_ms: 900_000, is_ahead: true }), Exit::Configuration),
            (Stage::Refused { reason: WeightsRefusal::StakeTooLow, retry_at_ms: 0 }, Exit::Configuration),
            (Stage::Unreachable { why: "no route".to_owned() }, Exit::Unavailable),
        ] {
            assert_eq!(exit(&stage, false), code, "{stage}");
        }
        assert_eq!(exit(&Stage::NotDue { from_block: 9 }, true), Exit::Done, "the chain shows the row");
    }
}
