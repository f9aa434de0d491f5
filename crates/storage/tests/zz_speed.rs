use bytes::Bytes;
use quasar_storage::client::*;
use quasar_storage::server::*;
use quasar_storage::*;
#[tokio::test]
async fn speed() {
    for disk in [false, true] {
    let folder = tempfile::tempdir().unwrap();
    let server = S3Server::start(ServerSettings { backend: if disk {Backend::Disk(folder.path().to_owned())} else {Backend::Memory}, bucket: "quasar".into(), access_key: "access".into(), secret_key: "secret".into(), public_prefixes: vec!["q/public/".into()], listen: "127.0.0.1:0".parse().unwrap() }).await.unwrap();
    let store = S3Store::new(S3Settings { endpoint: Some(server.endpoint()), region: "us-east-1".into(), bucket: "quasar".into(), access_key: Some("access".into()), secret_key: Some("secret".into()), path_style: true }).unwrap();
    let public = PublicReader::new(&server.endpoint(), "quasar").unwrap();
    let grants = GrantClient::new(vec![server.address().to_string()]).unwrap();
    let etag = store.put("q/public/head", Bytes::from(vec![0u8; 4000]), PutCondition::Always).await.unwrap();
    let t = std::time::Instant::now();
    for _ in 0..1000 { public.get("q/public/head", Some(&etag), 1 << 20).await.unwrap(); }
    println!("disk={disk} 304 poll {:?}", t.elapsed() / 1000);
    let t = std::time::Instant::now();
    for _ in 0..1000 { public.get("q/public/head", None, 1 << 20).await.unwrap(); }
    println!("public get 4k {:?}", t.elapsed() / 1000);
    let t = std::time::Instant::now();
    for _ in 0..300 { store.get("q/public/head", 1 << 20).await.unwrap(); }
    println!("sdk get 4k {:?}", t.elapsed() / 300);
    let t = std::time::Instant::now();
    for _ in 0..100 { store.put("q/public/head", Bytes::from(vec![0u8; 4000]), PutCondition::Always).await.unwrap(); }
    println!("sdk put 4k {:?}", t.elapsed() / 100);
    let big = Bytes::from(vec![1u8; 1 << 20]);
    let t = std::time::Instant::now();
    for i in 0..50 { store.put(&format!("q/b/{i}"), big.clone(), PutCondition::Always).await.unwrap(); }
    println!("sdk put 1M {:?}", t.elapsed() / 50);
    let t = std::time::Instant::now();
    for i in 0..50 { store.get(&format!("q/b/{i}"), 1<<21).await.unwrap(); }
    println!("sdk get 1M {:?}", t.elapsed() / 50);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as u64;
    let t = std::time::Instant::now();
    let mut gs = vec![];
    for i in 0..1000 { gs.push(store.presign(&Presign::Get { key: format!("q/b/{}", i%50), now_ms: now, expires_in_ms: 60000 }).unwrap()); }
    println!("presign {:?}", t.elapsed() / 1000);
    let t = std::time::Instant::now();
    for g in &gs[..50] { grants.get(g, None, 1<<21).await.unwrap(); }
    println!("grant get 1M {:?}", t.elapsed() / 50);
    let sha = protocol::Digest::sha256(&big);
    let gs: Vec<_> = (0..50).map(|i| store.presign(&Presign::Put { key: format!("q/c/{i}"), length: 1<<20, sha256: Some(sha), if_absent: true, now_ms: now, expires_in_ms: 60000 }).unwrap()).collect();
    let t = std::time::Instant::now();
    for g in &gs { grants.put(g, big.clone()).await.unwrap(); }
    println!("grant put 1M {:?}", t.elapsed() / 50);
    }
}
