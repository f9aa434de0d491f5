//! Uploads that take as long as they move.
//!
//! The time-outs of HTTP clients run from the start of a request to the first byte of its answer. One that is short enough to notice a
//! dead connection ends every upload over a slow line, and one that is long enough for the line waits for the dead for ever. So the
//! body tells when it is asked for more, and an upload ends when nothing of it has moved for a while.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use tokio::time::Instant;

/// Bytes that are handed over at a time.
const PART: usize = 256 << 10;

/// When an upload moved last. Clones tell the same.
#[derive(Clone, Debug)]
pub(crate) struct Progress(Arc<Mutex<Instant>>);

impl Progress {
    pub(crate) fn new() -> Self {
        Self(Arc::new(Mutex::new(Instant::now())))
    }

    fn note(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    fn last(&self) -> Instant {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The answer to a request whose body notes its progress here; `None` after `silence` without any.
    pub(crate) async fn watch<T>(&self, silence: Duration, request: impl Future<Output = T>) -> Option<T> {
        tokio::pin!(request);
        self.note();
        loop {
            let end = self.last() + silence;
            tokio::select! {
                answer = &mut request => return Some(answer),
                () = tokio::time::sleep_until(end) => if self.last() + silence <= Instant::now() { return None },
            }
        }
    }
}

/// Bytes in parts, so that their progress shows.
pub(crate) struct Parts(pub(crate) Bytes);

impl Body for Parts {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let length = self.0.len().min(PART);
        let part = self.0.split_to(length);
        Poll::Ready((!part.is_empty()).then(|| Ok(Frame::data(part))))
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.0.len() as u64)
    }
}

/// A body that notes each time it is asked for more: then what it gave before is on its way.
pub(crate) struct Watched<B> {
    pub(crate) body: Pin<Box<B>>,
    pub(crate) progress: Progress,
}

impl<B: Body> Body for Watched<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        self.progress.note();
        self.body.as_mut().poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use protocol::{GrantRequest, Method};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};

    use super::*;
    use crate::client::{GrantAccess, GrantClient, GrantError, PutOutcome};
    use crate::{ObjectStore, PutCondition, S3Settings, S3Store, StoreError, policy};

    /// More than the buffers between two sockets take up.
    const BYTES: usize = 64 << 20;

    /// How a server treats a body.
    #[derive(Clone, Copy)]
    enum Server {
        /// Takes about so long to read it.
        Slow(Duration),
        /// Reads nothing of it.
        Deaf,
        /// Reads it, and says nothing.
        Mute,
        /// Waited for it in vain the first time that somebody came, as S3 says it.
        Impatient,
    }

    impl Server {
        /// Where it listens.
        async fn start(self) -> String {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            tokio::spawn(async move {
                let mut number = 0;
                while let Ok((stream, _)) = listener.accept().await {
                    tokio::spawn(self.serve(stream, number));
                    number += 1;
                }
            });
            address.to_string()
        }

        async fn serve(self, mut stream: TcpStream, number: usize) {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.unwrap());
            }
            let head = String::from_utf8(head).unwrap().to_lowercase();
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).expect("a length").parse::<usize>().unwrap();
            assert_eq!(length, BYTES);
            if matches!(self, Self::Deaf) {
                return std::future::pending().await;
            }
            let mut part = vec![0; 128 << 10];
            for _ in 0..length / part.len() {
                if let Self::Slow(time) = self {
                    tokio::time::sleep(time.mul_f64(part.len() as f64 / length as f64)).await;
                }
                stream.read_exact(&mut part).await.unwrap();
            }
            let (status, body) = match self {
                Self::Mute => return std::future::pending().await,
                Self::Impatient if number == 0 => ("400 Bad Request", "<Error><Code>RequestTimeout</Code></Error>"),
                _ => ("200 OK", ""),
            };
            let answer = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len());
            stream.write_all(answer.as_bytes()).await.unwrap();
            let _ = stream.shutdown().await;
        }
    }

    /// What a redeemed grant and a store with credentials say of the same upload, and how long the longer one of both took.
    async fn upload(server: Server, silence: Option<Duration>) -> (Result<PutOutcome, GrantError>, Result<String, StoreError>, Duration) {
        let address = server.start().await;
        let mut client = GrantClient::new(vec![address.clone()]).unwrap();
        client.silence = silence.unwrap_or(client.silence);
        let url = format!("http://{address}/b/k");
        let grant =
            GrantRequest { method: Method::Put, key: "k".into(), url, headers: vec![], length: None, sha256: None, expires_ms: u64::MAX };
        let address = server.start().await;
        let mut store = S3Store::new(S3Settings {
            endpoint: Some(format!("http://{address}")),
            region: "us-east-1".into(),
            bucket: "b".into(),
            access_key: Some("key".into()),
            secret_key: Some("secret".into()),
            path_style: true,
        })
        .unwrap();
        store.silence = silence.unwrap_or(store.silence);
        let (bytes, begun) = (Bytes::from(vec![7; BYTES]), Instant::now());
        let (redeemed, stored) = tokio::join!(client.put(&grant, bytes.clone()), store.put("k", bytes.clone(), PutCondition::Always));
        (redeemed, stored, begun.elapsed())
    }

    #[tokio::test]
    async fn an_upload_may_take_longer_than_an_answer_is_awaited_while_it_moves() {
        let (redeemed, stored, took) = upload(Server::Slow(policy::READ_TIMEOUT + Duration::from_secs(4)), None).await;
        assert_eq!(redeemed, Ok(PutOutcome::Stored));
        assert!(stored.is_ok(), "{stored:?}");
        assert!(took > policy::READ_TIMEOUT, "{took:?}");
    }

    #[tokio::test]
    async fn an_upload_of_which_nothing_moves_and_one_without_an_answer_end_and_are_tried_again() {
        let silence = Duration::from_millis(1_500);
        for server in [Server::Deaf, Server::Mute] {
            let (redeemed, stored, took) = upload(server, Some(silence)).await;
            assert!(redeemed.as_ref().is_err_and(GrantError::is_retryable), "{redeemed:?}");
            assert!(stored.as_ref().is_err_and(StoreError::is_retryable), "{stored:?}");
            assert!(took >= silence * policy::ATTEMPTS, "{took:?}");
        }
    }

    #[tokio::test]
    async fn a_store_that_waited_too_long_for_bytes_gets_them_again() {
        let (redeemed, stored, _) = upload(Server::Impatient, None).await;
        assert_eq!(redeemed, Ok(PutOutcome::Stored));
        assert!(stored.is_ok(), "{stored:?}");
    }
}
