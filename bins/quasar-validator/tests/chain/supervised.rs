//! The daemon under a supervisor that speaks systemd's protocol: when it is up, its signs of life, and its end.

use std::os::unix::net::UnixDatagram;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use chain::devnode::DevOptions;

use crate::place::{Place, miner};

/// What the unit's `WatchdogSec=` says, in microseconds: a sign of life is due in every third of it.
const WATCHDOG_USEC: &str = "600000";
/// Messages that are listened to where none of them may be, or each of them must be, a sign of life.
const MESSAGES: usize = 6;
const PATIENCE: Duration = Duration::from_secs(60);

struct Supervised {
    socket: UnixDatagram,
    daemon: Child,
}

/// A failed test leaves no process behind.
impl Drop for Supervised {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

fn is_sign(message: &str) -> bool {
    message.lines().any(|line| line == "WATCHDOG=1")
}

impl Supervised {
    fn start(place: &Place) -> Self {
        let path = place.path("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let owner = miner(1).to_string();
        let mut command = place.command("own", &["run", "--owner-identity", &owner, "--device", "cpu"]);
        // Nobody has a bucket there: a run is waited for.
        command.args(["--s3-bucket", "b", "--s3-endpoint-url", "http://127.0.0.1:1"]);
        command.env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", WATCHDOG_USEC).env("QUASAR_CHAIN_STALL_SEC", "3");
        command.stdout(Stdio::null()).stderr(Stdio::null());
        Self { socket, daemon: command.spawn().unwrap() }
    }

    fn hear(&self) -> String {
        let mut buffer = [0; 4096];
        let length = self.socket.recv(&mut buffer).expect("the daemon says how it is doing");
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    }

    /// Listens until a message is what is waited for.
    fn hear_until(&self, what: &str, is_it: impl Fn(&str) -> bool) -> String {
        let begun = Instant::now();
        loop {
            let message = self.hear();
            if is_it(&message) {
                return message;
            }
            assert!(begun.elapsed() < PATIENCE, "{what}: {message}");
        }
    }

    /// After the first message without a sign of life there is none, and the reason is told.
    fn falls_silent(&self, reason: &str) {
        let first = self.hear_until("the signs of life end", |message| !is_sign(message));
        for message in std::iter::once(first).chain((0..MESSAGES).map(|_| self.hear())) {
            assert!(!is_sign(&message) && message.contains("STATUS=chain: ") && message.contains(reason), "{message}");
        }
    }

    /// After the first sign of life they come regularly.
    fn comes_back(&self) {
        self.hear_until("signs of life", is_sign);
        for _ in 0..MESSAGES {
            let message = self.hear();
            assert!(is_sign(&message), "{message}");
        }
    }
}

#[test]
fn systemd_hears_signs_of_life_while_blocks_arrive_and_none_over_a_silent_socket() {
    let place = Place::new(DevOptions::default());
    let mut supervised = Supervised::start(&place);
    assert_eq!(supervised.hear(), "READY=1");
    supervised.hear_until("the chain is connected", |message| message.contains("STATUS=run: "));
    let begun = Instant::now();
    for _ in 0..3 {
        supervised.comes_back();
    }
    let signs = 3 * (MESSAGES as u32 + 1);
    let limit = Duration::from_micros(WATCHDOG_USEC.parse().unwrap());
    assert!(begun.elapsed() < limit * signs, "{signs} signs in {:?}", begun.elapsed());

    // The socket stays open and nothing is answered.
    place.node.silence(true);
    supervised.falls_silent("does not answer");
    place.node.silence(false);
    supervised.comes_back();
    // Everything is answered, and no block comes.
    place.node.stall(true);
    supervised.falls_silent("stand still");
    place.node.stall(false);
    supervised.comes_back();

    let pid = supervised.daemon.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    supervised.hear_until("the stop", |message| message == "STOPPING=1");
    assert_eq!(supervised.daemon.wait().unwrap().code(), Some(0));
}

#[test]
fn a_chain_that_stood_still_before_the_start_is_told_without_asking_for_another_start() {
    let place = Place::new(DevOptions::default());
    place.node.stall(true);
    let supervised = Supervised::start(&place);
    let stalled = supervised.hear_until("the stall is told", |message| message.contains("stand still"));
    assert!(is_sign(&stalled), "{stalled}");
    for _ in 0..MESSAGES {
        assert!(is_sign(&supervised.hear()));
    }
}
