//! Every setting there is: its key, its environment names, who reads it, its default.
//!
//! This table is the only place where a setting is defined; the configuration file's keys, the environment, `config show`
//! and the documentation follow from it. `QUASAR_*` names that the Python package used keep their meaning.

use std::fmt;

/// Who reads a setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Orchestrator,
    Miner,
    Validator,
}

impl Role {
    pub fn name(self) -> &'static str {
        match self {
            Self::Orchestrator => "orchestrator",
            Self::Miner => "miner",
            Self::Validator => "validator",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a value must look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Text,
    /// `1 true yes on` or `0 false no off`.
    Flag,
    /// A whole number in this range.
    Integer(u64, u64),
    /// Seconds, with fractions; at least a millisecond.
    Seconds,
    /// A path; a leading `~/` is the home directory.
    Path,
    /// Comma-separated in environment and flags, an array in the file.
    List,
    /// An SS58 address.
    Account,
    /// An address and port on loopback, or `off`.
    Listen,
    Choice(&'static [&'static str]),
    /// `auto`, `cpu`, or GPU numbers.
    Devices,
    /// `auto`, `cpu` or `cuda:N`.
    Device,
    LaunchMode,
    LogFilter,
    /// A URL without credentials.
    Url,
}

/// One setting.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// Key in the configuration file; the part before the dot is a table there.
    pub key: &'static str,
    /// Environment names, strongest first.
    pub env: &'static [&'static str],
    /// Flag on the command line, without the dashes.
    pub flag: Option<&'static str>,
    pub roles: &'static [Role],
    pub kind: Kind,
    pub default: Option<&'static str>,
    /// Never shown.
    pub secret: bool,
    pub help: &'static str,
}

const ALL: &[Role] = &[Role::Orchestrator, Role::Miner, Role::Validator];
const ORCHESTRATOR: &[Role] = &[Role::Orchestrator];
const MINER: &[Role] = &[Role::Miner];
const VALIDATOR: &[Role] = &[Role::Validator];
const TRAINERS: &[Role] = &[Role::Miner, Role::Validator];
/// Seconds and counts beyond this are typing errors.
const MANY: u64 = 1_000_000_000;

impl Setting {
    const fn new(key: &'static str, env: &'static [&'static str], roles: &'static [Role], kind: Kind, help: &'static str) -> Self {
        Self { key, env, flag: None, roles, kind, default: None, secret: false, help }
    }

    const fn flag(mut self, flag: &'static str) -> Self {
        self.flag = Some(flag);
        self
    }

    const fn default(mut self, default: &'static str) -> Self {
        self.default = Some(default);
        self
    }

    const fn secret(mut self) -> Self {
        self.secret = true;
        self
    }
}

/// All settings, in the order in which they are shown.
pub const SETTINGS: &[Setting] = &[
    Setting::new("network", &["QUASAR_NETWORK"], ALL, Kind::Choice(&["finney", "test", "local"]), "Bittensor network").flag("network"),
    Setting::new("netuid", &["QUASAR_NETUID"], ALL, Kind::Integer(0, u16::MAX as u64), "subnet number on that network").flag("netuid"),
    Setting::new("chain.endpoints", &["QUASAR_CHAIN_ENDPOINTS"], ALL, Kind::List, "chain endpoints in order of preference (wss://…)")
        .flag("chain-endpoints"),
    Setting::new(
        "chain.stall_sec",
        &["QUASAR_CHAIN_STALL_SEC"],
        ALL,
        Kind::Seconds,
        "an endpoint that brings no new block for so long is left for the next one",
    )
    .default("120"),
    Setting::new("chain.local_file", &["QUASAR_LOCAL_CHAIN"], ALL, Kind::Path, "file with genesis and endpoint of network `local`")
        .flag("local-chain"),
    Setting::new("owner_identity", &["QUASAR_OWNER_IDENTITY"], ALL, Kind::Account, "SS58 address of the run's owner")
        .flag("owner-identity"),
    Setting::new("run_id", &["QUASAR_RUN_ID"], ALL, Kind::Text, "refuse every run but this one").flag("run-id"),
    Setting::new("wallet.path", &["QUASAR_WALLET_PATH"], ALL, Kind::Path, "folder of the wallets")
        .flag("wallet-path")
        .default("~/.bittensor/wallets"),
    Setting::new("wallet.name", &["QUASAR_WALLET_NAME"], ALL, Kind::Text, "name of the wallet").flag("wallet-name"),
    Setting::new("wallet.hotkey", &["QUASAR_HOTKEY_NAME"], ALL, Kind::Text, "name of the hotkey").flag("hotkey-name"),
    Setting::new(
        "wallet.password_file",
        &["QUASAR_HOTKEY_PASSWORD_FILE"],
        ALL,
        Kind::Path,
        "file with the password of an encrypted hotkey; default: systemd's credential `hotkey-password`",
    )
    .flag("password-file"),
    Setting::new("s3.bucket", &["QUASAR_S3_BUCKET"], ALL, Kind::Text, "bucket of the subnet").flag("s3-bucket"),
    Setting::new("s3.region", &["QUASAR_S3_REGION"], ALL, Kind::Text, "region of the bucket").flag("s3-region").default("us-east-1"),
    Setting::new("s3.endpoint_url", &["QUASAR_S3_ENDPOINT_URL"], ALL, Kind::Url, "S3 endpoint, if it is not AWS").flag("s3-endpoint-url"),
    Setting::new(
        "s3.path_style",
        &["QUASAR_S3_PATH_STYLE"],
        ALL,
        Kind::Choice(&["auto", "yes", "no"]),
        "bucket in the path; auto: with an endpoint URL",
    )
    .default("auto"),
    Setting::new("s3.access_key", &["QUASAR_S3_ACCESS_KEY", "AWS_ACCESS_KEY_ID"], ORCHESTRATOR, Kind::Text, "access key id").secret(),
    Setting::new("s3.secret_key", &["QUASAR_S3_SECRET_KEY", "AWS_SECRET_ACCESS_KEY"], ORCHESTRATOR, Kind::Text, "secret access key")
        .secret(),
    Setting::new("s3.anonymous", &["QUASAR_S3_ANONYMOUS"], ALL, Kind::Flag, "no credentials; miners and validators never have any"),
    Setting::new(
        "state_dir",
        &[
            "QUASAR_STATE_DIR",
            "QUASAR_LEARNER_STATE_DIR",
            "QUASAR_MINER_CACHE_DIR",
            "QUASAR_VALIDATOR_CACHE_DIR",
            "QUASAR_SYNCER_CACHE_DIR",
        ],
        ALL,
        Kind::Path,
        "journal, local snapshots, caches; one process each; default ~/.quasar/ROLE",
    )
    .flag("state-dir"),
    Setting::new("dry_run", &["QUASAR_DRY_RUN"], ALL, Kind::Flag, "write nothing to the chain").flag("dry-run").default("0"),
    Setting::new("health.listen", &["QUASAR_HEALTH_LISTEN"], ALL, Kind::Listen, "address of /livez, /readyz and /metrics, or off")
        .flag("health-listen")
        .default("off"),
    Setting::new("log.format", &["QUASAR_LOG_FORMAT"], ALL, Kind::Choice(&["human", "json"]), "how a log line looks")
        .flag("log-format")
        .default("human"),
    Setting::new("log.filter", &["QUASAR_LOG"], ALL, Kind::LogFilter, "log filter").flag("log").default("info"),
    Setting::new(
        "torch.cuda_dir",
        &["QUASAR_TORCH_CUDA_DIR"],
        TRAINERS,
        Kind::Path,
        "folder of a full torch 2.11.0 installation, for CUDA",
    )
    .flag("torch-cuda-dir"),
    Setting::new("miner.devices", &["QUASAR_MINER_DEVICES"], MINER, Kind::Devices, "GPUs, one learner each: auto, cpu, or 0,1,…")
        .flag("devices")
        .default("auto"),
    Setting::new("miner.launch_mode", &["QUASAR_MINER_LAUNCH_MODE"], MINER, Kind::LaunchMode, "per-gpu: one learner for each device")
        .flag("launch-mode")
        .default("per-gpu"),
    Setting::new("miner.worker_id", &["QUASAR_MINER_WORKER_ID"], MINER, Kind::Text, "name of this miner, for display").flag("worker-id"),
    Setting::new("miner.worker_prefix", &["QUASAR_MINER_WORKER_PREFIX"], MINER, Kind::Text, "learners without a name get PREFIX-SLOT")
        .flag("worker-prefix")
        .default("worker"),
    Setting::new(
        "miner.first_slot",
        &["QUASAR_MINER_FIRST_SLOT"],
        MINER,
        Kind::Integer(0, u8::MAX as u64),
        "slot of the first learner; two machines of one hotkey take different ranges",
    )
    .flag("first-slot")
    .default("0"),
    Setting::new("miner.threads", &["QUASAR_MINER_THREADS"], MINER, Kind::Integer(1, 1024), "CPU threads of each learner")
        .flag("threads")
        .default("1"),
    Setting::new(
        "miner.device_memory_gib",
        &["QUASAR_MINER_DEVICE_MEMORY_GIB"],
        MINER,
        Kind::Integer(1, 4096),
        "memory of each GPU to plan for; default: what is free",
    ),
    Setting::new(
        "miner.host_memory_gib",
        &["QUASAR_MINER_HOST_MEMORY_GIB"],
        MINER,
        Kind::Integer(0, 65_536),
        "memory that may be pinned for each GPU; default: three quarters of what is free, shared by the learners",
    ),
    Setting::new("miner.max_jobs", &[], MINER, Kind::Integer(1, MANY), "stop after this many jobs").flag("max-jobs"),
    Setting::new("miner.timeout_sec", &[], MINER, Kind::Seconds, "stop after this long").flag("timeout-sec"),
    Setting::new("validator.worker_id", &["QUASAR_VALIDATOR_WORKER_ID"], VALIDATOR, Kind::Text, "name of this validator, for display")
        .flag("worker-id")
        .default("validator0"),
    Setting::new("validator.device", &["QUASAR_VALIDATOR_DEVICE"], VALIDATOR, Kind::Device, "where audits run: auto, cpu, cuda:0")
        .flag("device")
        .default("auto"),
    Setting::new("validator.threads", &["QUASAR_VALIDATOR_THREADS"], VALIDATOR, Kind::Integer(1, 1024), "CPU threads of an audit")
        .flag("threads")
        .default("1"),
    Setting::new(
        "validator.poll_interval_sec",
        &["QUASAR_VALIDATOR_POLL_INTERVAL"],
        VALIDATOR,
        Kind::Seconds,
        "longest pause between looks at the bucket",
    )
    .flag("poll-interval-sec")
    .default("30"),
    Setting::new(
        "weights.mechanism",
        &["QUASAR_WEIGHT_MECHANISM"],
        VALIDATOR,
        Kind::Integer(0, 15),
        "the subnet's mechanism that weights are set on, counted from 0",
    )
    .default("0"),
    Setting::new(
        "weights.refresh_sec",
        &["QUASAR_WEIGHT_REFRESH_SEC"],
        VALIDATOR,
        Kind::Seconds,
        "within an epoch weights are set again after this long",
    )
    .default("1800"),
    Setting::new(
        "weights.retry_base_sec",
        &["QUASAR_WEIGHT_RETRY_BASE_SEC"],
        VALIDATOR,
        Kind::Seconds,
        "first pause after a failed attempt",
    )
    .default("30"),
    Setting::new(
        "weights.retry_max_sec",
        &["QUASAR_WEIGHT_RETRY_MAX_SEC"],
        VALIDATOR,
        Kind::Seconds,
        "longest pause after failed attempts",
    )
    .default("600"),
];

/// The setting with this key.
pub fn by_key(key: &str) -> Option<&'static Setting> {
    SETTINGS.iter().find(|setting| setting.key == key)
}

/// The setting of `role` that a flag stands for; the same flag may stand for different settings of different roles.
pub fn by_flag(role: Role, flag: &str) -> Option<&'static Setting> {
    SETTINGS.iter().find(|setting| setting.flag == Some(flag) && setting.roles.contains(&role))
}

/// The setting that an environment name belongs to.
pub fn by_variable(name: &str) -> Option<&'static Setting> {
    SETTINGS.iter().find(|setting| setting.env.contains(&name))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::settings::value;

    #[test]
    fn keys_and_environment_names_are_unique_and_defaults_are_valid() {
        let keys: BTreeSet<_> = SETTINGS.iter().map(|setting| setting.key).collect();
        assert_eq!(keys.len(), SETTINGS.len());
        let names: Vec<_> = SETTINGS.iter().flat_map(|setting| setting.env).collect();
        assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len());
        for setting in SETTINGS {
            if let Some(default) = setting.default {
                value::check(setting.kind, default).unwrap_or_else(|error| panic!("{}: {error}", setting.key));
            }
        }
    }

    #[test]
    fn a_flag_stands_for_one_setting_of_a_role() {
        for role in ALL {
            let flags: Vec<_> = SETTINGS.iter().filter(|s| s.roles.contains(role)).filter_map(|s| s.flag).collect();
            assert_eq!(flags.iter().collect::<BTreeSet<_>>().len(), flags.len(), "{role}");
        }
    }
}
