//! Presigned requests: AWS signature version 4 in the query string.
//!
//! Signed here, not through the SDK's operations, because the signature then depends on the time that the caller passes and nothing else, and
//! needs no runtime. Every header given to the signer becomes a signed header, so a PUT is bound to its exact length, to its SHA-256 and
//! to write-once: other bytes, another length or a second write are refused by the store.

use std::time::{Duration, UNIX_EPOCH};

use aws_sdk_s3::config::Credentials;
use aws_sigv4::http_request::{
    PercentEncodingMode, SignableBody, SignableRequest, SignatureLocation, SigningSettings, UriPathNormalizationMode, sign,
};
use aws_sigv4::sign::v4;
use base64::Engine as _;
use hyper::http;
use protocol::{Digest, GrantRequest, Method};

use crate::{Presign, StoreError, key};

/// Longest validity that S3 accepts.
pub const MAX_VALIDITY: Duration = Duration::from_secs(7 * 24 * 3600);

/// Where the objects of a bucket live on the web.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BucketUrl(String);

impl BucketUrl {
    /// `endpoint` as `https://host[:port]`, `None` for AWS itself.
    pub fn new(endpoint: Option<&str>, region: &str, bucket: &str, path_style: bool) -> Result<Self, StoreError> {
        let endpoint =
            endpoint.map_or_else(|| format!("https://s3.{region}.amazonaws.com"), |given| given.trim_end_matches('/').to_owned());
        let invalid = || {
            StoreError::invalid(
                "",
                "the endpoint is not a URL of the form https://host[:port]\nhint: set QUASAR_S3_ENDPOINT_URL or leave it out for AWS",
            )
        };
        let parsed = url::Url::parse(&endpoint).map_err(|_| invalid())?;
        if !matches!(parsed.scheme(), "http" | "https") || parsed.host_str().is_none() || parsed.query().is_some() {
            return Err(invalid());
        }
        if bucket.is_empty() || !bucket.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_')) {
            return Err(StoreError::invalid("", "the bucket's name is not made of [A-Za-z0-9._-]\nhint: set QUASAR_S3_BUCKET"));
        }
        Ok(Self(if path_style {
            format!("{endpoint}/{bucket}")
        } else {
            let (scheme, rest) = endpoint.split_once("://").ok_or_else(invalid)?;
            format!("{scheme}://{bucket}.{rest}")
        }))
    }

    /// The unsigned URL of `key`.
    pub fn object(&self, key: &str) -> String {
        format!("{}/{}", self.0, key::url_path(key))
    }

    /// `host` or `host:port`: what the list of allowed hosts of a grant client has to hold.
    pub fn host(&self) -> String {
        let rest = self.0.split_once("://").map_or(self.0.as_str(), |(_, rest)| rest);
        rest.split('/').next().unwrap_or(rest).to_owned()
    }
}

/// Signs `request` for the bucket at `url`.
pub fn presign(url: &BucketUrl, region: &str, credentials: &Credentials, request: &Presign) -> Result<GrantRequest, StoreError> {
    let key = request.key();
    key::check(key)?;
    let (method, length, sha256, if_absent, now_ms, expires_in_ms) = match request {
        Presign::Get { now_ms, expires_in_ms, .. } => (Method::Get, None, None, false, *now_ms, *expires_in_ms),
        Presign::Put { length, sha256, if_absent, now_ms, expires_in_ms, .. } => {
            (Method::Put, Some(*length), *sha256, *if_absent, *now_ms, *expires_in_ms)
        }
    };
    let mut headers = Vec::new();
    if let Some(length) = length {
        headers.push(("content-length".to_owned(), length.to_string()));
    }
    if let Some(sha256) = sha256 {
        headers.push(("x-amz-checksum-sha256".to_owned(), base64_of(&sha256)));
    }
    if if_absent {
        headers.push(("if-none-match".to_owned(), "*".to_owned()));
    }

    let expires_in = Duration::from_secs((expires_in_ms / 1000).clamp(1, MAX_VALIDITY.as_secs()));
    let signed_at = Duration::from_secs(now_ms / 1000);
    let unsigned = url.object(key);
    let mut settings = SigningSettings::default();
    settings.signature_location = SignatureLocation::QueryParams;
    settings.percent_encoding_mode = PercentEncodingMode::Single;
    settings.uri_path_normalization_mode = UriPathNormalizationMode::Disabled;
    settings.expires_in = Some(expires_in);
    let identity = credentials.clone().into();
    let failed = |what: &str| StoreError::invalid(key, format!("the request cannot be signed: {what}"));
    let params = v4::SigningParams::builder()
        .identity(&identity)
        .region(region)
        .name("s3")
        .time(UNIX_EPOCH + signed_at)
        .settings(settings)
        .build()
        .map_err(|_| failed("incomplete parameters"))?
        .into();
    let verb = match method {
        Method::Get => "GET",
        Method::Put => "PUT",
    };
    let signable = SignableRequest::new(
        verb,
        unsigned.as_str(),
        headers.iter().map(|(name, value)| (name.as_str(), value.as_str())),
        SignableBody::UnsignedPayload,
    )
    .map_err(|_| failed("malformed URL"))?;
    let (instructions, _) = sign(signable, &params).map_err(|_| failed("malformed headers"))?.into_parts();
    let mut signed = http::Request::builder().uri(&unsigned).body(()).map_err(|_| failed("malformed URL"))?;
    instructions.apply_to_request_http1x(&mut signed);
    Ok(GrantRequest {
        method,
        key: key.to_owned(),
        url: signed.uri().to_string(),
        headers,
        length,
        sha256,
        expires_ms: (signed_at + expires_in).as_millis() as u64,
    })
}

/// A digest as S3 checksum headers carry it.
pub(crate) fn base64_of(digest: &Digest) -> String {
    base64::engine::general_purpose::STANDARD.encode(digest.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn credentials() -> Credentials {
        Credentials::new("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", None, None, "test")
    }

    #[test]
    fn the_documented_example_of_a_presigned_get_gives_the_documented_signature() {
        // Amazon S3 API reference, "Authenticating requests: using query parameters", example of 24 May 2013.
        let url = BucketUrl::new(Some("https://s3.amazonaws.com"), "us-east-1", "examplebucket", false).unwrap();
        let request = Presign::Get { key: "test.txt".into(), now_ms: 1_369_353_600_000, expires_in_ms: 86_400_000 };
        let grant = presign(&url, "us-east-1", &credentials(), &request).unwrap();
        assert!(grant.url.starts_with("https://examplebucket.s3.amazonaws.com/test.txt?"));
        assert!(grant.url.ends_with("X-Amz-Signature=aeeed9bbccd4d02ee5c0109b86d86835f995330da4c265957d157751f604d404"));
        assert_eq!(grant.expires_ms, 1_369_353_600_000 + 86_400_000);
    }

    #[test]
    fn a_put_binds_length_digest_and_write_once_as_signed_headers() {
        let url = BucketUrl::new(Some("http://127.0.0.1:9000/"), "us-east-1", "b", true).unwrap();
        let request = Presign::Put {
            key: "netuid=1/x".into(),
            length: 3,
            sha256: Some(Digest::sha256(b"abc")),
            if_absent: true,
            now_ms: 1_000_999,
            expires_in_ms: 10,
        };
        let grant = presign(&url, "us-east-1", &credentials(), &request).unwrap();
        assert!(grant.url.contains("X-Amz-SignedHeaders=content-length%3Bhost%3Bif-none-match%3Bx-amz-checksum-sha256"));
        assert!(grant.url.starts_with("http://127.0.0.1:9000/b/netuid%3D1/x?"));
        assert_eq!(grant.expires_ms, 1_001_000, "validity is whole seconds, at least one");
        assert_eq!(url.host(), "127.0.0.1:9000");
    }

    #[test]
    fn nonsense_endpoints_and_buckets_are_refused() {
        for endpoint in ["", "ftp://host", "host:80", "https://", "https://host/?q=1"] {
            assert!(BucketUrl::new(Some(endpoint), "r", "b", true).is_err(), "{endpoint}");
        }
        assert!(BucketUrl::new(None, "r", "a/b", true).is_err());
    }
}
