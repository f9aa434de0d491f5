use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde::Deserialize;

use super::*;

/// Collects numbers: each `Add` asks for its double, `Doubled` closes it, a tick counts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Toy {
    open: Vec<u64>,
    sum: u64,
    ticks: u64,
    next_tick_ms: Option<u64>,
    last_ms: u64,
    limit: Option<u64>,
    stopped: bool,
    effects: VecDeque<Todo>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Todo {
    Double(u64),
    Farewell,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
enum Fact {
    Started,
    Stopping,
    Tick,
    Add(u64),
    Doubled(u64, u64),
    Said,
}

impl Machine for Toy {
    type Input = Fact;
    type Effect = Todo;

    fn handle(&mut self, now_ms: u64, input: Fact) {
        assert!(now_ms >= self.last_ms, "time went back");
        self.last_ms = now_ms;
        match input {
            Fact::Started => self.effects.extend(self.open.iter().copied().map(Todo::Double)),
            Fact::Stopping => self.effects.push_back(Todo::Farewell),
            Fact::Tick => {
                self.ticks += 1;
                self.next_tick_ms = None;
            }
            Fact::Add(number) => {
                self.open.push(number);
                self.effects.push_back(Todo::Double(number));
            }
            Fact::Doubled(number, double) => {
                if let Some(at) = self.open.iter().position(|open| *open == number) {
                    self.open.remove(at);
                    self.sum += double;
                }
            }
            Fact::Said => self.stopped = true,
        }
    }

    fn poll_effect(&mut self) -> Option<Todo> {
        self.effects.pop_front()
    }

    fn replaces(new: &Todo, waiting: &Todo) -> bool {
        (new, waiting) == (&Todo::Farewell, &Todo::Farewell)
    }

    fn deadline(&self) -> Option<u64> {
        self.next_tick_ms
    }

    fn tick() -> Fact {
        Fact::Tick
    }

    fn exit(&self) -> Option<Exit> {
        self.limit.filter(|limit| self.sum >= *limit).map(|_| Exit::Configuration)
    }
}

#[derive(Default)]
struct Doubler {
    running: AtomicUsize,
    most: AtomicUsize,
    done: Mutex<Vec<u64>>,
    pause: Duration,
    panics_at: Option<u64>,
}

impl Executor for Doubler {
    type Input = Fact;
    type Effect = Todo;

    async fn execute(&self, effect: Todo, inputs: Inputs<Fact>) {
        let running = self.running.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(running, Ordering::SeqCst);
        tokio::time::sleep(self.pause).await;
        self.running.fetch_sub(1, Ordering::SeqCst);
        match effect {
            Todo::Double(number) => {
                assert_ne!(Some(number), self.panics_at, "this one is unlucky");
                self.done.lock().unwrap().push(number);
                inputs.send(Fact::Doubled(number, 2 * number)).await;
            }
            Todo::Farewell => inputs.send(Fact::Said).await,
        }
    }
}

fn journal() -> Arc<Journal> {
    Arc::new(Journal::in_memory().unwrap())
}

fn fresh() -> Toy {
    Toy::default()
}

#[tokio::test]
async fn inputs_become_effects_and_their_results_inputs_until_the_stop() {
    let (journal, executor, shutdown) = (journal(), Arc::new(Doubler::default()), Shutdown::new());
    let driver = Driver::new(recover(&journal, fresh).unwrap(), journal.clone(), executor.clone()).last(Fact::Stopping);
    let inputs = driver.inputs();
    let running = tokio::spawn({
        let shutdown = shutdown.clone();
        async move { driver.run(&shutdown).await }
    });
    for number in 1..=100 {
        inputs.send(Fact::Add(number)).await;
    }
    while executor.done.lock().unwrap().len() < 100 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    shutdown.trigger();
    let (machine, exit) = running.await.unwrap().unwrap();
    assert_eq!((machine.sum, machine.open.len(), machine.stopped, exit), (2 * 5050, 0, true, Exit::Done));
    assert!(inputs.is_closed());
    // The snapshot of the stop is the whole truth: nothing is replayed.
    let recovered = recover(&journal, fresh).unwrap();
    assert_eq!((recovered.replayed, recovered.machine), (0, machine));
}

#[tokio::test]
async fn a_kill_at_any_point_and_a_replay_give_the_same_state_and_open_effects_are_done_again() {
    for inputs_before_kill in [0_u64, 1, 5, 40] {
        let directory = tempfile::tempdir().unwrap();
        let executor = Arc::new(Doubler { pause: Duration::from_secs(3600), ..Doubler::default() });
        let options = DriverOptions { snapshot_every: 7, ..DriverOptions::default() };
        let journal = Arc::new(Journal::open(directory.path()).unwrap());
        let recovered = recover(&journal, fresh).unwrap();
        assert!(recovered.is_new);
        let driver = Driver::with_options(recovered, journal.clone(), executor, options);
        let inputs = driver.inputs();
        let running = tokio::spawn(async move { driver.run(&Shutdown::new()).await.map(drop) });
        for number in 1..=inputs_before_kill {
            inputs.send(Fact::Add(number)).await;
        }
        // What is visible in the journal was accepted; the kill comes without warning.
        let accepted = || recover(&journal, fresh).unwrap().machine.open.len() as u64;
        while accepted() < inputs_before_kill {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        running.abort();
        assert!(running.await.unwrap_err().is_cancelled());
        // A commit that was under way when the process died may still have reached the disk.
        while Arc::strong_count(&journal) > 1 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let before = recover(&journal, fresh).unwrap().machine;
        drop(journal);

        let journal = Arc::new(Journal::open(directory.path()).unwrap());
        let recovered = recover(&journal, fresh).unwrap();
        assert_eq!((recovered.is_new, recovered.machine.open.len() as u64), (inputs_before_kill == 0, inputs_before_kill));
        assert_eq!(recovered.machine, before);
        let (executor, shutdown) = (Arc::new(Doubler::default()), Shutdown::new());
        let driver = Driver::new(recovered, journal.clone(), executor.clone()).first(Fact::Started);
        let running = tokio::spawn({
            let shutdown = shutdown.clone();
            async move { driver.run(&shutdown).await }
        });
        while (executor.done.lock().unwrap().len() as u64) < inputs_before_kill {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        shutdown.trigger();
        let (machine, _) = running.await.unwrap().unwrap();
        assert_eq!((machine.open.len(), machine.sum), (0, inputs_before_kill * (inputs_before_kill + 1)));
    }
}

#[tokio::test]
async fn no_more_effects_run_at_once_than_the_limit() {
    let (journal, shutdown) = (journal(), Shutdown::new());
    let executor = Arc::new(Doubler { pause: Duration::from_millis(5), ..Doubler::default() });
    let options = DriverOptions { in_flight_max: 3, ..DriverOptions::default() };
    let machine = Toy { limit: Some(2 * 210), ..Toy::default() };
    let driver = Driver::with_options(Recovered::fresh(machine), journal, executor.clone(), options);
    let inputs = driver.inputs();
    let sender = tokio::spawn(async move {
        for number in 1..=20 {
            inputs.send(Fact::Add(number)).await;
        }
    });
    let (machine, exit) = driver.run(&shutdown).await.unwrap();
    sender.await.unwrap();
    assert_eq!((machine.sum, exit), (420, Exit::Configuration));
    assert_eq!(executor.most.load(Ordering::SeqCst), 3);
}

#[tokio::test]
async fn of_effects_that_replace_each_other_one_waits() {
    let options = DriverOptions { in_flight_max: 1, ..DriverOptions::default() };
    let executor = Arc::new(Doubler { pause: Duration::from_millis(50), ..Doubler::default() });
    let mut driver = Driver::with_options(Recovered::fresh(fresh()), journal(), executor, options);
    let mut batch = vec![Fact::Add(1), Fact::Stopping, Fact::Add(2), Fact::Stopping, Fact::Stopping];
    driver.commit(&mut batch, 1).await.unwrap();
    let waiting = |driver: &Driver<Toy, Doubler>| driver.effects.in_order().cloned().collect::<Vec<_>>();
    assert_eq!(waiting(&driver), [Todo::Double(1), Todo::Farewell, Todo::Double(2)]);
    // What has begun is not taken back.
    driver.begin_effects();
    driver.commit(&mut vec![Fact::Add(1), Fact::Stopping], 2).await.unwrap();
    assert_eq!(waiting(&driver), [Todo::Farewell, Todo::Double(2), Todo::Double(1)]);
}

#[tokio::test]
async fn a_deadline_wakes_the_machine_even_while_inputs_keep_coming() {
    let machine = Toy { next_tick_ms: Some(clock::now_ms() + 30), limit: Some(1_000_000_000), ..Toy::default() };
    let (journal, shutdown) = (journal(), Shutdown::new());
    let driver = Driver::new(Recovered::fresh(machine), journal, Arc::new(Doubler::default()));
    let inputs = driver.inputs();
    let flood = tokio::spawn(async move {
        while !inputs.is_closed() {
            inputs.send(Fact::Doubled(0, 0)).await;
        }
    });
    let stop = tokio::spawn({
        let shutdown = shutdown.clone();
        async move {
            tokio::time::sleep(Duration::from_millis(120)).await;
            shutdown.trigger();
        }
    });
    let (machine, _) = driver.run(&shutdown).await.unwrap();
    flood.await.unwrap();
    stop.await.unwrap();
    assert_eq!(machine.ticks, 1);
}

#[tokio::test]
async fn an_effect_that_panics_ends_the_driver_with_an_error_and_an_intact_journal() {
    let journal = journal();
    let executor = Arc::new(Doubler { panics_at: Some(13), ..Doubler::default() });
    let driver = Driver::new(recover(&journal, fresh).unwrap(), journal.clone(), executor);
    driver.inputs().send(Fact::Add(13)).await;
    let error = driver.run(&Shutdown::new()).await.unwrap_err();
    assert!(matches!(&error, DriverError::EffectPanicked(text) if text.contains("unlucky")), "{error}");
    assert_eq!(recover(&journal, fresh).unwrap().machine.open, [13]);
}

#[tokio::test]
async fn a_stop_does_not_wait_for_ever() {
    let executor = Arc::new(Doubler { pause: Duration::from_secs(3600), ..Doubler::default() });
    let options = DriverOptions { stop_grace: Duration::from_millis(20), ..DriverOptions::default() };
    let (journal, shutdown) = (journal(), Shutdown::new());
    let driver = Driver::with_options(Recovered::fresh(fresh()), journal.clone(), executor, options);
    driver.inputs().send(Fact::Add(1)).await;
    let stop = tokio::spawn({
        let shutdown = shutdown.clone();
        async move {
            tokio::time::sleep(Duration::from_millis(30)).await;
            shutdown.trigger();
        }
    });
    let (machine, exit) = tokio::time::timeout(Duration::from_secs(20), driver.run(&shutdown)).await.unwrap().unwrap();
    stop.await.unwrap();
    assert_eq!((machine.open, exit), (vec![1], Exit::Done));
}

#[test]
fn a_journal_of_another_layout_or_with_foreign_inputs_is_refused_with_a_hint() {
    let journal = Journal::in_memory().unwrap();
    journal.append(&[(1, [255_u8; 3])]).unwrap();
    let error = recover(&journal, fresh).unwrap_err();
    assert!(matches!(error, DriverError::Undecodable { what: "an input", .. }), "{error}");
    assert_eq!(error.exit(), Exit::Configuration);
    journal.put(LAYOUT_KEY, &9_u32.to_le_bytes()).unwrap();
    let error = recover(&journal, fresh).unwrap_err();
    assert!(matches!(error, DriverError::Layout { found: 9, expected: 1 }) && error.to_string().contains("hint: run the version"));
}

#[test]
fn a_replay_shows_each_input_with_its_time() {
    let journal = Journal::in_memory().unwrap();
    let add = |number| encode(&Fact::Add(number), "an input").unwrap();
    journal.append(&[(10, add(3)), (20, add(4))]).unwrap();
    let mut seen = Vec::new();
    let recovered = recover_observed(&journal, fresh, |now_ms, input| seen.push(format!("{now_ms} {input:?}"))).unwrap();
    assert_eq!(seen, ["10 Add(3)", "20 Add(4)"]);
    assert_eq!((recovered.replayed, recovered.last_ms), (2, 20));
}

#[tokio::test]
async fn a_clock_that_was_set_back_by_hours_does_not_stop_the_machine() {
    static WALL_MS: AtomicUsize = AtomicUsize::new(0);
    const HOUR_MS: usize = 3_600_000;
    WALL_MS.store(10 * HOUR_MS, Ordering::SeqCst);
    // The last process saw a clock that was six hours ahead.
    let (last_ms, journal, shutdown) = (16 * HOUR_MS as u64, journal(), Shutdown::new());
    let machine = Toy { next_tick_ms: Some(last_ms + 40), last_ms, limit: Some(1_000_000), ..Toy::default() };
    let recovered = Recovered { last_ms, ..Recovered::fresh(machine) };
    let options = DriverOptions { clock: || WALL_MS.load(Ordering::SeqCst) as u64, ..DriverOptions::default() };
    let driver = Driver::with_options(recovered, journal, Arc::new(Doubler::default()), options);
    let stop = tokio::spawn({
        let shutdown = shutdown.clone();
        async move {
            tokio::time::sleep(Duration::from_millis(200)).await;
            shutdown.trigger();
        }
    });
    let (machine, _) = driver.run(&shutdown).await.unwrap();
    stop.await.unwrap();
    assert_eq!(machine.ticks, 1, "40 ms passed, whatever the clock shows");
}
