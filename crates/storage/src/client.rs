//! The store as everybody without its credentials sees it: presigned requests and public objects.
//!
//! A grant names a URL, and a URL is an order to talk to somebody. So: only hosts that the run root names, https (http for this machine
//! itself), no redirects, no credentials in URLs, and the URL's path must end in the key that the grant claims. URLs are secrets: no error,
//! log line or `Debug` output of this module contains one.

use std::net::IpAddr;
use std::sync::Once;
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use protocol::{GrantRequest, Method};
use reqwest::{Client, RequestBuilder, Response, Url, header, redirect};

use crate::upload::{Parts, Progress, Watched};
use crate::{Object, StoreError, key, policy};

/// What became of a presigned PUT that reached the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PutOutcome {
    Stored,
    /// The key is write-once and was written before (412). After a retry it may have been us.
    AlreadyThere,
    /// The signature is no longer valid, or never was (403): ask for a new grant.
    Expired,
    /// The store refused for good, for instance because the bytes do not have the signed digest.
    Refused {
        status: u16,
    },
}

/// A grant that could not be redeemed. Messages name keys, never URLs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GrantError {
    #[error(
        "the grant for `{key}` has expired\nhint: a new one comes with the next grant bundle; check this machine's clock if it does not"
    )]
    Expired { key: String },
    #[error("there is no object `{key}`")]
    Absent { key: String },
    #[error("`{key}` is larger than the {limit} bytes allowed here")]
    TooLarge { key: String, limit: u64 },
    #[error("the store refused the request for `{key}` with HTTP status {status}")]
    Refused { key: String, status: u16 },
    #[error("the store did not serve `{key}`: {reason}\nhint: this is retried; if it persists check the network")]
    Unavailable { key: String, reason: &'static str },
    /// The grant breaks a rule of this client; no request was sent.
    #[error("the grant for `{key}` is not followed: {reason}\nhint: the run root names the allowed hosts; compare with `inspect` of it")]
    Forbidden { key: String, reason: &'static str },
}

impl GrantError {
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Unavailable { .. })
    }
}

/// Redeems grants: over HTTP, or against a store in memory.
#[async_trait]
pub trait GrantAccess: Send + Sync + 'static {
    /// Reads an object, or its bytes `[start, end)`, of at most `limit` bytes.
    async fn get(&self, grant: &GrantRequest, range: Option<(u64, u64)>, limit: u64) -> Result<Bytes, GrantError>;

    async fn put(&self, grant: &GrantRequest, bytes: Bytes) -> Result<PutOutcome, GrantError>;
}

/// Redeems grants over HTTP. Cheap to clone; clones share connections.
#[derive(Clone)]
pub struct GrantClient {
    client: Client,
    /// Without a time-out between the start of a request and its answer.
    uploads: Client,
    /// Longest time in which nothing of an upload moves.
    pub(crate) silence: Duration,
    /// `host` or `host:port`, lower case.
    allowed_hosts: Vec<String>,
}

impl GrantClient {
    /// `allowed_hosts` as the run root lists them: `host` for the scheme's usual port, or `host:port`.
    pub fn new(allowed_hosts: Vec<String>) -> Result<Self, GrantError> {
        let broken = || GrantError::Forbidden { key: String::new(), reason: "the HTTP client cannot be set up" };
        let client = http_client(Some(policy::READ_TIMEOUT)).ok_or_else(broken)?;
        let uploads = http_client(None).ok_or_else(broken)?;
        let allowed_hosts = allowed_hosts.iter().map(|host| host.to_ascii_lowercase()).collect();
        Ok(Self { client, uploads, silence: policy::UPLOAD_SILENCE, allowed_hosts })
    }

    /// The grant's URL, if it may be followed.
    fn admit(&self, grant: &GrantRequest, method: Method) -> Result<Url, GrantError> {
        let forbidden = |reason| GrantError::Forbidden { key: grant.key.clone(), reason };
        if grant.method != method {
            return Err(forbidden("it is for the other method"));
        }
        if !key::is_valid(&grant.key) {
            return Err(GrantError::Forbidden { key: "?".to_owned(), reason: "its key is malformed" });
        }
        let url = Url::parse(&grant.url).map_err(|_| forbidden("its URL is malformed"))?;
        let host = url.host_str().ok_or_else(|| forbidden("its URL names no host"))?.to_ascii_lowercase();
        match url.scheme() {
            "https" => {}
            "http" if is_this_machine(&host) => {}
            _ => return Err(forbidden("its URL is neither https nor on this machine")),
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(forbidden("its URL carries a user name"));
        }
        let with_port = format!("{host}:{}", url.port_or_known_default().unwrap_or(0));
        if !self.allowed_hosts.iter().any(|allowed| *allowed == with_port || (url.port().is_none() && *allowed == host)) {
            return Err(forbidden("its host is not one that the run allows"));
        }
        let path = url.path().replace("%3D", "=").replace("%3d", "=");
        if !path.strip_suffix(grant.key.as_str()).is_some_and(|before| before.ends_with('/')) {
            return Err(forbidden("its URL is for another key"));
        }
        Ok(url)
    }

    async fn get_once(&self, url: &Url, grant: &GrantRequest, range: Option<(u64, u64)>, limit: u64) -> Result<Bytes, GrantError> {
        let key = &grant.key;
        let mut request = with_signed_headers(self.client.get(url.clone()), grant);
        if let Some((start, end)) = range {
            request = request.header(header::RANGE, format!("bytes={start}-{}", end - 1));
        }
        let response = send(request).await.map_err(|reason| GrantError::Unavailable { key: key.clone(), reason })?;
        match (response.status().as_u16(), range) {
            (200, None) | (206, Some(_)) => {}
            (403, _) => return Err(GrantError::Expired { key: key.clone() }),
            (404, _) => return Err(GrantError::Absent { key: key.clone() }),
            (status, _) if is_transient(status) => return Err(GrantError::Unavailable { key: key.clone(), reason: "server error" }),
            (status, _) => return Err(GrantError::Refused { key: key.clone(), status }),
        }
        let bytes = read_body(response, limit).await.map_err(|error| match error {
            BodyError::TooLarge => GrantError::TooLarge { key: key.clone(), limit },
            BodyError::Broken => GrantError::Unavailable { key: key.clone(), reason: "the connection broke while reading" },
        })?;
        match range {
            Some((start, end)) if bytes.len() as u64 != end - start => Err(GrantError::Refused { key: key.clone(), status: 416 }),
            _ => Ok(bytes),
        }
    }

    async fn put_once(&self, url: &Url, grant: &GrantRequest, bytes: Bytes) -> Result<PutOutcome, GrantError> {
        let length = bytes.len() as u64;
        let unavailable = |reason| GrantError::Unavailable { key: grant.key.clone(), reason };
        let progress = Progress::new();
        let body = Watched { body: Box::pin(Parts(bytes)), progress: progress.clone() };
        let request = with_signed_headers(self.uploads.put(url.clone()), grant)
            .timeout(policy::attempt_timeout(length))
            .header(header::CONTENT_LENGTH, length)
            .body(reqwest::Body::wrap(body));
        let sent = async {
            let response = send(request).await.map_err(unavailable)?;
            let status = response.status().as_u16();
            // Reading the short answer to its end lets the connection be used again.
            Ok((status, read_body(response, policy::LONGEST_ANSWER).await.unwrap_or_default()))
        };
        let (status, answer) = progress.watch(self.silence, sent).await.unwrap_or(Err(unavailable("nothing moved any more")))?;
        match status {
            200..=299 => Ok(PutOutcome::Stored),
            412 => Ok(PutOutcome::AlreadyThere),
            403 => Ok(PutOutcome::Expired),
            // A conflicting write is under way: ask again, the answer will be definite.
            409 => Err(unavailable("a conflicting write is under way")),
            400 if policy::is_slow_upload(&answer) => Err(unavailable("the store waited too long for the next bytes")),
            status if is_transient(status) => Err(unavailable("server error")),
            status => Ok(PutOutcome::Refused { status }),
        }
    }
}

#[async_trait]
impl GrantAccess for GrantClient {
    async fn get(&self, grant: &GrantRequest, range: Option<(u64, u64)>, limit: u64) -> Result<Bytes, GrantError> {
        let url = self.admit(grant, Method::Get)?;
        match range {
            Some((start, end)) if start == end => return Ok(Bytes::new()),
            Some((start, end)) if start > end => {
                return Err(GrantError::Forbidden { key: grant.key.clone(), reason: "the range ends before it starts" });
            }
            Some((start, end)) if end - start > limit => return Err(GrantError::TooLarge { key: grant.key.clone(), limit }),
            _ => {}
        }
        policy::retry(GrantError::is_retryable, |_| self.get_once(&url, grant, range, limit)).await
    }

    async fn put(&self, grant: &GrantRequest, bytes: Bytes) -> Result<PutOutcome, GrantError> {
        let url = self.admit(grant, Method::Put)?;
        if grant.length.is_some_and(|length| length != bytes.len() as u64) {
            return Err(GrantError::Forbidden { key: grant.key.clone(), reason: "it is for another length" });
        }
        policy::retry(GrantError::is_retryable, |_| self.put_once(&url, grant, bytes.clone())).await
    }
}

/// What an anonymous read found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PublicRead {
    /// Nothing there, or nothing that the world may see (AWS answers 403 for both): look again at the next poll.
    Absent,
    /// Still the version with the tag that was passed.
    Unchanged,
    Found(Object),
}

/// Reads world-readable objects without credentials. Cheap to clone; clones share connections.
#[derive(Clone)]
pub struct PublicReader {
    client: Client,
    /// `endpoint/bucket`.
    base: String,
}

impl PublicReader {
    /// `endpoint` as `https://host[:port]`, or `http://` on this machine.
    pub fn new(endpoint: &str, bucket: &str) -> Result<Self, StoreError> {
        let base = crate::presign::BucketUrl::new(Some(endpoint), "", bucket, true)?;
        let url = Url::parse(endpoint).map_err(|_| StoreError::invalid("", "the endpoint is not a URL"))?;
        if url.scheme() != "https" && !url.host_str().is_some_and(is_this_machine) {
            return Err(StoreError::invalid("", "the endpoint is neither https nor on this machine\nhint: use https://"));
        }
        let client = http_client(Some(policy::READ_TIMEOUT)).ok_or_else(|| StoreError::invalid("", "the HTTP client cannot be set up"))?;
        Ok(Self { client, base: base.object("").trim_end_matches('/').to_owned() })
    }

    /// Reads `key`, of at most `limit` bytes, unless it still has the tag `etag`.
    pub async fn get(&self, key: &str, etag: Option<&str>, limit: u64) -> Result<PublicRead, StoreError> {
        key::check(key)?;
        policy::retry(StoreError::is_retryable, |_| self.get_once(key, etag, limit)).await
    }

    async fn get_once(&self, key: &str, etag: Option<&str>, limit: u64) -> Result<PublicRead, StoreError> {
        let mut request = self.client.get(format!("{}/{}", self.base, key::url_path(key)));
        if let Some(etag) = etag {
            request = request.header(header::IF_NONE_MATCH, etag);
        }
        let response = send(request).await.map_err(|reason| StoreError::unavailable(key, reason))?;
        match response.status().as_u16() {
            200 => {}
            304 if etag.is_some() => return Ok(PublicRead::Unchanged),
            403 | 404 => {
                let _ = read_body(response, policy::LONGEST_ANSWER).await;
                return Ok(PublicRead::Absent);
            }
            status if is_transient(status) => return Err(StoreError::unavailable(key, format!("HTTP status {status}"))),
            status => return Err(StoreError::invalid(key, format!("HTTP status {status}"))),
        }
        let etag = response.headers().get(header::ETAG).and_then(|value| value.to_str().ok()).map(str::to_owned);
        match read_body(response, limit).await {
            Ok(bytes) => Ok(PublicRead::Found(Object { bytes, etag })),
            Err(BodyError::TooLarge) => Err(StoreError::TooLarge { key: key.to_owned(), limit }),
            Err(BodyError::Broken) => Err(StoreError::unavailable(key, "the connection broke while reading")),
        }
    }
}

/// A client that keeps connections, follows no redirects and uses the ring provider, and awaits an answer for `read_timeout` from the
/// start of its request; `None` if TLS cannot be set up.
fn http_client(read_timeout: Option<Duration>) -> Option<Client> {
    static PROVIDER: Once = Once::new();
    PROVIDER.call_once(|| {
        // Fails if somebody installed a provider before: then that one serves.
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
    let mut builder = Client::builder();
    if let Some(read_timeout) = read_timeout {
        builder = builder.read_timeout(read_timeout);
    }
    builder
        .redirect(redirect::Policy::none())
        .no_proxy()
        .referer(false)
        .user_agent(concat!("quasar/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(policy::CONNECT_TIMEOUT)
        .pool_idle_timeout(policy::IDLE_CONNECTION)
        .build()
        .ok()
}

fn is_this_machine(host: &str) -> bool {
    host == "localhost" || host.trim_matches(['[', ']']).parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn is_transient(status: u16) -> bool {
    matches!(status, 408 | 429 | 500..=599)
}

/// Adds the headers that were signed. Length and host follow from body and URL.
fn with_signed_headers(mut request: RequestBuilder, grant: &GrantRequest) -> RequestBuilder {
    for (name, value) in &grant.headers {
        if !name.eq_ignore_ascii_case("content-length") && !name.eq_ignore_ascii_case("host") {
            request = request.header(name, value);
        }
    }
    request
}

/// Sends a request; the error says what failed, never where to.
async fn send(request: RequestBuilder) -> Result<Response, &'static str> {
    request.send().await.map_err(|error| match error {
        error if error.is_timeout() => "timed out",
        error if error.is_connect() => "cannot connect",
        _ => "the connection failed",
    })
}

enum BodyError {
    TooLarge,
    Broken,
}

/// Reads a body of at most `limit` bytes, in a time that fits its length.
async fn read_body(mut response: Response, limit: u64) -> Result<Bytes, BodyError> {
    let announced = response.content_length();
    if announced.is_some_and(|length| length > limit) {
        return Err(BodyError::TooLarge);
    }
    let read = async {
        let mut bytes = BytesMut::with_capacity(announced.unwrap_or(0) as usize);
        while let Some(part) = response.chunk().await.map_err(|_| BodyError::Broken)? {
            if (bytes.len() + part.len()) as u64 > limit {
                return Err(BodyError::TooLarge);
            }
            if bytes.is_empty() && announced == Some(part.len() as u64) {
                return Ok(part);
            }
            bytes.extend_from_slice(&part);
        }
        Ok(bytes.freeze())
    };
    let time = policy::attempt_timeout(announced.unwrap_or(limit));
    tokio::time::timeout(time, read).await.unwrap_or(Err(BodyError::Broken))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grant(url: &str) -> GrantRequest {
        let key = "a=1/k".to_owned();
        GrantRequest { method: Method::Get, key, url: url.to_owned(), headers: vec![], length: None, sha256: None, expires_ms: 0 }
    }

    #[test]
    fn only_allowed_hosts_over_https_or_on_this_machine_are_followed() {
        let client = GrantClient::new(vec!["Store.example".into(), "127.0.0.1:9000".into(), "[::1]:9000".into()]).unwrap();
        for url in [
            "https://store.example/b/a%3D1/k?X-Amz-Signature=s",
            "https://store.example:443/a=1/k",
            "http://127.0.0.1:9000/b/a%3d1/k",
            "http://[::1]:9000/b/a=1/k",
        ] {
            assert!(client.admit(&grant(url), Method::Get).is_ok(), "{url}");
        }
        for url in [
            "http://store.example/b/a=1/k",
            "https://store.example:8443/b/a=1/k",
            "https://evil.example/b/a=1/k",
            "https://store.example.evil.example/b/a=1/k",
            "https://store.example@evil.example/b/a=1/k",
            "https://user:pass@store.example/b/a=1/k",
            "http://127.0.0.1:9001/b/a=1/k",
            "https://store.example/b/a=1/other?x=/a=1/k",
            "https://store.example/ba=1/k",
            "file:///a=1/k",
            "not a url",
        ] {
            assert!(matches!(client.admit(&grant(url), Method::Get), Err(GrantError::Forbidden { .. })), "{url}");
        }
        assert!(client.admit(&grant("https://store.example/b/a=1/k"), Method::Put).is_err());
    }

    #[test]
    fn errors_never_show_a_url() {
        let client = GrantClient::new(vec![]).unwrap();
        let error = client.admit(&grant("https://evil.example/b/a=1/k?X-Amz-Signature=secret"), Method::Get).unwrap_err();
        assert!(!format!("{error} {error:?}").contains("secret") && !error.to_string().contains("evil"));
    }

    #[test]
    fn public_readers_are_not_built_for_plain_http_on_other_machines() {
        assert!(PublicReader::new("http://store.example", "b").is_err());
        assert!(PublicReader::new("http://127.0.0.1:1", "b").is_ok());
        assert!(PublicReader::new("https://store.example", "b").is_ok());
    }
}
