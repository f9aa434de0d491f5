//! `QUASAR_*` variables that once meant something and set nothing any more.
//!
//! A variable that is silently without effect is worse than an error: the person who set it believes in it. So what was
//! dropped is refused with the replacement, and what the signed run manifest decides now is reported as a notice.

/// Variables that are refused, each with what replaces it.
const DROPPED: &[(&str, &str)] = &[
    ("QUASAR_PERSISTENT_LEARNER_SERVICE", "the trainer runs in the miner's process and stays up between jobs"),
    ("QUASAR_PERSISTENT_LEARNER_SERVICE_DIR", "the trainer runs in the miner's process; its state is under QUASAR_STATE_DIR"),
    ("QUASAR_PERSISTENT_LEARNER_CACHE_DIR", "use QUASAR_STATE_DIR"),
    ("QUASAR_LEARNER_RUNTIME_CACHE", "the trainer runs in the miner's process and stays up between jobs"),
    ("QUASAR_LOAD_PERSISTENT_STATES", "the local snapshot is always used when it is valid"),
    ("QUASAR_SAVE_PERSISTENT_STATES", "local snapshots are always saved"),
    ("QUASAR_MINER_ENV_OVERRIDE_KEYS", "jobs carry no environment any more, so nothing needs to override it"),
    ("QUASAR_REQUIRE_LIVE_CONTROL", "every job is signed and live; there is nothing to switch"),
    ("QUASAR_KEEP_TRAINING_WORKDIR", "there is no work directory per job; the state is under QUASAR_STATE_DIR"),
    ("QUASAR_TRACE_STAGES", "use the log filter: QUASAR_LOG=debug"),
    ("QUASAR_LOG_STEP_TIMINGS", "use the log filter (QUASAR_LOG=debug) or /metrics"),
    ("QUASAR_ORCHESTRATOR_STEPS", "`run` goes on until the run's end or a stop"),
    ("QUASAR_ORCHESTRATOR_TIMEOUT_SEC", "`run` goes on until the run's end or a stop"),
    ("QUASAR_REQUIRE_REGISTERED_MINERS", "only registered hotkeys are served, always"),
    ("QUASAR_REGISTERED_MINER_CACHE_TTL_SEC", "the guest list follows the chain each minute"),
    ("QUASAR_GRANT_MODE", "presigned and sealed is the only mode"),
    ("QUASAR_LIVE_SYNC_REQUEST_TTL_SEC", "deadlines follow from the run manifest's schedule"),
    ("QUASAR_LIVE_SYNC_MERGE_MAX_ATTEMPTS", "a merge is completed from its tape, not tried again"),
    ("QUASAR_SCHEDULER_TASK_TIMEOUT_SEC", "deadlines follow from the run manifest's schedule"),
    ("QUASAR_MERGE_VALIDATOR_HOTKEYS", "validators are those with a permit on chain, chosen by the beacon"),
    ("QUASAR_MERGE_VERDICT_QUORUM", "verdicts decide scores, they do not hold up merges"),
    ("QUASAR_MERGE_FAIL_VETO", "verdicts decide scores, they do not hold up merges"),
    ("QUASAR_VALIDATION_TARGET_HOTKEYS", "validators are those with a permit on chain, chosen by the beacon"),
    ("QUASAR_VALIDATOR_HOTKEYS", "validators are those with a permit on chain, chosen by the beacon"),
    ("QUASAR_ALLOW_TEST_RUN", "networks are separate: use QUASAR_NETWORK=local or test for trials"),
    ("QUASAR_CAPABILITIES", "a miner's abilities are measured, not claimed"),
];

/// Variables whose value the signed run manifest holds now.
const FROM_RUN_MANIFEST: &[&str] = &[
    "QUASAR_MODEL_ID",
    "QUASAR_MODEL_REVISION",
    "QUASAR_ORCHESTRATOR_POLL_INTERVAL",
    "QUASAR_ORCHESTRATOR_HEARTBEAT_TTL_SEC",
    "QUASAR_JOB_TTL_SEC",
    "QUASAR_MAX_INFLIGHT_PER_HOTKEY",
    "QUASAR_MAX_MINERS_PER_ROUND",
    "QUASAR_MINER_HEARTBEAT_INTERVAL_SEC",
    "QUASAR_SCORE_MERGE_EVENT_WINDOW",
    "QUASAR_SCORE_DECAY_HALF_LIFE_EVENTS",
    "QUASAR_INDEPENDENT_QUASAR_EVAL",
    "QUASAR_MAX_TOKENS_PER_SEC_PER_GPU",
    "QUASAR_SHARDS_PER_JOB",
    "QUASAR_JOB_MIN_GPUS",
    "QUASAR_JOB_GPU_COUNT",
    "QUASAR_JOB_PLACEMENT",
    "QUASAR_FRAGMENT_COUNT",
    "QUASAR_SYNC_OVERLAP_TAU",
    "QUASAR_SYNC_QUORUM",
    "QUASAR_SYNC_SAFETY_MARGIN",
    "QUASAR_SYNC_MIN_GRACE_SEC",
    "QUASAR_SYNC_MAX_GRACE_SEC",
    "QUASAR_SYNC_ESTIMATED_SYNC_SEC",
    "QUASAR_OUTER_LR",
    "QUASAR_VALIDATION_SAMPLE_RATE",
    "QUASAR_AUTO_FINALIZE_ASSIGNMENTS",
    "QUASAR_AUTO_RELEASE_CHECKPOINTS",
    "QUASAR_SEQUENCE_LENGTH",
    "QUASAR_BATCH_SIZE",
    "QUASAR_LOCAL_STEPS",
    "QUASAR_MAX_SEQUENCES",
    "QUASAR_BASE_LR",
    "QUASAR_LR_SCHEDULE",
    "QUASAR_WARMUP_RATIO",
    "QUASAR_GRAD_CLIP_NORM",
    "QUASAR_GRAD_CLIP_INTERVAL",
];

/// Kept names that belong to parts which are commands of their own here: preparing data, exporting metrics.
const ELSEWHERE: &[(&str, &str)] = &[
    ("QUASAR_DATA_STAGES", "choose the inputs of `data prepare`"),
    ("QUASAR_DATA_SOURCES", "choose the inputs of `data prepare`"),
    ("QUASAR_DATA_CATEGORIES", "choose the inputs of `data prepare`"),
    ("QUASAR_EVAL_DATA_STAGES", "choose the held-out documents of `data prepare`"),
    ("QUASAR_EVAL_DATA_SOURCES", "choose the held-out documents of `data prepare`"),
    ("QUASAR_EVAL_DATA_CATEGORIES", "choose the held-out documents of `data prepare`"),
    ("QUASAR_MIN_SHARD_TOKENS", "choose the shard size of `data prepare`"),
    ("QUASAR_AUTO_PREPARE_SHARDS", "run `data prepare` and `data publish`"),
    ("QUASAR_AUTO_PREPARE_INTERVAL_SEC", "run `data prepare` and `data publish`"),
    ("QUASAR_AUTO_PREPARE_MIN_TRAIN_SHARDS", "run `data prepare` and `data publish`"),
    ("QUASAR_AUTO_PREPARE_MAX_NEW_SHARDS", "run `data prepare` and `data publish`"),
    ("QUASAR_AUTO_PREPARE_TOKENS_PER_SHARD", "choose the shard size of `data prepare`"),
    ("QUASAR_CHECKPOINT_MANIFEST_URI", "name the release that a run starts from in `run create --release`"),
    ("QUASAR_GRANT_TTL_SEC", "grants live as long as the protocol says: an hour standing, a quarter of an hour on demand"),
    ("QUASAR_RELEASE_DTYPE", "a release has the element types of its base tree"),
    ("QUASAR_RELEASE_OUTPUT_DIR", "fetch a release with `checkpoint fetch`"),
    ("QUASAR_WANDB_PROJECT", "metrics are on the /metrics page of --health-listen"),
    ("QUASAR_ORCHESTRATOR_WANDB_PROJECT", "metrics are on the /metrics page of --health-listen"),
];

/// The configuration file's own name; not a setting, because it is read before there are any.
pub const CONFIG_FILE: &str = "QUASAR_CONFIG";
/// Names with this prefix belong to tests and developer commands.
const DEVELOPER_PREFIX: &str = "QUASAR_DEV_";

/// What a `QUASAR_*` name that is no setting means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Not for the settings.
    Ignored,
    /// Has no effect; say so.
    Notice(String),
    /// Refused, with the replacement.
    Dropped(&'static str),
    Unknown,
}

/// What becomes of a `QUASAR_*` variable that is not in the table of settings.
pub fn fate(name: &str) -> Fate {
    if name == CONFIG_FILE || name.starts_with(DEVELOPER_PREFIX) {
        return Fate::Ignored;
    }
    if let Some((_, replacement)) = DROPPED.iter().find(|(dropped, _)| *dropped == name) {
        return Fate::Dropped(replacement);
    }
    if FROM_RUN_MANIFEST.contains(&name) {
        return Fate::Notice(format!("{name} has no effect: its value comes from the signed run manifest"));
    }
    if let Some((_, instead)) = ELSEWHERE.iter().find(|(kept, _)| *kept == name) {
        return Fate::Notice(format!("{name} has no effect here: {instead}"));
    }
    Fate::Unknown
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::table;

    #[test]
    fn no_name_is_both_a_setting_and_something_else() {
        let names = DROPPED.iter().map(|(name, _)| *name).chain(FROM_RUN_MANIFEST.iter().copied());
        for name in names.chain(ELSEWHERE.iter().map(|(name, _)| *name)) {
            assert!(table::by_variable(name).is_none(), "{name}");
            assert_ne!(fate(name), Fate::Unknown);
        }
        assert_eq!(fate("QUASAR_NETWROK"), Fate::Unknown);
        assert_eq!(fate("QUASAR_DEV_TRACE"), Fate::Ignored);
    }
}
