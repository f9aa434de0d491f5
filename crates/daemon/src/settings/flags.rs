//! The flags that the daemons share, as clap arguments to flatten into theirs.
//!
//! Flags are texts here: they are checked with the other layers, so that a wrong value is reported the same way wherever it
//! came from. There is no flag for a secret: a command line is public on its machine.

use std::path::PathBuf;

use super::{Role, Settings, SettingsError, Sources};

/// Flags of every role.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Settings")]
pub struct CommonArgs {
    /// Settings file (TOML) [env: QUASAR_CONFIG]
    #[arg(long = "settings", value_name = "FILE", global = true)]
    pub settings_file: Option<PathBuf>,
    /// Bittensor network: finney, test or local [env: QUASAR_NETWORK]
    #[arg(long, value_name = "NAME", global = true)]
    pub network: Option<String>,
    /// Subnet number [env: QUASAR_NETUID]
    #[arg(long, value_name = "N", global = true)]
    pub netuid: Option<String>,
    /// Chain endpoints, comma-separated [env: QUASAR_CHAIN_ENDPOINTS]
    #[arg(long, value_name = "URL,…", global = true)]
    pub chain_endpoints: Option<String>,
    /// Genesis and endpoint of network `local` [env: QUASAR_LOCAL_CHAIN]
    #[arg(long, value_name = "FILE", global = true)]
    pub local_chain: Option<String>,
    /// SS58 address of the run's owner [env: QUASAR_OWNER_IDENTITY]
    #[arg(long, value_name = "SS58", global = true)]
    pub owner_identity: Option<String>,
    /// Refuse every run but this one [env: QUASAR_RUN_ID]
    #[arg(long, value_name = "ID", global = true)]
    pub run_id: Option<String>,
    /// Folder of the wallets [env: QUASAR_WALLET_PATH]
    #[arg(long, value_name = "DIR", global = true)]
    pub wallet_path: Option<String>,
    /// Name of the wallet [env: QUASAR_WALLET_NAME]
    #[arg(long, value_name = "NAME", global = true)]
    pub wallet_name: Option<String>,
    /// Name of the hotkey [env: QUASAR_HOTKEY_NAME]
    #[arg(long, alias = "hotkey", value_name = "NAME", global = true)]
    pub hotkey_name: Option<String>,
    /// File with the password of an encrypted hotkey [env: QUASAR_HOTKEY_PASSWORD_FILE]
    #[arg(long, value_name = "FILE", global = true)]
    pub password_file: Option<String>,
    /// Bucket of the subnet [env: QUASAR_S3_BUCKET]
    #[arg(long, value_name = "NAME", global = true)]
    pub s3_bucket: Option<String>,
    /// Region of the bucket [env: QUASAR_S3_REGION]
    #[arg(long, value_name = "NAME", global = true)]
    pub s3_region: Option<String>,
    /// S3 endpoint, if it is not AWS [env: QUASAR_S3_ENDPOINT_URL]
    #[arg(long, value_name = "URL", global = true)]
    pub s3_endpoint_url: Option<String>,
    /// Journal, snapshots and caches; one process each [env: QUASAR_STATE_DIR]
    #[arg(long, value_name = "DIR", global = true)]
    pub state_dir: Option<String>,
    /// Write nothing to the chain [env: QUASAR_DRY_RUN]
    #[arg(long, global = true)]
    pub dry_run: bool,
    /// Serve /livez, /readyz and /metrics on this loopback address [env: QUASAR_HEALTH_LISTEN]
    #[arg(long, value_name = "ADDR", global = true)]
    pub health_listen: Option<String>,
    /// Log lines for people (human) or machines (json) [env: QUASAR_LOG_FORMAT]
    #[arg(long, value_name = "FORMAT", global = true)]
    pub log_format: Option<String>,
    /// Log filter, such as info or debug [env: QUASAR_LOG]
    #[arg(long, value_name = "FILTER", global = true)]
    pub log: Option<String>,
}

/// Flags of a miner's `run`.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct MinerArgs {
    /// Name of this miner, for display [env: QUASAR_MINER_WORKER_ID]
    #[arg(long, value_name = "NAME")]
    pub worker_id: Option<String>,
    /// One learner for each of these: auto, cpu, or GPU numbers 0,1,… [env: QUASAR_MINER_DEVICES]
    #[arg(long, value_name = "LIST")]
    pub devices: Option<String>,
    /// per-gpu: one learner for each device [env: QUASAR_MINER_LAUNCH_MODE]
    #[arg(long, value_name = "MODE")]
    pub launch_mode: Option<String>,
    /// Learners without a name are called PREFIX-SLOT [env: QUASAR_MINER_WORKER_PREFIX]
    #[arg(long, value_name = "PREFIX")]
    pub worker_prefix: Option<String>,
    /// Slot of the first learner [env: QUASAR_MINER_FIRST_SLOT]
    #[arg(long, value_name = "N")]
    pub first_slot: Option<String>,
    /// CPU threads of each learner [env: QUASAR_MINER_THREADS]
    #[arg(long, value_name = "N")]
    pub threads: Option<String>,
    /// Stop after this many jobs
    #[arg(long, value_name = "N")]
    pub max_jobs: Option<String>,
    /// Stop after this long
    #[arg(long, value_name = "SECONDS")]
    pub timeout_sec: Option<String>,
    /// Folder of a full torch installation, for CUDA [env: QUASAR_TORCH_CUDA_DIR]
    #[arg(long, value_name = "DIR")]
    pub torch_cuda_dir: Option<String>,
}

/// Flags of a validator's `run`.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct ValidatorArgs {
    /// Name of this validator, for display [env: QUASAR_VALIDATOR_WORKER_ID]
    #[arg(long, value_name = "NAME")]
    pub worker_id: Option<String>,
    /// Where audits run: auto, cpu or cuda:N [env: QUASAR_VALIDATOR_DEVICE]
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<String>,
    /// CPU threads of an audit [env: QUASAR_VALIDATOR_THREADS]
    #[arg(long, value_name = "N")]
    pub threads: Option<String>,
    /// Longest pause between looks at the bucket [env: QUASAR_VALIDATOR_POLL_INTERVAL]
    #[arg(long, value_name = "SECONDS")]
    pub poll_interval_sec: Option<String>,
    /// Folder of a full torch installation, for CUDA [env: QUASAR_TORCH_CUDA_DIR]
    #[arg(long, value_name = "DIR")]
    pub torch_cuda_dir: Option<String>,
}

/// `config show` and `config validate`.
#[derive(Clone, Debug, clap::Args)]
pub struct ConfigArgs {
    #[command(subcommand)]
    pub command: ConfigCommand,
}

#[derive(Clone, Debug, clap::Subcommand)]
pub enum ConfigCommand {
    /// Print the effective settings and where each came from; secrets are masked
    Show {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Check file, environment and flags, and print everything that is wrong
    Validate,
}

type Flags = Vec<(&'static str, String)>;

/// The flags among these that were given.
fn given<const N: usize>(flags: [(&'static str, &Option<String>); N]) -> Flags {
    flags.into_iter().filter_map(|(flag, text)| Some((flag, text.clone()?))).collect()
}

impl CommonArgs {
    fn given(&self) -> Flags {
        let mut flags = given([
            ("network", &self.network),
            ("netuid", &self.netuid),
            ("chain-endpoints", &self.chain_endpoints),
            ("local-chain", &self.local_chain),
            ("owner-identity", &self.owner_identity),
            ("run-id", &self.run_id),
            ("wallet-path", &self.wallet_path),
            ("wallet-name", &self.wallet_name),
            ("hotkey-name", &self.hotkey_name),
            ("password-file", &self.password_file),
            ("s3-bucket", &self.s3_bucket),
            ("s3-region", &self.s3_region),
            ("s3-endpoint-url", &self.s3_endpoint_url),
            ("state-dir", &self.state_dir),
            ("health-listen", &self.health_listen),
            ("log-format", &self.log_format),
            ("log", &self.log),
        ]);
        if self.dry_run {
            flags.push(("dry-run", "1".to_owned()));
        }
        flags
    }

    /// The process' environment with these flags and those of the role.
    ///
    /// # Errors
    /// A variable is not valid UTF-8.
    pub fn sources(&self, of_role: impl Into<RoleFlags>) -> Result<Sources, SettingsError> {
        let mut flags = self.given();
        flags.extend(of_role.into().0);
        Sources::of_process(self.settings_file.clone(), flags)
    }

    /// The settings of a role from the process' environment, its file, these flags and those of the role.
    ///
    /// # Errors
    /// As [`Settings::load`].
    pub fn settings(&self, role: Role, of_role: impl Into<RoleFlags>) -> Result<Settings, SettingsError> {
        Settings::load(role, &self.sources(of_role)?)
    }
}

/// The flags of one role that were given; `()` for none.
pub struct RoleFlags(Flags);

impl From<()> for RoleFlags {
    fn from((): ()) -> Self {
        Self(Vec::new())
    }
}

impl From<&MinerArgs> for RoleFlags {
    fn from(args: &MinerArgs) -> Self {
        Self(given([
            ("worker-id", &args.worker_id),
            ("devices", &args.devices),
            ("launch-mode", &args.launch_mode),
            ("worker-prefix", &args.worker_prefix),
            ("first-slot", &args.first_slot),
            ("threads", &args.threads),
            ("max-jobs", &args.max_jobs),
            ("timeout-sec", &args.timeout_sec),
            ("torch-cuda-dir", &args.torch_cuda_dir),
        ]))
    }
}

impl From<&ValidatorArgs> for RoleFlags {
    fn from(args: &ValidatorArgs) -> Self {
        Self(given([
            ("worker-id", &args.worker_id),
            ("device", &args.device),
            ("threads", &args.threads),
            ("poll-interval-sec", &args.poll_interval_sec),
            ("torch-cuda-dir", &args.torch_cuda_dir),
        ]))
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;
    use crate::settings::table;

    #[derive(clap::Parser)]
    struct Cli<A: clap::Args> {
        #[command(flatten)]
        common: CommonArgs,
        #[command(flatten)]
        role: A,
    }

    fn flags_of<A: clap::Args>() -> Vec<String> {
        let command = Cli::<A>::command();
        command.get_arguments().filter_map(|argument| argument.get_long().map(str::to_owned)).filter(|flag| flag != "settings").collect()
    }

    #[test]
    fn every_flag_of_the_table_exists_and_every_flag_is_in_the_table() {
        // The orchestrator has no flags of its own.
        let roles = [(Role::Miner, flags_of::<MinerArgs>()), (Role::Validator, flags_of::<ValidatorArgs>())];
        for (role, flags) in roles {
            for flag in &flags {
                assert!(table::by_flag(role, flag).is_some(), "{role}: --{flag} is not in the table");
            }
            for setting in table::SETTINGS.iter().filter(|setting| setting.roles.contains(&role)) {
                if let Some(flag) = setting.flag {
                    assert!(flags.iter().any(|known| known == flag), "{role}: --{flag} is missing");
                }
            }
        }
    }

    #[test]
    fn flags_of_both_groups_reach_the_settings_and_name_themselves_as_origin() {
        let cli = Cli::<MinerArgs>::parse_from(["x", "--netuid", "24", "--hotkey", "h", "--devices", "0,1", "--dry-run"]);
        let mut flags = cli.common.given();
        flags.extend(RoleFlags::from(&cli.role).0);
        let settings = Settings::load(Role::Miner, &Sources { flags, ..Sources::default() }).unwrap();
        assert_eq!(settings.netuid(), Ok(24));
        assert_eq!(settings.miner().devices, crate::settings::Devices::Cuda(vec![0, 1]));
        assert!(settings.dry_run());
        assert_eq!(settings.value("wallet.hotkey").unwrap().origin.to_string(), "flag --hotkey-name");
    }
}
