//! Endpoints with TLS: a whole conversation over `wss://` with an authority that the system names, and endpoints that are not trusted.
//!
//! The certificate in `data` is valid for 127.0.0.1 until 2126 and nowhere in use; the key of its authority was thrown away.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use chain::devnode::DevOptions;
use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::{Value, json};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use crate::place::{Place, miner, output};

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/chain/data").join(name)
}

/// Takes TLS off in front of the node.
struct Terminator {
    address: SocketAddr,
    /// Connections whose handshake was finished.
    conversations: Arc<AtomicU32>,
}

impl Terminator {
    fn start(place: &Place, ip: Ipv4Addr) -> Self {
        let certificate = CertificateDer::from_pem_file(data("endpoint.pem")).unwrap();
        let key = PrivateKeyDer::from_pem_file(data("endpoint-key.pem")).unwrap();
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key)
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let target = place.node.endpoint().strip_prefix("ws://").unwrap().to_owned();
        let listener = place.runtime.block_on(TcpListener::bind((ip, 0))).unwrap();
        let address = listener.local_addr().unwrap();
        let conversations = Arc::new(AtomicU32::new(0));
        let counted = conversations.clone();
        place.runtime.spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let (acceptor, target, counted) = (acceptor.clone(), target.clone(), counted.clone());
                tokio::spawn(async move {
                    let Ok(mut inside) = acceptor.accept(socket).await else { return };
                    counted.fetch_add(1, Ordering::Relaxed);
                    let mut node = TcpStream::connect(target).await.unwrap();
                    // Either end may close without the farewell of TLS.
                    let _ = copy_bidirectional(&mut inside, &mut node).await;
                });
            }
        });
        Self { address, conversations }
    }

    fn endpoint(&self) -> String {
        format!("wss://{}", self.address)
    }

    fn conversations(&self) -> u32 {
        self.conversations.load(Ordering::Relaxed)
    }
}

/// A command that trusts the authority in this file, and no other.
fn trusting(place: &Place, arguments: &[&str], authority: &Path) -> (i32, String, String) {
    let mut command = place.command("own", &[&["chain"], arguments].concat());
    command.env("SSL_CERT_FILE", authority);
    output(command)
}

#[test]
fn over_tls_the_genesis_is_checked_the_subnet_is_read_and_a_row_is_set_and_read_back() {
    let place = Place::new(DevOptions::default());
    let terminator = Terminator::start(&place, Ipv4Addr::LOCALHOST);
    let authority = data("authority.pem");
    place.name_chain(place.node.genesis(), &terminator.endpoint());

    let (code, stdout, stderr) = trusting(&place, &["status", "--json"], &authority);
    assert_eq!(code, 0, "{stderr}");
    let shown: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!((&shown["endpoint"], &shown["neurons"], &shown["neuron"]["uid"]), (&json!(terminator.endpoint()), &json!(3), &json!(0)));
    assert_eq!(terminator.conversations(), 1);

    let scores = place.path("scores.json").display().to_string();
    let (code, stdout, stderr) = trusting(&place, &["set-weights", "--json", "--scores", &scores], &authority);
    assert_eq!(code, 0, "{stderr}");
    let answer: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(answer["is_on_chain"], true, "{answer}");
    assert_eq!(place.node.weights(0, 0), [(1, 21845), (2, 65535)]);
    let (code, stdout, _) = trusting(&place, &["weights"], &authority);
    assert!(code == 0 && stdout.contains(&miner(2).to_string()), "{stdout}");
    assert_eq!(terminator.conversations(), 3);

    // A trusted certificate says nothing about the network behind it.
    place.name_chain([0x22; 32], &terminator.endpoint());
    let (code, _, stderr) = trusting(&place, &["status"], &authority);
    assert!(code == 78 && stderr.contains("serves another network"), "{code} {stderr}");
}

#[test]
fn an_endpoint_whose_certificate_is_not_trusted_hears_nothing_and_the_reason_is_told() {
    let place = Place::new(DevOptions::default());
    let (terminator, elsewhere) = (Terminator::start(&place, Ipv4Addr::LOCALHOST), Terminator::start(&place, Ipv4Addr::new(127, 0, 0, 2)));
    let scores = place.path("scores.json").display().to_string();
    let told = |endpoint: &Terminator, authority: &Path, reason: &str| {
        place.name_chain(place.node.genesis(), &endpoint.endpoint());
        for arguments in [&["status"][..], &["set-weights", "--scores", &scores]] {
            let (code, stdout, stderr) = trusting(&place, arguments, authority);
            assert!(code == 69 && stdout.is_empty(), "{code} {stdout} {stderr}");
            for part in ["cannot be trusted: ", reason, "hint: ", "SSL_CERT_FILE"] {
                assert!(stderr.contains(part), "{part}: {stderr}");
            }
        }
    };
    // Signed by nobody whom the system trusts: the endpoint's own certificate is no authority.
    told(&terminator, &data("endpoint.pem"), "invalid peer certificate");
    told(&terminator, &place.path("nowhere.pem"), "No CA certificates were loaded");
    // Signed, but for another name.
    told(&elsewhere, &data("authority.pem"), "127.0.0.2");
    assert_eq!((terminator.conversations(), elsewhere.conversations()), (0, 0));
    assert_eq!(place.node.weights(0, 0), []);
}

#[test]
fn an_untrusted_endpoint_is_passed_over_for_the_next_one() {
    let place = Place::new(DevOptions::default());
    let elsewhere = Terminator::start(&place, Ipv4Addr::new(127, 0, 0, 2));
    place.name_chain(place.node.genesis(), "unused");
    let both = format!("{},{}", elsewhere.endpoint(), place.node.endpoint());
    let (code, stdout, stderr) = trusting(&place, &["status", "--chain-endpoints", &both], &data("authority.pem"));
    assert!(code == 0 && stdout.contains(&place.node.endpoint()), "{code} {stdout} {stderr}");
}
