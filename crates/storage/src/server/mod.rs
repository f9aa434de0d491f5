//! A small S3 server for one bucket, in memory or on disk: the store of tests and of the devnet.
//!
//! The protocol side (signature version 4 in headers and in presigned URLs, expiry, signed headers, ranges, XML) is the crate `s3s`; the
//! promises are ours: checksums are verified before anything becomes visible, conditional writes have exactly one winner, the world
//! reads only under the configured prefixes, and an anonymous reader gets 403 for what is missing, as on AWS.
//! [`Faults`] make it misbehave on purpose.

mod access;
mod faults;
mod objects;
mod serve;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

pub use faults::Faults;

use crate::blobs::{BlobError, Blobs, DiskBlobs, MemoryBlobs};
use faults::FaultState;

/// Largest object that the server takes, in bytes; S3's own limit for one PUT.
pub const MAX_OBJECT_BYTES: u64 = 5 << 30;

/// Where the objects are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backend {
    Memory,
    /// A folder of the server's own; objects are plain files below `objects/`.
    Disk(PathBuf),
}

#[derive(Clone)]
pub struct ServerSettings {
    pub backend: Backend,
    /// The only bucket there is.
    pub bucket: String,
    pub access_key: String,
    pub secret_key: String,
    /// Anybody may read objects whose key starts with one of these.
    pub public_prefixes: Vec<String>,
    /// Port 0 picks a free one.
    pub listen: SocketAddr,
}

#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error("the object server cannot listen on {address}: {source}\nhint: another process may use the port")]
    Listen { address: SocketAddr, source: std::io::Error },
    #[error(transparent)]
    Storage(#[from] BlobError),
}

/// A running server. Dropping it stops accepting and ends its connections.
pub struct S3Server {
    address: SocketAddr,
    faults: Arc<FaultState>,
    stop: watch::Sender<bool>,
    accepting: JoinHandle<()>,
}

impl S3Server {
    /// Opens the storage, binds the address and serves until stopped.
    pub async fn start(settings: ServerSettings) -> Result<Self, ServerError> {
        let blobs: Arc<dyn Blobs> = match settings.backend {
            Backend::Memory => Arc::new(MemoryBlobs::default()),
            Backend::Disk(folder) => {
                let opened = tokio::task::spawn_blocking(move || DiskBlobs::open(&folder)).await;
                Arc::new(opened.unwrap_or_else(|error| Err(BlobError::Io(std::io::Error::other(error))))?)
            }
        };
        let listen_error = |source| ServerError::Listen { address: settings.listen, source };
        let listener = TcpListener::bind(settings.listen).await.map_err(listen_error)?;
        let address = listener.local_addr().map_err(listen_error)?;

        let faults = Arc::new(FaultState::default());
        let bucket: Arc<str> = settings.bucket.into();
        let mut builder = S3ServiceBuilder::new(objects::Objects::new(bucket.clone(), blobs, faults.clone()));
        builder.set_auth(SimpleAuth::from_single(settings.access_key, settings.secret_key));
        builder.set_access(access::PublicPrefixes { bucket, prefixes: settings.public_prefixes });
        let (stop, stopped) = watch::channel(false);
        let accepting = tokio::spawn(serve::accept(listener, builder.build(), faults.clone(), stopped));
        Ok(Self { address, faults, stop, accepting })
    }

    /// `http://address:port`.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Misbehave from now on as told; `Faults::default()` behaves again.
    pub fn set_faults(&self, faults: Faults) {
        self.faults.set(faults);
    }

    /// Stops accepting, lets running requests end, and returns when the port is free and the storage closed.
    pub async fn stop(self) {
        let _ = self.stop.send(true);
        let mut accepting = self;
        let _ = (&mut accepting.accepting).await;
    }
}

impl Drop for S3Server {
    fn drop(&mut self) {
        let _ = self.stop.send(true);
    }
}
