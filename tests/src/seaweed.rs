//! A SeaweedFS server on loopback, as a process of its own: `cargo xtask setup --s3` installs the program.

use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Names the program.
pub const VARIABLE: &str = "QUASAR_DEV_SEAWEEDFS";
pub const ACCESS_KEY: &str = "quasar-test";
pub const SECRET_KEY: &str = "quasar-test-secret";
const START: Duration = Duration::from_secs(120);

/// A running server; it ends with this.
pub struct Seaweed {
    child: Child,
    pub endpoint: String,
}

/// Ports that are free just now. Its gRPC ports are told too: by default they lie 10,000 higher.
fn free_ports<const N: usize>() -> [u16; N] {
    let listeners = [(); N].map(|()| TcpListener::bind(("127.0.0.1", 0)).expect("a free port"));
    listeners.map(|listener| listener.local_addr().expect("a bound socket has an address").port())
}

impl Seaweed {
    /// Starts a server that keeps its data in `folder`; `None` where the program is not installed.
    pub fn start(folder: &Path) -> Option<Self> {
        let program = std::env::var_os(VARIABLE)?;
        let identities = folder.join("identities.json");
        std::fs::create_dir_all(folder).expect("a folder for the server");
        let text = serde_json::json!({ "identities": [{
            "name": "admin",
            "credentials": [{ "accessKey": ACCESS_KEY, "secretKey": SECRET_KEY }],
            "actions": ["Admin", "Read", "List", "Tagging", "Write"],
        }] });
        std::fs::write(&identities, text.to_string()).expect("the identities are written");
        let [s3, s3_grpc, master, master_grpc, volume, volume_grpc, filer, filer_grpc, admin, admin_grpc] = free_ports();
        let mut command = Command::new(program);
        command.arg("mini").arg(format!("-dir={}", folder.display())).arg(format!("-s3.config={}", identities.display()));
        // Telemetry is on by default and would report to its vendor; the rest is not needed.
        command.args(["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false", "-webdav=false", "-admin.ui=false"]);
        command.args(["-s3.port.iceberg=0", "-s3.port.lance=0"]);
        let ports = [
            ("s3.port", s3),
            ("s3.port.grpc", s3_grpc),
            ("master.port", master),
            ("master.port.grpc", master_grpc),
            ("volume.port", volume),
            ("volume.port.grpc", volume_grpc),
            ("filer.port", filer),
            ("filer.port.grpc", filer_grpc),
            ("admin.port", admin),
            ("admin.port.grpc", admin_grpc),
        ];
        command.args(ports.map(|(name, port)| format!("-{name}={port}")));
        let log = std::fs::File::create(folder.join("weed.log")).expect("a log file");
        let errors = log.try_clone().expect("a second handle on the log");
        let child = command.stdin(Stdio::null()).stdout(log).stderr(errors).spawn().expect("SeaweedFS starts");
        let mut server = Self { child, endpoint: format!("http://127.0.0.1:{s3}") };
        let begun = Instant::now();
        while TcpStream::connect(("127.0.0.1", s3)).is_err() {
            let ended = server.child.try_wait().expect("the child can be asked");
            assert!(ended.is_none(), "SeaweedFS ended: {ended:?}; see {}", folder.join("weed.log").display());
            assert!(begun.elapsed() < START, "SeaweedFS does not listen; see {}", folder.join("weed.log").display());
            std::thread::sleep(Duration::from_millis(50));
        }
        Some(server)
    }
}

impl Drop for Seaweed {
    fn drop(&mut self) {
        // It holds nothing that outlives the test.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
