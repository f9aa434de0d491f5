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
    let kinds: [(u64, Happen); 6] = [
        (faults.orchestrator_crash_ms, crash_orchestrator),
        (faults.miner_crash_ms.div_ceil(miners.max(1)), crash_a_miner),
        (faults.validator_crash_ms, crash_a_validator),
        (faults.partition_ms, partition),
        (faults.outage_ms, outage),
        (faults.chain_stall_ms, stall_chain),
    ];
    if let Some(at_ms) = world.plan.kill_quarter_ms {
        let later = world.clone();
        world.executor.after(at_ms, WORLD, move || {
            (0..later.plan.miners / 4).for_each(|index| later.crash_miner(index));
            later.watch.borrow_mut().stalls_from_here();
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

fn crash_orchestrator(world: &Rc<World>) {
    let (kept, down_ms) = (between(world, 0, 3) as usize, between(world, 50, 8_000));
    if !world.orchestrator.borrow().is_running() {
        return;
    }
    let loses_disk = world.random.borrow_mut().chance(world.plan.faults.lost_disk_ppm);
    if loses_disk {
        world.crash_and_lose_disk(down_ms);
    } else {
        world.crash_and_restart(kept, down_ms);
    }
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
    let nodes = 1 + world.plan.miners + world.plan.validators;
    let until_ms = world.executor.now_ms() + between(world, 2_000, 30_000);
    let share = between(world, 1, (nodes as u64 / 3).max(1));
    for _ in 0..share {
        let node = between(world, 0, nodes as u64 - 1) as usize;
        world.net.borrow_mut().unreachable_until.insert(node, until_ms);
    }
}

fn outage(world: &Rc<World>) {
    let until_ms = world.executor.now_ms() + between(world, 1_000, 20_000);
    world.net.borrow_mut().down_until_ms = until_ms;
}

fn stall_chain(world: &Rc<World>) {
    let until_ms = world.executor.now_ms() + between(world, 5_000, 60_000);
    world.net.borrow_mut().chain_stalled_until_ms = until_ms;
    world.chain.set_reachable(false);
}
