//! Simulated worlds: every role's real machine, and everything that can go wrong. `cargo xtask sim` runs more of them.

use std::collections::BTreeSet;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use protocol::documents::Action;
use protocol::schedule::pull_interval_ms;
use quasar_tests::sim::paper::Scheme;
use quasar_tests::sim::{self, Boundary, CrashPoint, FailingRequest, Faults, INVARIANTS, Outcome, Permit, Plan};

/// Every invariant held; if not, it is told with `replay`, what gives the same world again.
fn must_hold(outcome: &Outcome, replay: &str) {
    let told: Vec<String> = outcome.violations.iter().map(ToString::to_string).collect();
    assert!(told.is_empty(), "{}\nreplay: {replay}", told.join("\n"));
}

/// The command for a world as [`Plan::of_seed`] draws it.
fn command(seed: u64, miners: usize, cycles: u64) -> String {
    format!("cargo xtask sim --seeds 1 --first-seed {seed} --miners {miners} --cycles {cycles}")
}

/// For a world whose plan is changed here: no command line says that, but the same test runs the same world.
fn this_test(seed: u64, change: &str) -> String {
    let name = std::thread::current().name().unwrap_or_default().to_owned();
    format!("cargo nextest run -p quasar-tests -E 'test(={name})': the world of seed {seed}, {change}")
}

#[test]
fn fifty_worlds_of_fifty_miners_hold_every_invariant() {
    const MINERS: usize = 50;
    const CYCLES: u64 = 3;
    each(&(1..=50).collect::<Vec<u64>>(), |seed| {
        must_hold(&sim::run(Plan::of_seed(*seed, MINERS, CYCLES)), &command(*seed, MINERS, CYCLES));
    });
}

#[test]
fn long_runs_delete_what_nobody_needs_and_nothing_else() {
    let mut rollbacks = 0;
    for seed in 1..=6 {
        let mut plan = Plan::of_seed(seed, 6, 14);
        plan.parameters.release_every_cycles = 2;
        plan.parameters.audit.opening_ms = 20_000;
        // Fourteen cycles and a rollback may take more than an hour.
        plan.limit_ms *= 2;
        let at_ms = plan.faults.until_ms * 3 / 4;
        plan.orders.push((at_ms, Action::Rollback { version: 5 + seed % 3 }));
        plan.orders.sort_by_key(|(at_ms, _)| *at_ms);
        let outcome = sim::run(plan);
        must_hold(&outcome, &this_test(seed, "releases and a rollback added"));
        let status = outcome.status.expect("an orchestrator runs in the end");
        assert!(status.rollback_from > 0, "seed {seed}: nothing was deleted: {status:#?}");
        rollbacks += status.outcomes.iter().filter(|order| order.done && order.text.contains("goes back")).count();
    }
    assert!(rollbacks > 0, "every rollback was refused");
}

#[test]
fn who_audits_a_cycle_does_not_change_with_permits_that_change_later() {
    for seed in 1..=3 {
        let mut plan = Plan::calm(seed, 8, 4);
        let span_ms = 4 * 24 * plan.step_ms;
        plan.validators = 3;
        plan.faults = Faults { until_ms: 2 * span_ms, validator_crash_ms: span_ms / 8, ..Faults::default() };
        // The last validator has none from the middle of the run on; whoever restarts draws the cycles before once more.
        plan.permits.push(Permit { uid: 8 + 2, changed_ms: span_ms / 2, back_ms: plan.limit_ms });
        must_hold(&sim::run(plan), &this_test(seed, "a permit that goes"));
    }
}

#[test]
fn the_same_seed_gives_the_same_world_event_by_event() {
    for seed in [3, 4] {
        let [one, two] = [0, 1].map(|_| sim::run(Plan::of_seed(seed, 8, 2)));
        assert_eq!((one.trace, one.events, one.model), (two.trace, two.events, two.model));
    }
    assert_ne!(sim::run(Plan::of_seed(3, 8, 2)).trace, sim::run(Plan::of_seed(4, 8, 2)).trace);
}

#[test]
fn worlds_with_real_signatures_and_sealed_grants_hold_every_invariant() {
    for seed in 1..=2 {
        let plan = Plan { scheme: Scheme::Ed25519, ..Plan::of_seed(seed, 6, 2) };
        must_hold(&sim::run(plan), &(command(seed, 6, 2) + " --scheme ed25519"));
    }
}

/// Looks at each point of an enumeration, side by side.
fn each<T: Sync>(points: &[T], look: impl Fn(&T) + Sync) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some(point) = points.get(next.fetch_add(1, Ordering::Relaxed)) {
                    look(point);
                }
            });
        }
    });
}

/// Crashes a run at each so many-th boundary in turn, with its disk and without.
fn dies_everywhere(plan: &Plan, replay: &str, every: usize) {
    let whole = sim::run(plan.clone());
    // Nothing ends there: the run without a crash.
    must_hold(&whole, &format!("{replay} --point 0"));
    assert_eq!(whole.crashes, 0);
    assert!(whole.effects > 200 && whole.writes > whole.effects, "{} effects, {} writes", whole.effects, whole.writes);
    let effects = (1..=whole.effects).map(|count| (Boundary::Effect, count));
    let writes = (1..=whole.writes).map(|count| (Boundary::Write, count));
    let points: Vec<CrashPoint> = effects
        .chain(writes)
        .step_by(every)
        .flat_map(|(boundary, count)| [false, true].map(|loses_disk| CrashPoint { boundary, count, loses_disk }))
        .collect();
    each(&points, |point| {
        let outcome = sim::run_crashing(plan.clone(), *point);
        assert_eq!(outcome.crashes, 1, "{point:?}");
        let writes = if point.boundary == Boundary::Write { " --writes" } else { "" };
        let disk = if point.loses_disk { " --lose-disk" } else { "" };
        must_hold(&outcome, &format!("{replay} --point {}{writes}{disk}", point.count));
    });
}

#[test]
fn an_orchestrator_that_dies_at_any_effect_or_write_with_or_without_its_disk_merges_everything_once() {
    dies_everywhere(&sim::small(1, 3), "cargo xtask sim crash-points --seed 1 --miners 3", 1);
}

#[test]
fn an_orchestrator_that_dies_while_an_operator_has_a_hand_in_the_run_takes_each_order_once() {
    let plan = sim::operated(1, 3);
    let status = sim::run(plan.clone()).status.expect("an orchestrator runs in the end");
    assert_eq!(status.outcomes.iter().filter(|order| order.done).count(), 6, "{:#?}", status.outcomes);
    assert!(status.rollback_from > 0, "old versions are deleted: {status:#?}");
    dies_everywhere(&plan, "cargo xtask sim crash-points --operated --seed 1 --miners 3", 7);
}

#[test]
fn whatever_request_of_the_orchestrator_fails_everything_is_merged_once() {
    let plan = sim::small(1, 3);
    let [reads, writes] = sim::run(plan.clone()).requests;
    assert!(reads > 1_000 && writes > 500, "{reads} reads, {writes} writes");
    // Most reads are polls that find nothing new.
    let reads = (1..=reads).step_by(5).map(|count| FailingRequest { is_write: false, count, is_done: false });
    let writes = (1..=writes).flat_map(|count| [false, true].map(|is_done| FailingRequest { is_write: true, count, is_done }));
    each(&reads.chain(writes).collect::<Vec<_>>(), |request| {
        let FailingRequest { is_write, count, is_done } = *request;
        let kind = format!("{}{}", if is_write { " --writes" } else { "" }, if is_done { " --done" } else { "" });
        let replay = format!("cargo xtask sim failing-requests --seed 1 --miners 3 --point {count}{kind}");
        must_hold(&sim::run_failing(plan.clone(), *request), &replay);
    });
}

#[test]
fn a_run_that_is_drained_amid_faults_ends_with_all_that_was_trained() {
    let mut merges = 0;
    for seed in 1..=8 {
        let mut plan = Plan::of_seed(seed, 8, 6);
        plan.orders.push((plan.faults.until_ms / 2, Action::Drain));
        plan.orders.sort_by_key(|(at_ms, _)| *at_ms);
        let outcome = sim::run(plan);
        must_hold(&outcome, &this_test(seed, "drained half-way"));
        assert!(outcome.merges < 7 * 24, "seed {seed}: {} merges", outcome.merges);
        merges += outcome.merges;
    }
    // In one of them the store is away until the order is taken.
    assert!(merges > 300, "{merges} merges");
}

#[test]
fn without_faults_everybody_takes_part_in_every_merge_and_every_audit_passes() {
    let outcome = sim::run(Plan::calm(1, 10, 3));
    must_hold(&outcome, &this_test(1, "ten miners, without faults"));
    // The first pulls find learners that have no step on the fragment yet.
    let share = outcome.contributions as f64 / (outcome.merges * 10) as f64;
    assert!(share > 0.9, "{share}");
    assert!(outcome.verdicts.iter().all(|(name, _)| *name == "pass"), "{:?}", outcome.verdicts);
    assert!(outcome.verdicts.iter().map(|(_, count)| count).sum::<u64>() >= 20, "{:?}", outcome.verdicts);
}

#[test]
fn whatever_befalls_orchestrator_and_store_no_honest_audit_counts_as_unopened() {
    for seed in 1..=40 {
        let mut plan = Plan::calm(seed, 8, 4);
        plan.has_standby = seed % 2 == 0;
        let until_ms = 4 * 24 * plan.step_ms;
        plan.faults = Faults {
            until_ms,
            orchestrator_crash_ms: 40_000,
            lost_disk_ppm: 300_000,
            snapshot_ppm: 50_000,
            pause_ms: 150_000,
            outage_ms: 120_000,
            longest_outage_ms: 120_000,
            chain_stall_ms: 120_000,
            error_ppm: 50_000,
            lost_reply_ppm: 50_000,
            stale_ppm: 100_000,
            ..Faults::default()
        };
        let outcome = sim::run(plan);
        must_hold(&outcome, &this_test(seed, "faults of orchestrator and store alone"));
        assert!(outcome.verdicts.iter().all(|(name, _)| *name != "no opening"), "seed {seed}: {:?}", outcome.verdicts);
        assert!(outcome.verdicts.iter().any(|(name, count)| *name == "pass" && *count > 10), "seed {seed}: {:?}", outcome.verdicts);
    }
}

#[test]
fn a_quarter_of_the_miners_killed_at_once_stalls_nobody() {
    let plan = Plan::quarter_killed(100, 480_000);
    let step_ms = plan.step_ms;
    let pulls = plan.limit_ms / pull_interval_ms(&plan.parameters, plan.step_ms);
    let outcome = sim::run(plan);
    must_hold(&outcome, &this_test(1, "a hundred miners, a quarter of which is killed"));
    let (before_ms, after_ms) = (outcome.longest_stall_before_ms, outcome.longest_stall_ms);
    // Nobody who trains waits for a merge; the merges that were open at the kill wait for those who are gone, no longer than a step.
    assert_eq!(outcome.longest_idle_ms, 0, "a time in which nobody trained");
    assert!(before_ms > 0 && after_ms <= before_ms + step_ms, "between two merges: {before_ms} ms before, {after_ms} ms after");
    // Merges that stop for good end no time between two of them: half of the run has at most half of the pulls that H ξ / P
    // allows.
    assert!(outcome.merges * 4 >= pulls * 3, "{} merges, where {pulls} pulls are allowed", outcome.merges);
}

#[test]
fn learners_that_fail_as_often_as_those_of_decoupled_diloco_lose_no_more() {
    // Its row of 1,200,000 chips in 8 learners that fail once a year each, of which 88 % of the time is useful.
    let mean_ms = 365 * 86_400_000 * 8 / 1_200_000;
    let outcome = sim::run(Plan::failing_learners(8, mean_ms, 15_000, 1_800_000));
    must_hold(&outcome, &this_test(1, "learners that fail"));
    assert!(outcome.goodput >= 0.88 && outcome.uptime >= 1.0, "{} of the time useful, {} with a learner", outcome.goodput, outcome.uptime);
}

#[test]
fn a_store_that_fails_every_fifth_request_and_loses_every_tenth_answer_loses_no_merge() {
    let mut plan = Plan::calm(5, 6, 2);
    plan.faults = Faults {
        until_ms: u64::MAX,
        error_ppm: 200_000,
        lost_reply_ppm: 100_000,
        duplicate_ppm: 100_000,
        stale_ppm: 200_000,
        partial_ppm: 100_000,
        ..Faults::default()
    };
    must_hold(&sim::run(plan), &this_test(5, "six miners, with the store's faults alone"));
}

#[test]
fn a_store_that_is_away_for_many_minutes_costs_time_and_nothing_else() {
    for seed in 1..=4 {
        let mut plan = Plan::calm(seed, 6, 2);
        plan.faults = Faults { until_ms: 48 * plan.step_ms, outage_ms: 60_000, longest_outage_ms: 900_000, ..Faults::default() };
        must_hold(&sim::run(plan), &this_test(seed, "six miners, with outages of up to a quarter of an hour"));
    }
}

#[test]
fn a_standby_takes_over_from_whoever_is_away_and_a_writer_that_wakes_up_later_moves_nothing() {
    let (mut takeovers, mut fenced) = (0, 0);
    for seed in 1..=12 {
        let mut plan = Plan::of_seed(seed, 6, 3);
        plan.has_standby = true;
        (plan.faults.pause_ms, plan.faults.orchestrator_crash_ms) = (30_000, 60_000);
        let outcome = sim::run(plan);
        must_hold(&outcome, &this_test(seed, "six miners, with a standby that takes over often"));
        takeovers += outcome.takeovers;
        fenced += outcome.fenced;
    }
    assert!(takeovers >= 8 && fenced >= 1, "{takeovers} takeovers, {fenced} fenced");
}

#[test]
fn the_simulation_ends_with_one_json_object_of_the_documented_keys() {
    let output = Command::new(env!("CARGO_BIN_EXE_sim")).args(["--seeds", "2", "--miners", "3", "--json"]).output().expect("it starts");
    let text = String::from_utf8_lossy(&output.stdout);
    let summary: serde_json::Value = serde_json::from_str(text.lines().last().expect("a last line")).expect("it is JSON");
    let keys: BTreeSet<&str> = summary.as_object().expect("an object").keys().map(String::as_str).collect();
    assert_eq!(keys, BTreeSet::from(["seeds", "violations", "seconds", "failed_seeds"]), "{text}");
    assert!(output.status.success(), "{text}");
    assert_eq!((&summary["seeds"], &summary["violations"], &summary["failed_seeds"]), (&2.into(), &0.into(), &serde_json::json!([])));
    assert!(summary["seconds"].as_f64() > Some(0.0), "{text}");
}

#[test]
fn each_invariant_has_one_name_and_one_sentence() {
    let mut names: Vec<&str> = INVARIANTS.iter().map(|(name, _)| *name).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), INVARIANTS.len());
    let page = include_str!("../../docs/reliability.md");
    for (name, sentence) in INVARIANTS {
        assert!(page.contains(&format!("| `{name}` | {sentence} |")), "docs/reliability.md lacks `{name}`: {sentence}");
    }
}
