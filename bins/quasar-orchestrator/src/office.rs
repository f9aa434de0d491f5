//! What every command of the operator needs: the bucket with credentials, the online key, the network.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use chain::Hotkey;
use daemon::settings::{CommonArgs, Settings};
use daemon::{Failure, Role, clock, identity};
use protocol::documents::CurrentRun;
use protocol::envelope::{self, Context, Document, Expect, RunId, open_stored};
use protocol::paths::Keys;
use protocol::{AccountId, Digest, FileRecord, KeyRef, Signer};
use storage::presign::BucketUrl;
use storage::roots::Roots;
use storage::{ObjectStore, PutCondition, S3Settings, S3Store, StoreError, transfer};

/// The operator's place: settings, bucket, signing key.
pub struct Office {
    pub settings: Settings,
    pub store: Arc<dyn ObjectStore>,
    pub signer: Arc<Hotkey>,
    pub context: Context,
    pub keys: Keys,
    /// `host[:port]` that grants of this bucket point to.
    pub store_host: String,
}

impl Office {
    /// Loads everything and connects to nothing yet. The genesis is that of the network's settings.
    pub fn open(common: &CommonArgs) -> Result<Self, Failure> {
        let settings = common.settings(Role::Orchestrator, ())?;
        daemon::telemetry::init(settings.log_format(), settings.log_filter()).map_err(Failure::configuration)?;
        for notice in &settings.notices {
            tracing::warn!("{notice}");
        }
        let network = settings.network()?;
        let netuid = settings.netuid()?;
        let signer = identity::hotkey(&settings)?;
        let store = settings.store()?;
        let url = BucketUrl::new(store.endpoint_url.as_deref(), &store.region, &store.bucket, store.path_style)
            .map_err(Failure::configuration)?;
        let s3 = S3Store::new(S3Settings {
            endpoint: store.endpoint_url,
            region: store.region,
            bucket: store.bucket,
            access_key: store.access_key,
            secret_key: store.secret_key,
            path_style: store.path_style,
        })
        .map_err(Failure::configuration)?;
        let context = Context { genesis: network.genesis, netuid, run: RunId::NONE };
        Ok(Self { settings, store: Arc::new(s3), signer: Arc::new(signer), context, keys: Keys::new(netuid), store_host: url.host() })
    }

    pub fn key(&self) -> KeyRef {
        Signer::key(&*self.signer)
    }

    /// Roots of the owner that the settings name, none of which was read yet.
    pub fn roots(&self) -> Result<Roots, Failure> {
        Ok(self.roots_of(self.settings.owner_identity()?))
    }

    pub fn roots_of(&self, owner: AccountId) -> Roots {
        Roots::unremembered(self.context.genesis, self.context.netuid, owner)
    }

    pub fn state_dir(&self) -> Result<PathBuf, Failure> {
        let folder = self.settings.state_dir()?;
        std::fs::create_dir_all(&folder)
            .map_err(|error| Failure::configuration(anyhow::anyhow!("{} cannot be created: {error}", folder.display())))?;
        Ok(folder)
    }

    /// Signs with the time as sequence, which is above everything signed before.
    pub fn sign<D: Document>(&self, document: &D, context: &Context) -> Vec<u8> {
        let now_ms = clock::now_ms();
        envelope::sign(document, context, &*self.signer, now_ms, now_ms)
    }

    /// Writes a write-once document; the same key again is an error that says so.
    pub async fn put_once<D: Document>(&self, key: &str, document: &D, context: &Context) -> Result<Vec<u8>, Failure> {
        let bytes = self.sign(document, context);
        self.put_bytes_once(key, Bytes::from(bytes.clone())).await?;
        Ok(bytes)
    }

    pub async fn put_bytes_once(&self, key: &str, bytes: Bytes) -> Result<(), Failure> {
        match self.store.put(key, bytes, PutCondition::IfAbsent).await {
            Ok(_) => Ok(()),
            Err(StoreError::PreconditionFailed { key }) => {
                Err(Failure::configuration(anyhow::anyhow!("{key} is there already and is never changed"))
                    .hint("this step was done before; go on with the next one, or choose another name"))
            }
            Err(error) => Err(unserved(error)),
        }
    }

    /// Uploads a file whose key is written once, or finds it there; `hint` is what to do where another file lies there.
    pub async fn upload_once(&self, key: &str, file: &FileRecord, path: &Path, hint: &str) -> Result<(), Failure> {
        match transfer::upload(&*self.store, key, file, path).await {
            Err(error @ StoreError::PreconditionFailed { .. }) => Err(Failure::configuration(error).hint(hint)),
            result => result.map_err(unserved),
        }
    }

    /// Reads a document that one of `signers` stored and that has to be there.
    pub async fn read<D: Document>(&self, key: &str, context: &Context, signers: &[KeyRef]) -> Result<D, Failure> {
        self.read_file(key, context, signers).await.map(|(document, _)| document)
    }

    /// [`Office::read`] with the BLAKE3 of the file, by which others name it.
    pub async fn read_file<D: Document>(&self, key: &str, context: &Context, signers: &[KeyRef]) -> Result<(D, Digest), Failure> {
        let object = match self.store.get(key, D::PURPOSE.file_limit()).await {
            Err(error @ StoreError::NotFound { .. }) => {
                let hint = "other objects build on it: restore it from a backup or from an earlier version of the object";
                return Err(Failure::configuration(error).hint(hint));
            }
            result => result.map_err(unserved)?,
        };
        let verified = open_stored(&object.bytes, context, Expect::Any(signers));
        let document = verified.map_err(|error| Failure::configuration(error).context(key.to_owned()))?.document;
        Ok((document, Digest::blake3(&object.bytes)))
    }

    /// Writes `current.qsr` anew: it expires after ten minutes, and is renewed by the running orchestrator.
    pub async fn publish_current(&self, current: &CurrentRun) -> Result<(), StoreError> {
        let bytes = self.sign(current, &self.context);
        self.store.put(&self.keys.current(), Bytes::from(bytes), PutCondition::Always).await.map(drop)
    }
}

/// What a store that did not do as asked means for a command: whether it may do so later, or a person has to change something first.
pub fn unserved(error: StoreError) -> Failure {
    if error.is_retryable() { Failure::unavailable(error) } else { Failure::configuration(error) }
}
