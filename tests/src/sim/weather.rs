//! What goes wrong, when: each kind of fault is a process of its own with exponentially distributed pauses.

use std::rc::Rc;

use super::executor::WORLD;
use super::world::World;

/// Starts the faults of the plan.
pub fn begin(world: &Rc<World>) {
    let faults = &world.plan.faults;
    let miners = world.plan.miners as u64;
    // Miners' times are those of one miner.
    type Happen = fn(&Rc<World>);
    let kinds: [(u64, Happen); 8] = [
        (faults.orchestrator_crash_ms, crash_orchestrator),
        (faults.miner_crash_ms.div_ceil(miners.max(1)), crash_a_miner),
        (faults.validator_crash_ms, crash_a_validator),
        (faults.partition_ms, partition),
        (faults.outage_ms, outage),
        (faults.chain_stall_ms, stall_chain),
        (faults.pause_ms, pause_orchestrator),
        (faults.clock_jump_ms, set_a_clock),
    ];
    if let Some(at_ms) = world.plan.kill_quarter_ms {
        // Before and after are compared as the run is when it has found its pace.
        let warm = world.clone();
        world.executor.after(at_ms / 2, WORLD, move || {
            warm.watch.borrow_mut().stalls_from_here();
        });
        let later = world.clone();
        world.executor.after(at_ms, WORLD, move || {
            (0..later.plan.miners / 4).for_each(|index| later.crash_miner(index));
            let mut watch = later.watch.borrow_mut();
            watch.longest_stall_before_ms = watch.stalls_from_here();
        });
    }
    for (mean_ms, strike) in kinds.into_iter().filter(|(mean_ms, _)| *mean_ms > 0) {
        let world = world.clone();
        let executor = world.executor.clone();
        executor.spawn(WORLD, async move {
            loop {
                let pause_ms = world.random.borrow_mut().exponential_ms(mean_ms);
                world.executor.sleep(pause_ms.max(1)).await;
                if world.executor.now_ms() > world.plan.faults.until_ms {
                    return;
                }
                strike(&world);
            }
        });
    }
}

fn between(world: &World, from: u64, to: u64) -> u64 {
    world.random.borrow_mut().between(from, to)
}

/// A standby takes over what is away for longer than the lease.
fn crash_orchestrator(world: &Rc<World>) {
    let host = between(world, 0, world.orchestrators.len() as u64 - 1) as usize;
    let longest_ms = if world.plan.has_standby { 60_000 } else { 8_000 };
    let (kept, down_ms) = (between(world, 0, 3) as usize, between(world, 50, longest_ms));
    if !world.orchestrators[host].borrow().is_up() {
        return;
    }
    let loses_disk = world.random.borrow_mut().chance(world.plan.faults.lost_disk_ppm);
    if loses_disk {
        world.crash_and_lose_disk(host, down_ms);
    } else {
        world.crash_and_restart(host, kept, down_ms);
    }
}

/// The process is stopped; or its machine sleeps, and one of its clocks with it; or both clocks, until one is set.
fn pause_orchestrator(world: &Rc<World>) {
    let host = between(world, 0, world.orchestrators.len() as u64 - 1) as usize;
    let (paused_ms, kind, late_ms) = (between(world, 500, 90_000), between(world, 0, 2), between(world, 0, 60_000));
    let (life, node) = {
        let host = world.orchestrators[host].borrow();
        (host.life, host.id)
    };
    if !world.orchestrators[host].borrow().is_up() || world.executor.is_stopped(life) {
        return;
    }
    world.say(node, || format!("STANDS STILL for {paused_ms} ms, kind {kind}"));
    world.executor.stop(life);
    let later = world.clone();
    world.executor.after(paused_ms, WORLD, move || {
        if !later.executor.is_stopped(life) {
            return;
        }
        if kind > 0 {
            later.set_clock(node, |clock| clock.slept_ms += paused_ms);
        }
        if kind == 2 {
            later.set_clock(node, |clock| clock.off_ms -= paused_ms as i64);
            let right = later.clone();
            later.executor.after(late_ms, WORLD, move || right.set_clock(node, |clock| clock.off_ms += paused_ms as i64));
        }
        later.executor.go_on(life);
    });
}

fn set_a_clock(world: &Rc<World>) {
    // The orchestrator's as often as anybody's.
    let anybody = between(world, 0, world.nodes() as u64 - 1) as usize;
    let node = if between(world, 0, 3) == 0 { 0 } else { anybody };
    let jump_ms = between(world, 60_000, 600_000) as i64;
    let off_ms = if between(world, 0, 1) == 0 { jump_ms } else { -jump_ms };
    let right_ms = between(world, 1_000, 60_000);
    world.say(node, || format!("CLOCK is set by {off_ms} ms"));
    world.set_clock(node, |clock| clock.off_ms += off_ms);
    let later = world.clone();
    world.executor.after(right_ms, WORLD, move || later.set_clock(node, |clock| clock.off_ms -= off_ms));
}

fn crash_a_miner(world: &Rc<World>) {
    let index = between(world, 0, world.plan.miners as u64 - 1) as usize;
    if !world.learners[index].borrow().is_running() {
        return;
    }
    let is_polite = world.random.borrow_mut().chance(world.plan.faults.drain_ppm);
    if is_polite {
        world.stop_miner(index);
    } else {
        world.crash_miner(index);
    }
    let by_chance_ms = between(world, 4_000, 40_000);
    let (down_ms, later) = (world.plan.faults.restart_ms.unwrap_or(by_chance_ms), world.clone());
    world.executor.after(down_ms, WORLD, move || later.start_miner(index));
}

fn crash_a_validator(world: &Rc<World>) {
    let index = between(world, 0, world.plan.validators as u64 - 1) as usize;
    world.crash_validator(index);
    let (down_ms, later) = (between(world, 500, 20_000), world.clone());
    world.executor.after(down_ms, WORLD, move || later.start_validator(index));
}

fn partition(world: &Rc<World>) {
    let nodes = world.nodes();
    let until_ms = world.executor.now_ms() + between(world, 2_000, 30_000);
    let share = between(world, 1, (nodes as u64 / 3).max(1));
    for _ in 0..share {
        let node = between(world, 0, nodes as u64 - 1) as usize;
        world.net.borrow_mut().unreachable_until.insert(node, until_ms);
    }
}

fn outage(world: &Rc<World>) {
    let longest_ms = match world.plan.faults.longest_outage_ms {
        0 => 20_000,
        longest_ms => longest_ms,
    };
    let until_ms = world.executor.now_ms() + between(world, 1_000, longest_ms);
    world.net.borrow_mut().down_until_ms = until_ms;
}

fn stall_chain(world: &Rc<World>) {
    let until_ms = world.executor.now_ms() + between(world, 5_000, 60_000);
    let goes_on = between(world, 0, 1) == 0;
    let mut net = world.net.borrow_mut();
    (net.chain_stalled_until_ms, net.chain_goes_on) = (until_ms, goes_on);
    world.chain.set_reachable(false);
}
