//! What pollers tell, and that nobody waits for somebody else's record.

use daemon::driver::{Driver, Executor, Inputs, Recovered};
use protocol::documents::{Action, FragmentProgress, Order};
use protocol::envelope::{Purpose, SKEW_MS};
use serde::Serialize;

use super::writers::Slow;
use super::*;
use crate::effects::pollers::{poll_orders, spawn_progress};

/// A machine that writes down what it is told, and ends when that is as much as it wants.
#[derive(Serialize)]
struct Listener {
    heard: Vec<Input>,
    wanted: usize,
}

impl Machine for Listener {
    type Input = Input;
    type Effect = ();

    fn handle(&mut self, _now_ms: u64, input: Input) {
        self.heard.push(input);
    }

    fn poll_effect(&mut self) -> Option<()> {
        None
    }

    fn deadline(&self) -> Option<u64> {
        None
    }

    fn tick() -> Input {
        Input::Tick
    }

    fn exit(&self) -> Option<Exit> {
        (self.heard.len() >= self.wanted).then_some(Exit::Done)
    }
}

struct Idle;

impl Executor for Idle {
    type Input = Input;
    type Effect = ();

    async fn execute(&self, _effect: (), _inputs: Inputs<Input>) {}
}

fn listener(wanted: usize) -> Driver<Listener, Idle> {
    let journal = Arc::new(Journal::in_memory().unwrap());
    Driver::new(Recovered::fresh(Listener { heard: Vec::new(), wanted }), journal, Arc::new(Idle))
}

/// What is heard while `writing` goes on, which takes no longer than `patience`.
async fn heard(driver: Driver<Listener, Idle>, writing: impl Future<Output = ()>, patience: Duration) -> Vec<Input> {
    let shutdown = Shutdown::new();
    let hearing = async {
        tokio::select! {
            ended = driver.run(&shutdown) => ended.unwrap().0.heard,
            () = writing => panic!("it was not heard"),
        }
    };
    tokio::time::timeout(patience, hearing).await.expect("it is heard in time")
}

/// The record of a learner with this number and so many steps, signed so long ago.
fn record(bucket: &Bucket, learner: u8, number: u64, age_ms: u64) -> Vec<u8> {
    let record = Progress {
        worker: "learner".into(),
        session_epoch: 1,
        slot: 0,
        protocol: 1,
        state: LearnerState::Training,
        reason: Reason::None,
        lease: 0,
        lease_step: 0,
        local_step: number,
        step_ms: 1,
        loss: 0,
        step_chain: Digest::ZERO,
        fragments: vec![FragmentProgress::default(); 2],
        commitments: Vec::new(),
        uploaded: Vec::new(),
        openings: Vec::new(),
        receipt: None,
        padding: Vec::new(),
    };
    sign(&record, &bucket.context, &Ed25519Signer::from_seed([learner; 32]), number, daemon::clock::now_ms() - age_ms)
}

#[tokio::test]
async fn a_record_whose_read_hangs_holds_up_no_other_record() {
    let (bucket, folder) = (Bucket::new().await, tempfile::tempdir().unwrap());
    let (service, _journal) = bucket.orchestrator(folder.path()).await;
    let [hung, other] = [miner(11), miner(12)];
    let slow = Slow::new(&bucket, &service.run.progress(&hung, 0));
    let service = Arc::new(with_store(service, Arc::new(slow)));
    service.watch(1, vec![(hung, 0), (other, 0)], Vec::new());
    let (driver, shutdown) = (listener(5), Shutdown::new());
    spawn_progress(&service, &driver.inputs(), &shutdown);
    let writing = async {
        for number in 1.. {
            bucket.put(&service.run.progress(&other, 0), record(&bucket, 12, number, 0)).await;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    // The read that hangs ends after three seconds: if each round waited for it, five records would take twelve.
    let heard = heard(driver, writing, Duration::from_secs(8)).await;
    assert!(heard.iter().all(|input| matches!(input, Input::Progress { slot, .. } if *slot == (other, 0))), "{heard:?}");
    shutdown.trigger();
}

#[tokio::test]
async fn a_slot_that_falls_silent_is_read_on_from_what_was_seen_of_it() {
    let (bucket, folder) = (Bucket::new().await, tempfile::tempdir().unwrap());
    let (service, _journal) = bucket.orchestrator(folder.path()).await;
    let mut service = with_store(service, bucket.store());
    service.manifest.parameters.poll_ms = 20;
    let (service, slot) = (Arc::new(service), (miner(11), 0));
    let key = service.run.progress(&slot.0, 0);
    bucket.put(&key, record(&bucket, 11, 5, 0)).await;
    service.watch(1, vec![slot], Vec::new());
    let (driver, shutdown) = (listener(2), Shutdown::new());
    spawn_progress(&service, &driver.inputs(), &shutdown);
    let writing = async {
        while !service.records.lock().unwrap().contains_key(&slot) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        service.watch(2, Vec::new(), vec![slot]);
        // Somebody puts an old one back; whoever reads the silent slots knows of the newer one.
        bucket.put(&key, record(&bucket, 11, 3, 0)).await;
        tokio::time::sleep(Duration::from_millis(600)).await;
        bucket.put(&key, record(&bucket, 11, 6, 2 * SKEW_MS)).await;
        std::future::pending::<()>().await
    };
    let told: Vec<(u64, bool)> = heard(driver, writing, Duration::from_secs(10))
        .await
        .into_iter()
        .map(|input| match input {
            Input::Progress { record, is_current, .. } => (record.local_step, is_current),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(told, [(5, true), (6, false)], "one that was signed two minutes ago counts, and is no sign that anybody is heard now");
    shutdown.trigger();
}

#[tokio::test]
async fn what_is_too_long_for_an_order_is_none_and_those_behind_it_are_taken_by_whoever_reads_them() {
    let (bucket, folder) = (Bucket::new().await, tempfile::tempdir().unwrap());
    let (service, journal) = bucket.orchestrator(folder.path()).await;
    let order = Order { number: 2, action: Action::Release, reason: "a test".into() };
    bucket.put(&service.run.order(1), vec![7; Purpose::Order.file_limit() as usize + 1]).await;
    bucket.publish(&service.run.order(2), &order).await;
    let (driver, shutdown) = (listener(2), Shutdown::new());
    tokio::spawn(poll_orders(service.clone(), 0, driver.inputs(), shutdown.clone()));
    let taken: Vec<(u64, bool)> = heard(driver, std::future::pending(), Duration::from_secs(20))
        .await
        .into_iter()
        .map(|input| match input {
            Input::Order { order } => (order.number, order.order.is_ok()),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(taken, [(1, false), (2, true)]);
    shutdown.trigger();
    // A successor that has nothing but the bucket.
    let head = service.claim_head(1).await.unwrap();
    let (recovered, _) = takeover::recover(&service, &journal, head, bucket.fresh()).await.unwrap();
    assert_eq!(recovered.machine.orders_taken(), 2);
}
