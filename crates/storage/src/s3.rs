//! [`ObjectStore`] over any S3 endpoint.
//!
//! Traps of the SDK that shape this file: its default retries would hide whether a conditional write was tried before; its default checksums
//! are CRCs in a trailer, where the protocol wants SHA-256; its `rustls` feature drags in a second TLS stack.

use std::path::Path;
use std::time::Duration;

use async_trait::async_trait;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    BehaviorVersion, Credentials, Region, RequestChecksumCalculation, ResponseChecksumValidation, StalledStreamProtectionConfig,
};
use aws_sdk_s3::error::{DisplayErrorContext, ProvideErrorMetadata, SdkError};
use aws_sdk_s3::primitives::{ByteStream, SdkBody};
use aws_smithy_http_client::Builder;
use aws_smithy_http_client::tls::Provider;
use aws_smithy_http_client::tls::rustls_provider::CryptoMode;
use bytes::{Bytes, BytesMut};
use hyper::body::Body;
use protocol::{Digest, FileRecord, GrantRequest};

use crate::presign::{self, BucketUrl, base64_of};
use crate::upload::{Parts, Progress, Watched};
use crate::{Object, ObjectMeta, ObjectStore, Presign, PutCondition, StoreError, key, policy};

/// Most objects that one listing returns; a prefix with more is a mistake.
pub const MAX_LISTED: usize = 1_000_000;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Most bytes of one PUT, by S3.
const MAX_PUT_BYTES: u64 = 5 << 30;

/// Where the bucket is and how to get in.
#[derive(Clone)]
pub struct S3Settings {
    /// `https://host[:port]`; `None` for AWS itself.
    pub endpoint: Option<String>,
    pub region: String,
    pub bucket: String,
    /// Both or neither; without them requests go unsigned (anonymous mode) and nothing can be presigned.
    pub access_key: Option<String>,
    pub secret_key: Option<String>,
    /// `endpoint/bucket/key` instead of `bucket.endpoint/key`; most stores that are not AWS need it.
    pub path_style: bool,
}

impl std::fmt::Debug for S3Settings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("S3Settings")
            .field("endpoint", &self.endpoint)
            .field("region", &self.region)
            .field("bucket", &self.bucket)
            .field("anonymous", &self.access_key.is_none())
            .field("path_style", &self.path_style)
            .finish_non_exhaustive()
    }
}

/// What a request wanted; the same status means different things.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    Read,
    List,
    Write,
}

/// One bucket of an S3 store.
pub struct S3Store {
    client: Client,
    settings: S3Settings,
    url: BucketUrl,
    credentials: Option<Credentials>,
    /// Longest time in which nothing of an upload moves.
    pub(crate) silence: Duration,
}

impl S3Store {
    /// Checks the settings; does no input or output.
    pub fn new(settings: S3Settings) -> Result<Self, StoreError> {
        let url = BucketUrl::new(settings.endpoint.as_deref(), &settings.region, &settings.bucket, settings.path_style)?;
        let credentials = match (&settings.access_key, &settings.secret_key) {
            (Some(access), Some(secret)) => Some(Credentials::new(access, secret, None, None, "settings")),
            (None, None) => None,
            _ => {
                return Err(StoreError::invalid(
                    "",
                    "only one half of the credentials is given\nhint: set both the access key and the secret key, or neither for anonymous access",
                ));
            }
        };
        let mut config = aws_sdk_s3::Config::builder()
            .behavior_version(BehaviorVersion::v2026_01_12())
            .http_client(
                Builder::new().tls_provider(Provider::Rustls(CryptoMode::Ring)).pool_idle_timeout(policy::IDLE_CONNECTION).build_https(),
            )
            .region(Region::new(settings.region.clone()))
            .force_path_style(settings.path_style)
            .retry_config(RetryConfig::disabled())
            .timeout_config(TimeoutConfig::builder().connect_timeout(policy::CONNECT_TIMEOUT).build())
            .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
            .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
            .response_checksum_validation(ResponseChecksumValidation::WhenRequired);
        if let Some(endpoint) = &settings.endpoint {
            config = config.endpoint_url(endpoint);
        }
        config = match &credentials {
            Some(credentials) => config.credentials_provider(credentials.clone()),
            None => config.allow_no_auth(),
        };
        Ok(Self { client: Client::from_conf(config.build()), settings, url, credentials, silence: policy::UPLOAD_SILENCE })
    }

    /// Where this bucket's objects live on the web; its host belongs into the run root's list of allowed hosts.
    pub fn url(&self) -> &BucketUrl {
        &self.url
    }

    /// Whether requests go unsigned.
    pub fn is_anonymous(&self) -> bool {
        self.credentials.is_none()
    }

    /// Creates the bucket, if it is not there, and lets the whole world read below `prefix` (which ends in `/`) and nowhere else.
    ///
    /// # Errors
    /// The store refuses one of both, or does not answer.
    pub async fn make_public_bucket(&self, prefix: &str) -> Result<(), StoreError> {
        let bucket = &self.settings.bucket;
        let created = answered("", self.client.create_bucket().bucket(bucket).send()).await?;
        if let Err(error) = created
            // 409: it is there already, ours or somebody else's; in the second case the policy is refused.
            && error.raw_response().is_none_or(|response| response.status().as_u16() != 409)
        {
            return Err(self.sort("", Access::Write, error));
        }
        let policy = format!(
            r#"{{"Version":"2012-10-17","Statement":[{{"Effect":"Allow","Principal":"*","Action":["s3:GetObject"],"Resource":["arn:aws:s3:::{bucket}/{prefix}*"]}}]}}"#
        );
        let set = answered("", self.client.put_bucket_policy().bucket(bucket).policy(policy).send()).await?;
        set.map(drop).map_err(|error| self.sort("", Access::Write, error))
    }

    /// Sorts an SDK error by HTTP status; the status is the only part on which stores agree.
    fn sort<E>(&self, key: &str, access: Access, error: SdkError<E>) -> StoreError
    where
        E: std::error::Error + ProvideErrorMetadata + Send + Sync + 'static,
    {
        let owned = key.to_owned();
        let Some(status) = error.raw_response().map(|response| response.status().as_u16()) else {
            let reason = match &error {
                SdkError::TimeoutError(_) => "timed out".to_owned(),
                SdkError::DispatchFailure(_) => "the connection failed".to_owned(),
                SdkError::ConstructionFailure(_) => return StoreError::invalid(key, "the request could not be built"),
                _ => "no usable answer".to_owned(),
            };
            return StoreError::unavailable(key, reason);
        };
        match status {
            404 if error.code() == Some("NoSuchBucket") => {
                let bucket = &self.settings.bucket;
                StoreError::invalid(
                    key,
                    format!("there is no bucket `{bucket}` at this store\nhint: check the bucket's name, the endpoint and the region"),
                )
            }
            404 => StoreError::NotFound { key: owned },
            // Without permission to list, AWS answers 403 for a missing object.
            403 if self.is_anonymous() && access == Access::Read => StoreError::NotFound { key: owned },
            401 | 403 => StoreError::Denied { key: owned },
            412 => StoreError::PreconditionFailed { key: owned },
            416 => StoreError::invalid(key, "the range lies outside of the object"),
            // 409: a conflicting write is under way; trying again gets a definite answer.
            501 => StoreError::invalid(key, "the store does not implement this request"),
            408 | 409 | 429 | 500..=599 => StoreError::unavailable(key, format!("HTTP status {status}")),
            400 if error.raw_response().and_then(|raw| raw.body().bytes()).is_some_and(policy::is_slow_upload) => {
                StoreError::unavailable(key, "the store waited too long for the next bytes")
            }
            200..=299 => StoreError::unavailable(key, "the answer could not be read"),
            _ => {
                let detail: String = DisplayErrorContext(&error).to_string().chars().take(200).collect();
                StoreError::invalid(key, format!("HTTP status {status} ({detail})"))
            }
        }
    }

    async fn get_once(&self, key: &str, etag: Option<&str>, limit: u64) -> Result<Option<Object>, StoreError> {
        let sent = self.client.get_object().bucket(&self.settings.bucket).key(key).set_if_none_match(etag.map(str::to_owned)).send();
        let answer = match answered(key, sent).await? {
            Ok(answer) => answer,
            Err(error) if error.raw_response().is_some_and(|raw| raw.status().as_u16() == 304) => return Ok(None),
            Err(error) => return Err(self.sort(key, Access::Read, error)),
        };
        let length = answer.content_length().and_then(|length| u64::try_from(length).ok());
        let etag = answer.e_tag().map(str::to_owned);
        let bytes = within(key, length.unwrap_or(limit).min(limit), collect(key, answer.body, length, limit)).await??;
        Ok(Some(Object { bytes, etag }))
    }

    async fn put_once(
        &self,
        key: &str,
        body: impl Body<Data = Bytes, Error: Into<BoxError>> + Send + Sync + 'static,
        length: u64,
        sha256: &Digest,
        condition: &PutCondition,
    ) -> Result<String, StoreError> {
        let progress = Progress::new();
        let body = SdkBody::from_body_1_x(Watched { body: Box::pin(body), progress: progress.clone() });
        let mut request = self
            .client
            .put_object()
            .bucket(&self.settings.bucket)
            .key(key)
            .content_length(length as i64)
            .checksum_sha256(base64_of(sha256))
            .body(ByteStream::new(body));
        match condition {
            PutCondition::Always => {}
            PutCondition::IfAbsent => request = request.if_none_match("*"),
            PutCondition::IfMatch(etag) => request = request.if_match(etag),
        }
        // The checksum header is signed, so hashing the payload again for the signature would add nothing.
        let sent = request.customize().disable_payload_signing().send();
        let watched = progress.watch(self.silence, within(key, length, sent)).await;
        match watched.unwrap_or_else(|| Err(StoreError::unavailable(key, "nothing moved any more")))? {
            Ok(answer) => Ok(answer.e_tag().unwrap_or_default().to_owned()),
            Err(error) => Err(match (self.sort(key, Access::Write, error), condition) {
                // If-Match on a key that is gone: some stores say 404.
                (StoreError::NotFound { key }, PutCondition::IfMatch(_)) => StoreError::PreconditionFailed { key },
                (sorted, _) => sorted,
            }),
        }
    }
}

#[async_trait]
impl ObjectStore for S3Store {
    async fn get_if_changed(&self, key: &str, etag: Option<&str>, limit: u64) -> Result<Option<Object>, StoreError> {
        key::check(key)?;
        policy::retry(StoreError::is_retryable, |_| self.get_once(key, etag, limit)).await
    }

    async fn get_range(&self, key: &str, start: u64, end: u64) -> Result<Bytes, StoreError> {
        key::check(key)?;
        if start >= end {
            return if start == end { Ok(Bytes::new()) } else { Err(StoreError::invalid(key, "the range ends before it starts")) };
        }
        let range = format!("bytes={start}-{}", end - 1);
        policy::retry(StoreError::is_retryable, |_| async {
            let sent = self.client.get_object().bucket(&self.settings.bucket).key(key).range(&range).send();
            let answer = answered(key, sent).await?.map_err(|error| self.sort(key, Access::Read, error))?;
            let bytes = within(key, end - start, collect(key, answer.body, None, end - start)).await??;
            if bytes.len() as u64 != end - start {
                return Err(StoreError::invalid(key, format!("the object ends before byte {end}")));
            }
            Ok(bytes)
        })
        .await
    }

    async fn head(&self, key: &str) -> Result<ObjectMeta, StoreError> {
        key::check(key)?;
        policy::retry(StoreError::is_retryable, |_| async {
            let sent = self.client.head_object().bucket(&self.settings.bucket).key(key).send();
            let answer = answered(key, sent).await?.map_err(|error| self.sort(key, Access::Read, error))?;
            Ok(ObjectMeta {
                key: key.to_owned(),
                length: answer.content_length().and_then(|length| u64::try_from(length).ok()).unwrap_or(0),
                etag: answer.e_tag().map(str::to_owned),
            })
        })
        .await
    }

    async fn put(&self, key: &str, bytes: Bytes, condition: PutCondition) -> Result<String, StoreError> {
        key::check(key)?;
        let sha256 = Digest::sha256(&bytes);
        let (bytes, sha256, condition) = (&bytes, &sha256, &condition);
        policy::retry(StoreError::is_retryable, |attempt| async move {
            let result = self.put_once(key, Parts(bytes.clone()), bytes.len() as u64, sha256, condition).await;
            if attempt > 1 && matches!(result, Err(StoreError::PreconditionFailed { .. })) {
                // An earlier attempt may have succeeded without its answer reaching us: our own bytes in place are a success.
                if let Ok(Some(object)) = self.get_once(key, None, bytes.len() as u64).await
                    && object.bytes == *bytes
                {
                    return Ok(object.etag.unwrap_or_default());
                }
            }
            result
        })
        .await
    }

    async fn put_file(&self, key: &str, path: &Path, file: &FileRecord) -> Result<(), StoreError> {
        key::check(key)?;
        if file.length > MAX_PUT_BYTES {
            return Err(StoreError::invalid(
                key,
                format!("{} bytes are more than the 5 GiB of one request\nhint: cut the checkpoint into smaller files", file.length),
            ));
        }
        policy::retry(StoreError::is_retryable, |_| async {
            let body = ByteStream::from_path(path).await;
            let body = body.map_err(|error| StoreError::invalid(key, format!("{}: {error}", path.display())))?;
            self.put_once(key, body.into_inner(), file.length, &file.sha256, &PutCondition::IfAbsent).await
        })
        .await
        .map(drop)
    }

    async fn list(&self, prefix: &str) -> Result<Vec<ObjectMeta>, StoreError> {
        if !key::is_valid_prefix(prefix) {
            key::check(prefix)?;
        }
        let mut objects = Vec::new();
        let mut token: Option<String> = None;
        loop {
            let page = policy::retry(StoreError::is_retryable, |_| async {
                let request = self.client.list_objects_v2().bucket(&self.settings.bucket).prefix(prefix);
                answered(prefix, request.set_continuation_token(token.clone()).send())
                    .await?
                    .map_err(|error| self.sort(prefix, Access::List, error))
            })
            .await?;
            for object in page.contents() {
                let Some(key) = object.key() else { continue };
                let length = object.size().and_then(|size| u64::try_from(size).ok()).unwrap_or(0);
                objects.push(ObjectMeta { key: key.to_owned(), length, etag: object.e_tag().map(str::to_owned) });
            }
            if objects.len() > MAX_LISTED {
                return Err(StoreError::TooLarge { key: prefix.to_owned(), limit: MAX_LISTED as u64 });
            }
            let next = page.next_continuation_token().map(str::to_owned);
            if next.is_none() || next == token {
                break;
            }
            token = next;
        }
        objects.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(objects)
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        key::check(key)?;
        policy::retry(StoreError::is_retryable, |_| async {
            let sent = self.client.delete_object().bucket(&self.settings.bucket).key(key).send();
            match answered(key, sent).await?.map_err(|error| self.sort(key, Access::Write, error)) {
                Ok(_) | Err(StoreError::NotFound { .. }) => Ok(()),
                Err(error) => Err(error),
            }
        })
        .await
    }

    fn presign(&self, request: &Presign) -> Result<GrantRequest, StoreError> {
        let Some(credentials) = &self.credentials else {
            return Err(StoreError::invalid(request.key(), "an anonymous store cannot sign requests"));
        };
        presign::presign(&self.url, &self.settings.region, credentials, request)
    }
}

/// The answer to a request without a body.
async fn answered<T>(key: &str, sent: impl Future<Output = T>) -> Result<T, StoreError> {
    tokio::time::timeout(policy::READ_TIMEOUT, sent).await.map_err(|_| StoreError::unavailable(key, "timed out"))
}

/// `future`, but at most as long as moving `bytes` may take.
async fn within<T>(key: &str, bytes: u64, future: impl Future<Output = T>) -> Result<T, StoreError> {
    tokio::time::timeout(policy::attempt_timeout(bytes), future).await.map_err(|_| StoreError::unavailable(key, "timed out"))
}

/// Reads a body of at most `limit` bytes, `length` of them if the store told.
async fn collect(key: &str, mut body: ByteStream, length: Option<u64>, limit: u64) -> Result<Bytes, StoreError> {
    let too_large = || StoreError::TooLarge { key: key.to_owned(), limit };
    if length.is_some_and(|length| length > limit) {
        return Err(too_large());
    }
    let mut first: Option<Bytes> = None;
    let mut rest = BytesMut::new();
    let mut read = 0u64;
    while let Some(part) = answered(key, body.next()).await? {
        let part = part.map_err(|_| StoreError::unavailable(key, "the connection broke while reading"))?;
        read += part.len() as u64;
        if read > limit {
            return Err(too_large());
        }
        match (&mut first, rest.is_empty()) {
            (None, true) => first = Some(part),
            (start, _) => {
                if let Some(start) = start.take() {
                    rest.reserve(length.unwrap_or(0).max(read) as usize);
                    rest.extend_from_slice(&start);
                }
                rest.extend_from_slice(&part);
            }
        }
    }
    if length.is_some_and(|length| length != read) {
        return Err(StoreError::unavailable(key, "the body was cut short"));
    }
    Ok(first.unwrap_or_else(|| rest.freeze()))
}
