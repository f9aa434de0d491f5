//! The beacon, and how weights stand.

use super::*;

impl Published {
    fn desk(&self, health: &Health) -> ChainDesk {
        ChainDesk {
            link: Arc::new(ChainLink::connected(Arc::new(self.chain.clone()))),
            hotkey: self.hotkey.clone(),
            netuid: NETUID,
            mechanism: 0,
            run: self.world.context.run,
            journal: self.journal.clone(),
            health: health.component("weights"),
            file: self.state.path().join(chain::WEIGHTS_FILE),
            shown: Mutex::default(),
            kept: Arc::default(),
            genesis: self.chain.genesis(),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_beacon_that_was_seen_once_is_known_without_the_chain() {
    let published = Published::new(&Cheat::default()).await;
    let desk = published.desk(&Health::new());
    let hash = desk.beacon(8).await.unwrap();
    published.chain.set_reachable(false);
    assert_eq!(desk.beacon(8).await.unwrap(), hash);
    assert!(desk.beacon(9).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn how_weights_stand_is_on_the_health_page_and_in_the_state_folder() {
    use ::chain::setter::{Obstacle, Stage};

    use crate::machine::weights::{ScoreList, Standing};

    let (published, health) = (Published::new(&Cheat::default()).await, Health::new());
    let desk = published.desk(&health);
    let standing = |revision, stage| Standing {
        revision,
        stage,
        from: ScoreList { scores: vec![(signer().key().account(), 5)], cycles: 2, is_final: false },
    };
    let written = || -> chain::WeightsFile { serde_json::from_slice(&std::fs::read(&desk.file).unwrap()).unwrap() };
    desk.show(standing(2, Stage::Blocked(Obstacle::NoPermit)));
    let told = health.unready();
    assert!(told.len() == 1 && told[0].contains("validator permit") && told[0].contains("stake"), "{told:?}");
    let file = written();
    assert!(file.needs_a_person && file.stage.contains("validator permit") && file.next.contains("stake"), "{file:?}");
    assert_eq!(file.scores, [chain::ScoreLine { hotkey: signer().key().account().to_string(), tokens: 5 }]);
    // What was overtaken on its way is not shown.
    desk.show(standing(1, Stage::NoScores));
    assert_eq!(written(), file);
    desk.show(standing(3, Stage::OnChain { row: vec![(0, 65535)], block: 60 }));
    assert!(health.unready().is_empty());
    assert!(written().stage.contains("on chain since block 60"));
}
