//! What systemd hears of a daemon that it has started: that it is up, how it is doing, and, again and again, that it lives.
//!
//! `systemctl status` shows the reasons for which the daemon is not ready (a chain that stands still among them). The signs of life
//! stop when a loop stands still that must turn, and systemd then restarts the process after the unit's `WatchdogSec=`. Without
//! systemd nothing happens here. Source: sd_notify(3), sd_watchdog_enabled(3).

use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;
use std::time::Duration;

use crate::Shutdown;
use crate::health::Health;

/// How often the state is told where the unit has no watchdog.
const INTERVAL: Duration = Duration::from_secs(20);
/// Signs of life come so many times within the time after which systemd gives up.
const SIGNS_PER_LIMIT: u32 = 3;

/// Reports to the systemd that started this process, if one did, until the stop.
pub fn report(health: &Health, shutdown: &Shutdown) {
    let Some(address) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let limit = std::env::var("WATCHDOG_USEC").ok().and_then(|text| text.parse().ok()).map(Duration::from_micros);
    match Supervisor::connect(Path::new(&address)) {
        Ok(supervisor) => drop(tokio::spawn(supervisor.run(health.clone(), shutdown.clone(), limit))),
        Err(error) => tracing::warn!(%error, "systemd cannot be told how this process is doing"),
    }
}

struct Supervisor {
    socket: UnixDatagram,
}

impl Supervisor {
    fn connect(path: &Path) -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        // A name that begins with @ lies in no file system.
        match path.as_os_str().as_bytes().strip_prefix(b"@") {
            Some(name) => socket.connect_addr(&SocketAddr::from_abstract_name(name)?)?,
            None => socket.connect(path)?,
        }
        socket.set_nonblocking(true)?;
        Ok(Self { socket })
    }

    async fn run(self, health: Health, shutdown: Shutdown, limit: Option<Duration>) {
        let interval = limit.map_or(INTERVAL, |limit| limit / SIGNS_PER_LIMIT);
        self.tell("READY=1");
        loop {
            self.tell(&state(&health, limit.is_some()));
            if !shutdown.sleep(interval).await {
                self.tell("STOPPING=1");
                return;
            }
        }
    }

    fn tell(&self, message: &str) {
        if let Err(error) = self.socket.send(message.as_bytes()) {
            tracing::debug!(%error, "systemd did not take a message");
        }
    }
}

/// The message: how it is doing, and a sign of life unless something is dead.
fn state(health: &Health, has_watchdog: bool) -> String {
    // Seen once: what ends the signs of life is in the reasons.
    let (is_dead, reasons) = health.look();
    let status = if reasons.is_empty() { "ready".to_owned() } else { reasons.join("; ").replace('\n', "; ") };
    let sign = if has_watchdog && !is_dead { "\nWATCHDOG=1" } else { "" };
    format!("STATUS={status}{sign}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stalled_chain_is_told_and_only_a_dead_loop_ends_the_signs_of_life() {
        let health = Health::new();
        assert_eq!(state(&health, true), "STATUS=ready\nWATCHDOG=1");
        assert_eq!(state(&health, false), "STATUS=ready");
        health.probe("chain", || Some("no block for 200 s".to_owned()));
        assert_eq!(state(&health, true), "STATUS=chain: no block for 200 s\nWATCHDOG=1");
        let driver = health.watched("driver", Duration::ZERO);
        driver.ready();
        std::thread::sleep(Duration::from_millis(2));
        let told = state(&health, true);
        assert!(told.contains("driver: no sign of life") && !told.contains("WATCHDOG"), "{told}");
    }

    #[tokio::test]
    async fn systemd_hears_of_the_start_the_state_and_the_stop() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let systemd = UnixDatagram::bind(&path).unwrap();
        systemd.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let shutdown = Shutdown::new();
        let telling =
            tokio::spawn(Supervisor::connect(&path).unwrap().run(Health::new(), shutdown.clone(), Some(Duration::from_secs(600))));
        shutdown.trigger();
        telling.await.unwrap();
        let mut heard = Vec::new();
        let mut buffer = [0; 256];
        while heard.last().is_none_or(|last| last != "STOPPING=1") {
            let length = systemd.recv(&mut buffer).unwrap();
            heard.push(String::from_utf8_lossy(&buffer[..length]).into_owned());
        }
        assert_eq!(heard, ["READY=1", "STATUS=ready\nWATCHDOG=1", "STOPPING=1"]);
    }
}
