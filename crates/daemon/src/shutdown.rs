//! A stop that is asked for once and seen everywhere: SIGTERM, SIGINT, or our own decision.

use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Exit code of a process that was told twice to stop, as shells report an interrupt.
const EXIT_INTERRUPTED: i32 = 130;

/// Clonable handle on one stop request.
#[derive(Clone, Debug)]
pub struct Shutdown {
    sender: watch::Sender<bool>,
}

impl Default for Shutdown {
    fn default() -> Self {
        Self::new()
    }
}

impl Shutdown {
    /// A request that nobody has made yet.
    pub fn new() -> Self {
        Self { sender: watch::Sender::new(false) }
    }

    /// A request that the first SIGTERM or SIGINT makes. A second signal ends the process at once, for the person who
    /// cannot wait; the journal is written before anything is done, so nothing is lost by that.
    ///
    /// # Errors
    /// The signal handlers cannot be installed.
    pub fn on_signals() -> std::io::Result<Self> {
        let shutdown = Self::new();
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let asked = shutdown.clone();
        tokio::spawn(async move {
            let mut next = async || {
                tokio::select! {
                    _ = terminate.recv() => "SIGTERM",
                    _ = interrupt.recv() => "SIGINT",
                }
            };
            let name = next().await;
            tracing::info!(signal = name, "stopping; a second signal ends the process at once");
            asked.trigger();
            next().await;
            std::process::exit(EXIT_INTERRUPTED);
        });
        Ok(shutdown)
    }

    /// Asks for the stop; asking again changes nothing.
    pub fn trigger(&self) {
        self.sender.send_replace(true);
    }

    pub fn is_triggered(&self) -> bool {
        *self.sender.borrow()
    }

    /// Resolves once the stop was asked for.
    pub async fn triggered(&self) {
        let mut receiver = self.sender.subscribe();
        // The sender lives as long as `self`, so waiting cannot fail.
        let _ = receiver.wait_for(|asked| *asked).await;
    }

    /// Sleeps, unless the stop comes first; returns whether the whole time passed.
    pub async fn sleep(&self, duration: Duration) -> bool {
        tokio::select! {
            () = tokio::time::sleep(duration) => true,
            () = self.triggered() => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn every_clone_sees_the_request_and_late_ones_too() {
        let shutdown = Shutdown::new();
        let waiting = tokio::spawn({
            let clone = shutdown.clone();
            async move { clone.triggered().await }
        });
        assert!(!shutdown.is_triggered());
        shutdown.trigger();
        waiting.await.unwrap();
        shutdown.clone().triggered().await;
        assert!(!shutdown.sleep(Duration::from_secs(600)).await);
    }

    #[tokio::test]
    async fn sigterm_triggers() {
        let shutdown = Shutdown::on_signals().unwrap();
        let pid = std::process::id().to_string();
        assert!(std::process::Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        tokio::time::timeout(Duration::from_secs(10), shutdown.triggered()).await.unwrap();
    }
}
