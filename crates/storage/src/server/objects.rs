//! The S3 operations that the protocol needs, over [`Blobs`].

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt, stream};
use hyper::header::{self, HeaderValue};
use hyper::{HeaderMap, StatusCode};
use s3s::checksum::ChecksumHasher;
use s3s::crypto::{Checksum as _, Md5};
use s3s::dto::{
    CommonPrefix, DeleteObjectInput, DeleteObjectOutput, ETag, ETagCondition, GetObjectInput, GetObjectOutput, HeadBucketInput,
    HeadBucketOutput, HeadObjectInput, HeadObjectOutput, ListObjectsV2Input, ListObjectsV2Output, Object, PutObjectInput, PutObjectOutput,
    StreamingBlob, Timestamp,
};
use s3s::{S3, S3Error, S3ErrorCode, S3Request, S3Response, S3Result, s3_error};

use super::MAX_OBJECT_BYTES;
use super::faults::FaultState;
use crate::PutCondition;
use crate::blobs::{BlobError, Blobs, Opened, Stat};
use crate::key;

/// Files are read in pieces of this size; smaller objects in one go.
const READ_BYTES: u64 = 1 << 20;
/// Most keys on one page of a listing.
const PAGE_KEYS: usize = 1000;

pub(super) struct Objects {
    bucket: Arc<str>,
    blobs: Arc<dyn Blobs>,
    faults: Arc<FaultState>,
}

impl Objects {
    pub(super) fn new(bucket: Arc<str>, blobs: Arc<dyn Blobs>, faults: Arc<FaultState>) -> Self {
        Self { bucket, blobs, faults }
    }

    fn check_bucket(&self, bucket: &str) -> S3Result<()> {
        if bucket == &*self.bucket { Ok(()) } else { Err(s3_error!(NoSuchBucket)) }
    }

    fn check(&self, bucket: &str, key: &str) -> S3Result<()> {
        self.check_bucket(bucket)?;
        if key::is_valid(key) { Ok(()) } else { Err(s3_error!(InvalidArgument, "keys are segments of [A-Za-z0-9._=-] joined by /")) }
    }
}

/// What a reader is told about a missing object: without permission to list, as on AWS, not even that it is missing.
fn missing<T>(request: &S3Request<T>) -> S3Error {
    if request.credentials.is_some() { s3_error!(NoSuchKey) } else { s3_error!(AccessDenied) }
}

fn storage_error(error: BlobError) -> S3Error {
    match error {
        BlobError::ConditionFailed => s3_error!(PreconditionFailed),
        BlobError::Conflict => s3_error!(InvalidRequest, "the key is a folder of other keys, or lies under an object"),
        BlobError::Full => {
            tracing::error!("the object server's disk is full");
            let mut error = s3_error!(InternalError, "the disk is full");
            error.set_status_code(StatusCode::INSUFFICIENT_STORAGE);
            error
        }
        BlobError::Io(error) => {
            tracing::error!(%error, "the object server's folder cannot be used");
            s3_error!(InternalError)
        }
    }
}

fn tag(stat: &Stat) -> Option<ETag> {
    Some(ETag::Strong(stat.etag()))
}

fn modified(stat: &Stat) -> Option<Timestamp> {
    stat.modified_ms.map(|ms| Timestamp::from(UNIX_EPOCH + Duration::from_millis(ms)))
}

fn names(condition: &ETagCondition, stat: &Stat) -> bool {
    condition.is_any() || condition.as_etag().is_some_and(|etag| stat.matches(etag.value()))
}

/// Judges the conditional headers of a read. "Not modified" is an error here, because `s3s` takes a status from nothing else.
fn read_condition(if_match: Option<&ETagCondition>, if_none_match: Option<&ETagCondition>, stat: &Stat) -> S3Result<()> {
    if if_match.is_some_and(|condition| !names(condition, stat)) {
        return Err(s3_error!(PreconditionFailed));
    }
    if if_none_match.is_some_and(|condition| names(condition, stat)) {
        let mut not_modified = s3_error!(NotModified);
        let etag = HeaderValue::from_str(&format!("\"{}\"", stat.etag())).map_err(S3Error::internal_error)?;
        not_modified.set_headers(HeaderMap::from_iter([(header::ETAG, etag)]));
        return Err(not_modified);
    }
    Ok(())
}

#[async_trait]
impl S3 for Objects {
    async fn get_object(&self, request: S3Request<GetObjectInput>) -> S3Result<S3Response<GetObjectOutput>> {
        let input = &request.input;
        self.check(&input.bucket, &input.key)?;
        // The answer to a poll that finds nothing new needs no file.
        let stat = self.blobs.stat(&input.key).ok_or_else(|| missing(&request))?;
        let condition = |stat: &Stat| read_condition(input.if_match.as_ref(), input.if_none_match.as_ref(), stat);
        condition(&stat)?;
        let (stat, opened) = self.blobs.open(&input.key).await.map_err(storage_error)?.ok_or_else(|| missing(&request))?;
        condition(&stat)?;
        let range = match &input.range {
            Some(range) => range.check(stat.length)?,
            None => 0..stat.length,
        };
        let content_range = input.range.map(|_| format!("bytes {}-{}/{}", range.start, range.end.saturating_sub(1), stat.length));
        let cut = self.faults.for_path(&input.key).cut_bodies_after;
        let body = match opened {
            Opened::Memory(bytes) => StreamingBlob::from(s3s::Body::from(bytes.slice(range.start as usize..range.end as usize))),
            Opened::File(file) => file_body(file, range.clone()).await?,
        };
        Ok(S3Response::new(GetObjectOutput {
            body: Some(if let Some(bytes) = cut { cut_body(body, bytes) } else { body }),
            content_length: Some((range.end - range.start) as i64),
            content_range,
            accept_ranges: Some("bytes".to_owned()),
            e_tag: tag(&stat),
            last_modified: modified(&stat),
            ..GetObjectOutput::default()
        }))
    }

    async fn head_object(&self, request: S3Request<HeadObjectInput>) -> S3Result<S3Response<HeadObjectOutput>> {
        let input = &request.input;
        self.check(&input.bucket, &input.key)?;
        let stat = self.blobs.stat(&input.key).ok_or_else(|| missing(&request))?;
        read_condition(input.if_match.as_ref(), input.if_none_match.as_ref(), &stat)?;
        Ok(S3Response::new(HeadObjectOutput {
            content_length: Some(stat.length as i64),
            accept_ranges: Some("bytes".to_owned()),
            e_tag: tag(&stat),
            last_modified: modified(&stat),
            ..HeadObjectOutput::default()
        }))
    }

    async fn put_object(&self, request: S3Request<PutObjectInput>) -> S3Result<S3Response<PutObjectOutput>> {
        let mut input = request.input;
        self.check(&input.bucket, &input.key)?;
        let announced = input.content_length.and_then(|length| u64::try_from(length).ok());
        if announced.is_some_and(|length| length > MAX_OBJECT_BYTES) {
            return Err(s3_error!(EntityTooLarge));
        }
        let faults = self.faults.for_path(&input.key);
        let condition = match (&input.if_none_match, &input.if_match) {
            _ if faults.ignore_conditions => PutCondition::Always,
            (None, None) => PutCondition::Always,
            (Some(condition), None) if condition.is_any() => PutCondition::IfAbsent,
            (None, Some(ETagCondition::ETag(etag))) => PutCondition::IfMatch(etag.value().to_owned()),
            (None, Some(ETagCondition::Any)) => PutCondition::IfMatch("*".to_owned()),
            _ => return Err(s3_error!(NotImplemented, "a write takes If-None-Match: * or If-Match with one tag")),
        };

        let mut checksums = Checksums::expected(&input, request.trailing_headers.is_some());
        let mut upload = self.blobs.stage().await.map_err(storage_error)?;
        let mut length = 0u64;
        if let Some(mut body) = input.body.take() {
            while let Some(part) = body.next().await {
                let part = part.map_err(|source| S3Error::with_source(S3ErrorCode::IncompleteBody, source))?;
                length += part.len() as u64;
                if length > MAX_OBJECT_BYTES {
                    return Err(s3_error!(EntityTooLarge));
                }
                checksums.update(&part);
                upload.write(part).await.map_err(storage_error)?;
            }
        }
        if announced.is_some_and(|announced| announced != length) {
            return Err(s3_error!(IncompleteBody));
        }
        let trailers = request.trailing_headers.and_then(|trailers| trailers.take());
        if !faults.ignore_checksums {
            checksums.verify(trailers.as_ref())?;
        }
        let stat = upload.commit(&input.key, &condition).await.map_err(storage_error)?;
        Ok(S3Response::new(PutObjectOutput { e_tag: tag(&stat), ..PutObjectOutput::default() }))
    }

    async fn delete_object(&self, request: S3Request<DeleteObjectInput>) -> S3Result<S3Response<DeleteObjectOutput>> {
        let input = &request.input;
        self.check(&input.bucket, &input.key)?;
        if input.if_match.is_some() {
            return Err(s3_error!(NotImplemented, "conditional deletes"));
        }
        self.blobs.remove(&input.key).await.map_err(storage_error)?;
        Ok(S3Response::new(DeleteObjectOutput::default()))
    }

    async fn head_bucket(&self, request: S3Request<HeadBucketInput>) -> S3Result<S3Response<HeadBucketOutput>> {
        self.check_bucket(&request.input.bucket)?;
        Ok(S3Response::new(HeadBucketOutput::default()))
    }

    async fn list_objects_v2(&self, request: S3Request<ListObjectsV2Input>) -> S3Result<S3Response<ListObjectsV2Output>> {
        let input = request.input;
        self.check_bucket(&input.bucket)?;
        let prefix = input.prefix.clone().unwrap_or_default();
        let limit = input.max_keys.and_then(|keys| usize::try_from(keys).ok()).unwrap_or(PAGE_KEYS).min(PAGE_KEYS);
        // A token is the last key, or the last common prefix, of the page before.
        let mut after = input.continuation_token.clone().or_else(|| input.start_after.clone());
        let (mut contents, mut folders) = (Vec::new(), Vec::new());
        let mut is_truncated = false;
        'pages: loop {
            let page = self.blobs.list(&prefix, after.as_deref(), PAGE_KEYS);
            let ended = page.len() < PAGE_KEYS;
            for (key, stat) in page {
                let folder = input.delimiter.as_deref().filter(|delimiter| !delimiter.is_empty()).and_then(|delimiter| {
                    key[prefix.len()..].find(delimiter).map(|at| key[..prefix.len() + at + delimiter.len()].to_owned())
                });
                if folder.is_some() && folders.last() == folder.as_ref() {
                    continue;
                }
                if contents.len() + folders.len() >= limit {
                    is_truncated = true;
                    break 'pages;
                }
                match folder {
                    // All keys of the folder sort before its name with the highest byte that keys do not use.
                    Some(folder) => {
                        after = Some(format!("{folder}\u{7f}"));
                        folders.push(folder);
                        continue 'pages;
                    }
                    None => {
                        after = Some(key.clone());
                        contents.push(Object {
                            key: Some(key),
                            size: Some(stat.length as i64),
                            e_tag: tag(&stat),
                            last_modified: modified(&stat),
                            ..Object::default()
                        });
                    }
                }
            }
            if ended {
                break;
            }
        }
        Ok(S3Response::new(ListObjectsV2Output {
            name: Some(input.bucket),
            prefix: Some(prefix),
            delimiter: input.delimiter,
            max_keys: Some(limit as i32),
            key_count: Some((contents.len() + folders.len()) as i32),
            is_truncated: Some(is_truncated),
            continuation_token: input.continuation_token,
            next_continuation_token: after.filter(|_| is_truncated),
            start_after: input.start_after,
            contents: Some(contents),
            common_prefixes: Some(folders.into_iter().map(|prefix| CommonPrefix { prefix: Some(prefix) }).collect()),
            ..ListObjectsV2Output::default()
        }))
    }
}

/// The bytes of `range` of an open file: small ranges in one piece, large ones as a stream.
async fn file_body(file: File, range: std::ops::Range<u64>) -> S3Result<StreamingBlob> {
    let file = Arc::new(file);
    if range.end - range.start <= READ_BYTES {
        let bytes = read_piece(file, range.start, range.end).await.map_err(|error| storage_error(error.into()))?;
        return Ok(StreamingBlob::from(s3s::Body::from(bytes)));
    }
    let starts = (range.start..range.end).step_by(READ_BYTES as usize);
    // One piece is read ahead while another is sent.
    let pieces = stream::iter(starts).map(move |start| read_piece(file.clone(), start, (start + READ_BYTES).min(range.end))).buffered(2);
    Ok(StreamingBlob::wrap(sync_stream(pieces)))
}

async fn read_piece(file: Arc<File>, start: u64, end: u64) -> std::io::Result<Bytes> {
    let read = move || {
        let mut bytes = vec![0; (end - start) as usize];
        file.read_exact_at(&mut bytes, start)?;
        Ok(Bytes::from(bytes))
    };
    tokio::task::spawn_blocking(read).await.unwrap_or_else(|error| Err(std::io::Error::other(error)))
}

/// Response bodies have to be `Sync`; a stream that is only ever polled through `&mut` may claim that behind a lock that nobody contends.
fn sync_stream<T: Send + 'static>(pieces: impl futures::Stream<Item = T> + Send + 'static) -> impl futures::Stream<Item = T> + Send + Sync {
    let mut pieces = std::sync::Mutex::new(Box::pin(pieces));
    stream::poll_fn(move |context| pieces.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner).poll_next_unpin(context))
}

/// `body`, broken off after `limit` bytes.
fn cut_body(mut body: StreamingBlob, limit: u64) -> StreamingBlob {
    let mut left = limit;
    let mut is_cut = false;
    StreamingBlob::wrap(stream::poll_fn(move |context| {
        use std::task::Poll;
        if is_cut {
            return Poll::Ready(None);
        }
        body.poll_next_unpin(context).map(|part| match part? {
            Ok(part) if part.len() as u64 <= left => {
                left -= part.len() as u64;
                Some(Ok(part))
            }
            _ => {
                is_cut = true;
                Some(Err(std::io::Error::from(std::io::ErrorKind::ConnectionAborted)))
            }
        })
    }))
}

/// The checksums that came with an upload, in headers or in trailers, and those that its bytes have.
struct Checksums {
    hasher: ChecksumHasher,
    md5: Option<(Md5, String)>,
    /// Header name and Base64 value.
    expected: Vec<(&'static str, String)>,
}

impl Checksums {
    fn expected(input: &PutObjectInput, has_trailers: bool) -> Self {
        let given = [
            ("x-amz-checksum-crc32", &input.checksum_crc32),
            ("x-amz-checksum-crc32c", &input.checksum_crc32c),
            ("x-amz-checksum-crc64nvme", &input.checksum_crc64nvme),
            ("x-amz-checksum-sha1", &input.checksum_sha1),
            ("x-amz-checksum-sha256", &input.checksum_sha256),
        ];
        // Which checksum a trailer brings is known only at the end: then all are computed.
        let wanted = |index: usize| has_trailers || given[index].1.is_some();
        let hasher = ChecksumHasher {
            crc32: wanted(0).then(Default::default),
            crc32c: wanted(1).then(Default::default),
            crc64nvme: wanted(2).then(Default::default),
            sha1: wanted(3).then(Default::default),
            sha256: wanted(4).then(Default::default),
        };
        let md5 = input.content_md5.clone().map(|expected| (Md5::new(), expected));
        let expected = given.into_iter().filter_map(|(name, value)| Some((name, value.clone()?))).collect();
        Self { hasher, md5, expected }
    }

    fn update(&mut self, part: &[u8]) {
        self.hasher.update(part);
        if let Some((md5, _)) = &mut self.md5 {
            md5.update(part);
        }
    }

    fn verify(self, trailers: Option<&HeaderMap>) -> S3Result<()> {
        use base64::Engine as _;
        let found = self.hasher.finalize();
        let found = [
            ("x-amz-checksum-crc32", found.checksum_crc32),
            ("x-amz-checksum-crc32c", found.checksum_crc32c),
            ("x-amz-checksum-crc64nvme", found.checksum_crc64nvme),
            ("x-amz-checksum-sha1", found.checksum_sha1),
            ("x-amz-checksum-sha256", found.checksum_sha256),
        ];
        for (name, found) in found {
            let header = self.expected.iter().find(|(expected, _)| *expected == name).map(|(_, value)| value.as_bytes());
            let trailer = trailers.and_then(|trailers| trailers.get(name)).map(|value| value.as_bytes());
            for expected in [header, trailer].into_iter().flatten() {
                if found.as_deref().map(str::as_bytes) != Some(expected) {
                    return Err(s3_error!(BadDigest, "the bytes do not have the checksum that came with them"));
                }
            }
        }
        if let Some((md5, expected)) = self.md5
            && base64::engine::general_purpose::STANDARD.encode(md5.finalize()) != expected
        {
            return Err(s3_error!(BadDigest, "the bytes do not have the Content-MD5 that came with them"));
        }
        Ok(())
    }
}
