//! `/livez`, `/readyz` and `/metrics`, on loopback only.
//!
//! *Live* means that every loop that must turn has turned lately (a daemon that is up while nothing moves is the worst
//! failure there is); a supervisor restarts a process that is not. *Ready* means that it can do its work now, or says why it
//! cannot: chain stalled, no run published, waiting for registration.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use tokio::net::TcpListener;
use tokio::time::Instant;

use crate::Shutdown;

/// Histograms are folded this often, whether or not anybody reads them.
const UPKEEP: Duration = Duration::from_secs(15);

#[derive(Debug, thiserror::Error)]
pub enum HealthError {
    #[error("health pages are served on loopback only, not on {0}\nhint: use 127.0.0.1:PORT and a local scraper or proxy")]
    NotLoopback(SocketAddr),
    #[error("cannot listen on {address}: {source}\nhint: another process uses the port; choose one with --health-listen")]
    Listen { address: SocketAddr, source: std::io::Error },
    #[error("another metrics recorder is installed in this process")]
    Recorder,
}

impl From<HealthError> for crate::Failure {
    fn from(error: HealthError) -> Self {
        Self::configuration(error)
    }
}

/// Asked whenever somebody wants to know: why a part is not ready, `None` while it is.
type Probe = Arc<dyn Fn() -> Option<String> + Send + Sync>;

/// What one part of the daemon says about itself.
#[derive(Clone)]
struct Condition {
    /// `None` while it is ready.
    reason: Option<String>,
    was_ready: bool,
    /// A part that must give a sign of life at least this often.
    stale_after: Option<Duration>,
    last_beat: Instant,
}

/// The conditions of all parts; clones share them.
#[derive(Clone, Default)]
pub struct Health(Arc<Mutex<Parts>>);

#[derive(Default)]
struct Parts {
    conditions: BTreeMap<String, Condition>,
    probes: BTreeMap<String, Probe>,
    vital: BTreeMap<String, Probe>,
}

impl std::fmt::Debug for Health {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Health").field("unready", &self.unready()).finish()
    }
}

/// One part's handle.
#[derive(Clone, Debug)]
pub struct Component {
    health: Health,
    name: String,
}

impl Health {
    pub fn new() -> Self {
        Self::default()
    }

    fn parts(&self) -> MutexGuard<'_, Parts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a part that is not ready until it says so.
    pub fn component(&self, name: &str) -> Component {
        self.add(name, None)
    }

    /// Adds a part that must [`Component::beat`] at least every `stale_after`, or the process counts as dead.
    pub fn watched(&self, name: &str, stale_after: Duration) -> Component {
        self.add(name, Some(stale_after))
    }

    /// Adds a part that knows its own condition and is asked for it. The probe must not block, and must not ask this health.
    pub fn probe(&self, name: &str, probe: impl Fn() -> Option<String> + Send + Sync + 'static) {
        self.parts().probes.insert(name.to_owned(), Arc::new(probe));
    }

    /// Adds a part that is asked whether it lives: while the probe gives a reason, the process counts as dead. The same rules.
    pub fn vital_probe(&self, name: &str, probe: impl Fn() -> Option<String> + Send + Sync + 'static) {
        self.parts().vital.insert(name.to_owned(), Arc::new(probe));
    }

    fn add(&self, name: &str, stale_after: Option<Duration>) -> Component {
        let condition = Condition { reason: Some("starting".to_owned()), was_ready: false, stale_after, last_beat: Instant::now() };
        self.parts().conditions.insert(name.to_owned(), condition);
        Component { health: self.clone(), name: name.to_owned() }
    }

    /// Why the process is not alive; empty if it is.
    pub fn dead(&self) -> Vec<String> {
        self.dead_at(Instant::now())
    }

    fn dead_at(&self, now: Instant) -> Vec<String> {
        let stale = |(name, condition): (&String, &Condition)| {
            let (limit, age) = (condition.stale_after?, now.saturating_duration_since(condition.last_beat));
            (age > limit).then(|| format!("{name}: no sign of life for {} s", age.as_secs()))
        };
        let parts = self.parts();
        let lifeless = parts.vital.iter().filter_map(|(name, probe)| Some(format!("{name}: {}", probe()?)));
        parts.conditions.iter().filter_map(stale).chain(lifeless).collect()
    }

    /// Why the process is not ready; empty if it is.
    pub fn unready(&self) -> Vec<String> {
        self.look().1
    }

    /// Whether the process is dead, and why it is not ready, as seen at one moment.
    pub fn look(&self) -> (bool, Vec<String>) {
        let mut reasons = self.dead();
        let is_dead = !reasons.is_empty();
        let parts = self.parts();
        reasons.extend(parts.conditions.iter().filter_map(|(name, condition)| Some(format!("{name}: {}", condition.reason.as_ref()?))));
        let probed = parts.probes.iter().filter_map(|(name, probe)| Some(format!("{name}: {}", probe()?)));
        // What is dead is named already.
        let probed: Vec<String> = probed.filter(|reason| !reasons.contains(reason)).collect();
        reasons.extend(probed);
        (is_dead, reasons)
    }
}

impl Component {
    fn update(&self, change: impl FnOnce(&mut Condition)) {
        if let Some(condition) = self.health.parts().conditions.get_mut(&self.name) {
            condition.last_beat = Instant::now();
            change(condition);
        }
    }

    /// A sign of life.
    pub fn beat(&self) {
        self.update(|_| {});
    }

    pub fn ready(&self) {
        self.update(|condition| (condition.reason, condition.was_ready) = (None, true));
    }

    /// Not ready, and why; logged when the reason changes. That a part which begins waits for something is no warning.
    pub fn not_ready(&self, reason: impl Into<String>) {
        let reason = reason.into();
        self.update(|condition| {
            if condition.reason.as_ref() != Some(&reason) {
                match condition.was_ready {
                    true => tracing::warn!(part = self.name, reason, "not ready"),
                    false => tracing::info!(part = self.name, reason, "not ready yet"),
                }
                condition.reason = Some(reason);
            }
        });
    }
}

/// The process' metrics recorder, installed on first use.
///
/// # Errors
/// A recorder of another kind is installed already.
pub fn recorder() -> Result<PrometheusHandle, HealthError> {
    static HANDLE: OnceLock<Option<PrometheusHandle>> = OnceLock::new();
    HANDLE.get_or_init(|| PrometheusBuilder::new().install_recorder().ok()).clone().ok_or(HealthError::Recorder)
}

#[derive(Clone)]
struct Pages {
    health: Health,
    metrics: PrometheusHandle,
}

/// Serves the pages until the stop, and gives the address (the port is chosen by the system if `address` says 0).
///
/// # Errors
/// The address is not loopback or cannot be listened on.
pub async fn serve(address: SocketAddr, health: Health, shutdown: Shutdown) -> Result<SocketAddr, HealthError> {
    if !address.ip().is_loopback() {
        return Err(HealthError::NotLoopback(address));
    }
    let metrics = recorder()?;
    let listen = |source| HealthError::Listen { address, source };
    let listener = TcpListener::bind(address).await.map_err(listen)?;
    let bound = listener.local_addr().map_err(listen)?;
    let pages = Router::new()
        .route("/livez", get(live))
        .route("/readyz", get(ready))
        .route("/metrics", get(render))
        .with_state(Pages { health, metrics: metrics.clone() });
    tokio::spawn({
        let shutdown = shutdown.clone();
        async move {
            while shutdown.sleep(UPKEEP).await {
                metrics.run_upkeep();
            }
        }
    });
    tokio::spawn(async move {
        let stop = async move { shutdown.triggered().await };
        if let Err(error) = axum::serve(listener, pages).with_graceful_shutdown(stop).await {
            tracing::warn!(%error, "the health pages ended");
        }
    });
    Ok(bound)
}

async fn live(State(pages): State<Pages>) -> Response {
    answer(pages.health.dead())
}

async fn ready(State(pages): State<Pages>) -> Response {
    answer(pages.health.unready())
}

fn answer(reasons: Vec<String>) -> Response {
    if reasons.is_empty() {
        return "ok\n".into_response();
    }
    (StatusCode::SERVICE_UNAVAILABLE, reasons.join("\n") + "\n").into_response()
}

async fn render(State(pages): State<Pages>) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], pages.metrics.render()).into_response()
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;

    async fn fetch(address: SocketAddr, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").as_bytes()).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        (head[9..12].parse().unwrap(), body.to_owned())
    }

    #[tokio::test]
    async fn pages_tell_liveness_readiness_with_reasons_and_metrics() {
        let (health, shutdown) = (Health::new(), Shutdown::new());
        let chain = health.component("chain");
        let address = serve("127.0.0.1:0".parse().unwrap(), health.clone(), shutdown.clone()).await.unwrap();
        assert_eq!(fetch(address, "/livez").await, (200, "ok\n".to_owned()));
        assert_eq!(fetch(address, "/readyz").await, (503, "chain: starting\n".to_owned()));
        chain.ready();
        assert_eq!(fetch(address, "/readyz").await.0, 200);
        chain.not_ready("no block for 60 s");
        assert_eq!(fetch(address, "/readyz").await, (503, "chain: no block for 60 s\n".to_owned()));
        metrics::counter!("quasar_test_total").increment(3);
        let (status, text) = fetch(address, "/metrics").await;
        assert!(status == 200 && text.contains("quasar_test_total 3"), "{text}");
        shutdown.trigger();
    }

    #[test]
    fn a_part_that_knows_its_own_condition_is_asked_for_it() {
        let (health, trouble) = (Health::new(), Arc::new(Mutex::new(None)));
        health.probe("chain", {
            let trouble = trouble.clone();
            move || trouble.lock().unwrap().clone()
        });
        assert!(health.unready().is_empty());
        *trouble.lock().unwrap() = Some("no block for 200 s".to_owned());
        assert_eq!(health.unready(), ["chain: no block for 200 s"]);
        assert!(health.dead().is_empty(), "a chain that stands still is no reason to restart");
    }

    #[test]
    fn a_loop_that_stands_still_makes_the_process_dead_until_it_turns_again() {
        let health = Health::new();
        let driver = health.watched("driver", Duration::from_secs(30));
        driver.ready();
        let begun = Instant::now();
        assert!(health.dead_at(begun + Duration::from_secs(29)).is_empty());
        assert_eq!(health.dead_at(begun + Duration::from_secs(31)).len(), 1);
        std::thread::sleep(Duration::from_millis(20));
        driver.beat();
        assert!(health.dead_at(begun + Duration::from_millis(30_015)).is_empty() && health.unready().is_empty());
    }

    #[tokio::test]
    async fn an_address_that_others_could_reach_is_refused() {
        let refused = serve("0.0.0.0:0".parse().unwrap(), Health::new(), Shutdown::new()).await;
        assert!(matches!(refused, Err(HealthError::NotLoopback(_))));
    }
}
