//! The socket in front of the node: forwards bytes, and fails in the ways that sockets fail.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

const CHUNK_BYTES: usize = 64 * 1024;

/// What the gate does to the bytes that pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Weather {
    /// Nothing passes, and nothing is closed either.
    is_silent: bool,
    /// Each piece waits so long.
    delay_ms: u64,
    /// Connections that are older than the last change of this number are closed.
    severed: u64,
}

pub(super) struct Gate {
    pub(super) address: SocketAddr,
    target: Arc<Mutex<SocketAddr>>,
    weather: Arc<watch::Sender<Weather>>,
    task: JoinHandle<()>,
}

impl Gate {
    /// Listens on `address` and forwards to `target`.
    pub(super) async fn open(address: SocketAddr, target: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        let target = Arc::new(Mutex::new(target));
        let weather = Arc::new(watch::Sender::new(Weather::default()));
        let task = tokio::spawn(accept(listener, target.clone(), weather.clone()));
        Ok(Self { address, target, weather, task })
    }

    /// Closes every connection; new ones are taken at once.
    pub(super) fn sever(&self) {
        self.weather.send_modify(|weather| weather.severed += 1);
    }

    pub(super) fn silence(&self, is_silent: bool) {
        self.weather.send_modify(|weather| weather.is_silent = is_silent);
    }

    pub(super) fn delay(&self, delay_ms: u64) {
        self.weather.send_modify(|weather| weather.delay_ms = delay_ms);
    }

    /// Forwards new connections to another server, and closes those to the former one.
    pub(super) fn redirect(&self, target: SocketAddr) {
        *self.target.lock().unwrap_or_else(PoisonError::into_inner) = target;
        self.sever();
    }

    pub(super) fn target(&self) -> SocketAddr {
        *self.target.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.task.abort();
        self.sever();
    }
}

async fn accept(listener: TcpListener, target: Arc<Mutex<SocketAddr>>, weather: Arc<watch::Sender<Weather>>) {
    loop {
        let Ok((client, _)) = listener.accept().await else {
            // Out of descriptors, most likely.
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let target = *target.lock().unwrap_or_else(PoisonError::into_inner);
        tokio::spawn(forward(client, target, weather.subscribe()));
    }
}

async fn forward(client: TcpStream, target: SocketAddr, mut weather: watch::Receiver<Weather>) {
    let severed = weather.borrow().severed;
    let Ok(server) = TcpStream::connect(target).await else { return };
    // Small questions and answers: waiting for more to send only costs time.
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let (up, down) = (weather.clone(), weather.clone());
    tokio::select! {
        () = pump(from_client, to_server, up) => {}
        () = pump(from_server, to_client, down) => {}
        // Also when the gate itself is gone.
        _ = weather.wait_for(|weather| weather.severed != severed) => {}
    }
}

async fn pump(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, mut weather: watch::Receiver<Weather>) {
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        let Ok(length @ 1..) = from.read(&mut chunk).await else { return };
        let delay_ms = match weather.wait_for(|weather| !weather.is_silent).await {
            Ok(weather) => weather.delay_ms,
            Err(_) => return,
        };
        if delay_ms > 0 {
            tokio::time::sleep(Duration::from_millis(delay_ms)).await;
        }
        if to.write_all(&chunk[..length]).await.is_err() {
            return;
        }
    }
}
