//! Connections: accept, apply faults, hand requests to the S3 service, end in good order.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body as _, Frame, Incoming, SizeHint};
use hyper::http::{Request, Response, StatusCode};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use s3s::service::S3Service;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tracing::instrument::WithSubscriber;
use tracing::subscriber::NoSubscriber;

use super::faults::{FaultState, Verdict};

/// Connections at a time; more wait.
const MAX_CONNECTIONS: usize = 1024;
/// How long a connection may idle or dawdle over a request's head. Longer than clients keep idle connections, so that they close first.
const HEAD_TIMEOUT: Duration = Duration::from_secs(120);
/// How long running requests may take to end when the server stops.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);
/// How much of a refused upload is read and thrown away, so that the client gets to see the answer instead of a broken connection.
const MAX_DRAINED_BYTES: u64 = 64 << 20;
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// Accepts until `stopped` turns true or its sender is gone.
pub(super) async fn accept(listener: TcpListener, service: S3Service, faults: Arc<FaultState>, mut stopped: watch::Receiver<bool>) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let slot = tokio::select! {
            slot = slots.clone().acquire_owned() => slot,
            _ = stopped.changed() => break,
        };
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of file descriptors, most likely: let some connections end.
                    tracing::warn!(%error, "the object server cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            },
            _ = stopped.changed() => break,
        };
        let (service, faults, stopped) = (service.clone(), faults.clone(), stopped.clone());
        connections.spawn(async move {
            serve(stream, service, faults, stopped).await;
            drop(slot);
        });
        while connections.try_join_next().is_some() {}
    }
    drop(listener);
    let all_ended = async { while connections.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(STOP_TIMEOUT, all_ended).await;
    connections.shutdown().await;
}

async fn serve(stream: TcpStream, service: S3Service, faults: Arc<FaultState>, mut stopped: watch::Receiver<bool>) {
    let _ = stream.set_nodelay(true);
    let handler = service_fn(move |request| handle(service.clone(), faults.clone(), request));
    let mut builder = http1::Builder::new();
    let connection = builder.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT).serve_connection(TokioIo::new(stream), handler);
    tokio::pin!(connection);
    // A connection that breaks is the client's affair.
    let _ = tokio::select! {
        ended = connection.as_mut() => ended,
        _ = stopped.changed() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
}

async fn handle(service: S3Service, faults: Arc<FaultState>, request: Request<Incoming>) -> Result<Response<s3s::Body>, Infallible> {
    let wanted = faults.for_path(&request.uri().path().replace("%3D", "="));
    if !wanted.latency.is_zero() {
        tokio::time::sleep(wanted.latency).await;
    }
    let (parts, body) = request.into_parts();
    let body = SharedBody(Arc::new(Mutex::new(body)));
    let verdict = faults.judge(&wanted);
    let mut response = match verdict {
        Verdict::Unavailable => plain(StatusCode::SERVICE_UNAVAILABLE),
        Verdict::Refuse => plain(StatusCode::FORBIDDEN),
        Verdict::Serve | Verdict::LoseAnswer => {
            let request = Request::from_parts(parts, s3s::Body::http_body_unsync(body.clone()));
            // The crate logs whole requests, presigned URLs included: it is given no subscriber to log to.
            match service.call(request).with_subscriber(NoSubscriber::default()).await {
                Ok(response) => response,
                Err(_) => plain(StatusCode::INTERNAL_SERVER_ERROR),
            }
        }
    };
    if verdict == Verdict::LoseAnswer {
        response = plain(StatusCode::SERVICE_UNAVAILABLE);
    }
    if response.status() == StatusCode::NOT_MODIFIED {
        *response.body_mut() = s3s::Body::empty();
    } else if !response.status().is_success() {
        let _ = tokio::time::timeout(DRAIN_TIMEOUT, body.drain()).await;
    }
    Ok(response)
}

fn plain(status: StatusCode) -> Response<s3s::Body> {
    let mut response = Response::new(s3s::Body::empty());
    *response.status_mut() = status;
    response
}

/// A request body that can still be emptied after the service has dropped its half-read handle.
#[derive(Clone)]
struct SharedBody(Arc<Mutex<Incoming>>);

impl SharedBody {
    fn with<T>(&self, look: impl FnOnce(Pin<&mut Incoming>) -> T) -> T {
        look(Pin::new(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner)))
    }

    async fn drain(&self) {
        let mut drained = 0u64;
        while drained < MAX_DRAINED_BYTES {
            let Some(Ok(frame)) = std::future::poll_fn(|context| self.with(|body| body.poll_frame(context))).await else { return };
            drained += frame.data_ref().map_or(0, |data| data.len() as u64);
        }
    }
}

impl hyper::body::Body for SharedBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        self.with(|body| body.poll_frame(context))
    }

    fn is_end_stream(&self) -> bool {
        self.with(|body| body.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        self.with(|body| body.size_hint())
    }
}
