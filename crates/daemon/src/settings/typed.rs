//! The settings as the daemons use them.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use chain::{Deadlines, FINNEY_ENDPOINTS, FINNEY_GENESIS, TEST_ENDPOINTS, TEST_GENESIS};
use protocol::{AccountId, Digest};
use serde::Deserialize;

use super::table::{self, Role};
use super::value::{self, Devices};
use super::{Settings, SettingsError};
use crate::telemetry::LogFormat;

/// Longest file that describes a local chain.
const LOCAL_FILE_BYTES_MAX: u64 = 64 << 10;

/// Which Bittensor network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NetworkName {
    Finney,
    Test,
    Local,
}

/// A network with what is needed to reach and recognise it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Network {
    pub name: NetworkName,
    /// Hash of block 0.
    pub genesis: [u8; 32],
    pub endpoints: Vec<String>,
}

/// Name of the credential in which systemd hands over the password of an encrypted hotkey (`LoadCredential=`).
const PASSWORD_CREDENTIAL: &str = "hotkey-password";

/// Which key signs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WalletSettings {
    pub path: PathBuf,
    pub name: String,
    pub hotkey: String,
    /// Holds the password of an encrypted hotkey.
    pub password_file: Option<PathBuf>,
}

/// The bucket. Credentials are present for an orchestrator only.
#[derive(Clone, PartialEq, Eq)]
pub struct StoreSettings {
    pub bucket: String,
    pub region: String,
    pub endpoint_url: Option<String>,
    pub path_style: bool,
    pub access_key: Option<String>,
    pub secret_key: Option<String>,
}

impl std::fmt::Debug for StoreSettings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StoreSettings")
            .field("bucket", &self.bucket)
            .field("region", &self.region)
            .field("endpoint_url", &self.endpoint_url)
            .field("anonymous", &self.access_key.is_none())
            .finish_non_exhaustive()
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MinerSettings {
    pub devices: Devices,
    pub worker_id: Option<String>,
    pub worker_prefix: String,
    pub first_slot: u8,
    pub threads: usize,
    pub max_jobs: Option<u64>,
    pub timeout_ms: Option<u64>,
    pub torch_cuda_dir: Option<PathBuf>,
    pub device_memory_gib: Option<u64>,
    pub host_memory_gib: Option<u64>,
}

impl MinerSettings {
    /// Display name of the learner in `slot`: the worker id if there is one learner, the worker id or prefix with the slot
    /// if there are several.
    pub fn worker_name(&self, slot: u8, learners: usize) -> String {
        match &self.worker_id {
            Some(worker_id) if learners <= 1 => worker_id.clone(),
            Some(worker_id) => format!("{worker_id}-{slot}"),
            None => format!("{}-{slot}", self.worker_prefix),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValidatorSettings {
    pub worker_id: String,
    /// `auto`, `cpu` or `cuda:N`.
    pub device: String,
    pub threads: usize,
    pub poll_interval_ms: u64,
    pub weight_mechanism: u8,
    pub weight_refresh_ms: u64,
    pub weight_retry_base_ms: u64,
    pub weight_retry_max_ms: u64,
    pub torch_cuda_dir: Option<PathBuf>,
}

impl Settings {
    /// The text of a key: the effective value, or the default for a key of another role.
    fn text(&self, key: &'static str) -> Option<&str> {
        self.value(key).map(|value| value.text.as_str()).or_else(|| table::by_key(key)?.default)
    }

    fn required(&self, key: &'static str) -> Result<&str, SettingsError> {
        self.text(key).ok_or_else(|| SettingsError::Missing { key, hint: where_to_set(key) })
    }

    // Values were checked against their kind when they were loaded, so the fallbacks below are never taken.
    fn integer(&self, key: &'static str) -> Option<u64> {
        self.text(key)?.parse().ok()
    }

    fn count(&self, key: &'static str) -> usize {
        self.integer(key).map_or(0, |number| number as usize)
    }

    fn milliseconds(&self, key: &'static str) -> Option<u64> {
        value::milliseconds(self.text(key)?).ok()
    }

    fn flag(&self, key: &'static str) -> Option<bool> {
        value::flag(self.text(key)?).ok()
    }

    fn path(&self, key: &'static str) -> Option<PathBuf> {
        Some(value::path(self.text(key)?, self.home.as_deref()))
    }

    /// The network, its genesis and endpoints; reads the local chain's file for network `local`.
    ///
    /// # Errors
    /// `network` is not set, or the file of network `local` is missing or wrong.
    pub fn network(&self) -> Result<Network, SettingsError> {
        let own = self.text("chain.endpoints").map(value::list);
        let listed = |known: &[&str]| own.clone().unwrap_or_else(|| known.iter().map(|url| (*url).to_owned()).collect());
        match self.required("network")? {
            "finney" => Ok(Network { name: NetworkName::Finney, genesis: FINNEY_GENESIS, endpoints: listed(&FINNEY_ENDPOINTS) }),
            "test" => Ok(Network { name: NetworkName::Test, genesis: TEST_GENESIS, endpoints: listed(&TEST_ENDPOINTS) }),
            _ => {
                self.required("chain.local_file")?;
                let (genesis, endpoints) = read_local_chain(&self.path("chain.local_file").unwrap_or_default())?;
                Ok(Network { name: NetworkName::Local, genesis, endpoints: own.unwrap_or(endpoints) })
            }
        }
    }

    /// Without a new finalized block for so long, an endpoint is left for the next one.
    pub fn chain_stall_ms(&self) -> u64 {
        self.milliseconds("chain.stall_sec").unwrap_or(Deadlines::default().stall_ms)
    }

    /// # Errors
    /// `netuid` is not set.
    pub fn netuid(&self) -> Result<u16, SettingsError> {
        self.required("netuid")?;
        Ok(self.integer("netuid").map_or(0, |netuid| netuid as u16))
    }

    /// # Errors
    /// Name of wallet or hotkey is not set.
    pub fn wallet(&self) -> Result<WalletSettings, SettingsError> {
        Ok(WalletSettings {
            path: self.path("wallet.path").unwrap_or_default(),
            name: self.required("wallet.name")?.to_owned(),
            hotkey: self.required("wallet.hotkey")?.to_owned(),
            password_file: self.path("wallet.password_file").or_else(|| {
                let credential = self.credentials.as_ref()?.join(PASSWORD_CREDENTIAL);
                credential.is_file().then_some(credential)
            }),
        })
    }

    /// # Errors
    /// No bucket, an orchestrator with half a pair of credentials, or a miner or validator that is told to have some.
    pub fn store(&self) -> Result<StoreSettings, SettingsError> {
        let endpoint_url = self.text("s3.endpoint_url").map(str::to_owned);
        let anonymous = self.flag("s3.anonymous");
        if self.role() != Role::Orchestrator && anonymous == Some(false) {
            return Err(SettingsError::NotAnonymous { role: self.role() });
        }
        let credential = |key| -> Option<String> {
            let is_ours = self.role() == Role::Orchestrator && anonymous != Some(true);
            is_ours.then(|| self.text(key).map(str::to_owned)).flatten()
        };
        let store = StoreSettings {
            bucket: self.required("s3.bucket")?.to_owned(),
            region: self.required("s3.region")?.to_owned(),
            path_style: match self.text("s3.path_style") {
                Some("yes") => true,
                Some("no") => false,
                _ => endpoint_url.is_some(),
            },
            endpoint_url,
            access_key: credential("s3.access_key"),
            secret_key: credential("s3.secret_key"),
        };
        if self.role() == Role::Orchestrator && anonymous != Some(true) {
            if store.access_key.is_none() {
                return Err(SettingsError::Credentials { missing: "s3.access_key" });
            }
            if store.secret_key.is_none() {
                return Err(SettingsError::Credentials { missing: "s3.secret_key" });
            }
        }
        Ok(store)
    }

    /// # Errors
    /// `owner_identity` is not set.
    pub fn owner_identity(&self) -> Result<AccountId, SettingsError> {
        let text = self.required("owner_identity")?;
        let invalid = |error: protocol::AddressError| SettingsError::Missing { key: "owner_identity", hint: error.to_string() };
        text.parse().map_err(invalid)
    }

    /// The only run that is accepted, if the operator pinned one.
    pub fn run_id(&self) -> Option<&str> {
        self.text("run_id")
    }

    /// The state directory: as set, or `~/.quasar/ROLE`.
    ///
    /// # Errors
    /// It is not set and there is no home directory.
    pub fn state_dir(&self) -> Result<PathBuf, SettingsError> {
        let default = || Some(self.home.as_ref()?.join(".quasar").join(self.role().name()));
        let missing = || SettingsError::Missing { key: "state_dir", hint: where_to_set("state_dir") };
        self.path("state_dir").or_else(default).ok_or_else(missing)
    }

    pub fn dry_run(&self) -> bool {
        self.flag("dry_run").unwrap_or(false)
    }

    /// Address of the health pages, or `None` for no pages.
    pub fn health_listen(&self) -> Option<SocketAddr> {
        value::listen(self.text("health.listen")?).ok().flatten()
    }

    pub fn log_format(&self) -> LogFormat {
        if self.text("log.format") == Some("json") { LogFormat::Json } else { LogFormat::Human }
    }

    pub fn log_filter(&self) -> &str {
        self.text("log.filter").unwrap_or("info")
    }

    pub fn miner(&self) -> MinerSettings {
        MinerSettings {
            devices: self.text("miner.devices").and_then(|text| value::devices(text).ok()).unwrap_or(Devices::Auto),
            worker_id: self.text("miner.worker_id").map(str::to_owned),
            worker_prefix: self.text("miner.worker_prefix").unwrap_or_default().to_owned(),
            first_slot: self.integer("miner.first_slot").map_or(0, |slot| slot as u8),
            threads: self.count("miner.threads"),
            max_jobs: self.integer("miner.max_jobs"),
            timeout_ms: self.milliseconds("miner.timeout_sec"),
            torch_cuda_dir: self.path("torch.cuda_dir"),
            device_memory_gib: self.integer("miner.device_memory_gib"),
            host_memory_gib: self.integer("miner.host_memory_gib"),
        }
    }

    pub fn validator(&self) -> ValidatorSettings {
        ValidatorSettings {
            worker_id: self.text("validator.worker_id").unwrap_or_default().to_owned(),
            device: self.text("validator.device").unwrap_or("auto").to_owned(),
            threads: self.count("validator.threads"),
            poll_interval_ms: self.milliseconds("validator.poll_interval_sec").unwrap_or_default(),
            weight_mechanism: self.integer("weights.mechanism").map_or(0, |mechanism| mechanism as u8),
            weight_refresh_ms: self.milliseconds("weights.refresh_sec").unwrap_or_default(),
            weight_retry_base_ms: self.milliseconds("weights.retry_base_sec").unwrap_or_default(),
            weight_retry_max_ms: self.milliseconds("weights.retry_max_sec").unwrap_or_default(),
            torch_cuda_dir: self.path("torch.cuda_dir"),
        }
    }
}

/// The three places where a setting can be given.
fn where_to_set(key: &'static str) -> String {
    let Some(setting) = table::by_key(key) else { return format!("set `{key}`") };
    let mut places: Vec<String> = Vec::new();
    places.extend(setting.flag.map(|flag| format!("--{flag}")));
    places.extend(setting.env.first().map(|name| (*name).to_owned()));
    places.push(format!("`{key}` in the configuration file"));
    format!("set {}: {}", places.join(" or "), setting.help)
}

/// Content of a local chain's file; other fields are the devnet's own business.
#[derive(Deserialize)]
struct LocalChain {
    genesis: String,
    #[serde(default)]
    endpoint: Option<String>,
    #[serde(default)]
    endpoints: Vec<String>,
}

fn read_local_chain(path: &Path) -> Result<([u8; 32], Vec<String>), SettingsError> {
    let wrong = |reason: String| SettingsError::LocalChain { path: path.to_owned(), reason };
    let length = std::fs::metadata(path).map_err(|error| wrong(error.to_string()))?.len();
    if length > LOCAL_FILE_BYTES_MAX {
        return Err(wrong(format!("it is longer than {LOCAL_FILE_BYTES_MAX} bytes")));
    }
    let text = std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
    let chain: LocalChain = serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
    let genesis: Digest = chain.genesis.parse().map_err(|_| wrong("`genesis` is not 32 bytes of hexadecimal".to_owned()))?;
    let endpoints: Vec<String> = chain.endpoint.into_iter().chain(chain.endpoints).collect();
    if endpoints.is_empty() {
        return Err(wrong("`endpoint` is missing".to_owned()));
    }
    Ok((genesis.0, endpoints))
}
