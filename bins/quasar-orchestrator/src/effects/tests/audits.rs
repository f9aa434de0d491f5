//! What audits are drawn with.

use chain::{Neuron, STATE_BLOCKS};

use super::*;

#[tokio::test]
async fn who_could_audit_is_written_down_once_and_where_that_is_forgotten_nobody_audits() {
    let (bucket, folder, chain) = (Bucket::new().await, tempfile::tempdir().unwrap(), chain());
    let (service, _journal) = bucket.orchestrator(folder.path()).await;
    let Ok(mut service) = Arc::try_unwrap(service) else { panic!("nobody else holds it") };
    service.chain = Arc::new(ChainLink::connected(Arc::new(chain.clone())));
    let permitted = |index: u8| Neuron {
        uid: u16::from(index),
        hotkey: miner(index),
        coldkey: miner(index),
        stake: 1,
        validator_permit: true,
        last_update: 0,
    };
    let block = chain.register(permitted(1)).number;
    chain.register(permitted(2));
    let draw = service.draw_audits(0, block).await;
    assert_eq!((draw.beacon_block, &draw.validators), (block, &vec![miner(1)]));
    // An endpoint that lags behind says that it knows nothing of the block: it is asked again.
    chain.forget(block + 1);
    let patience = Duration::from_millis(300);
    assert!(tokio::time::timeout(patience, service.draw_audits(1, block)).await.is_err());
    chain.advance(STATE_BLOCKS);
    assert!(service.draw_audits(1, block).await.validators.is_empty());
    assert_eq!(service.draw_audits(0, block).await, draw, "what lies there stands");
}
