//! `cost`: requests, bytes and money of a day, computed from a run's parameters.

use std::path::PathBuf;

use daemon::Failure;
use protocol::documents::{Codec, RunParameters};
use protocol::files::CHUNK_BYTES;
use serde::Serialize;

use super::run::RunFile;

const DAY_S: f64 = 86_400.0;
/// A ranged read of a large object takes a chunk of its file record at once.
const CHUNK: f64 = CHUNK_BYTES as f64;
/// Bytes of small documents: head, progress record, sealed grants, manifests.
const HEAD_BYTES: f64 = 4_096.0;
const PROGRESS_BYTES: f64 = 4_096.0;
const GRANTS_BYTES: f64 = 16_384.0;
/// Looks for grants while a commitment waits, for each answered pull.
const GRANT_LOOKS: f64 = 4.0;
/// Silent slots are looked at so many times more rarely.
const SILENT_FACTOR: f64 = 10.0;
/// Versions of each fragment that are kept, keyframe and f32 state.
const VERSIONS_KEPT: f64 = 8.0;

/// Requests and bytes of a day, and their price, for a number of miners
#[derive(Debug, clap::Args)]
pub struct CostArgs {
    /// Run parameters (TOML)
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    #[arg(long, value_name = "N")]
    miners: u64,
    /// Learners of each miner that are live
    #[arg(long, value_name = "N", default_value_t = 1)]
    learners: u64,
    /// Parameters of the model
    #[arg(long, value_name = "N", default_value_t = 18_000_000_000)]
    parameters: u64,
    /// Seconds of an inner step, where the run has no target
    #[arg(long, value_name = "SECONDS", default_value_t = 20.0)]
    step_seconds: f64,
    /// Price of 1,000 writes or lists
    #[arg(long, value_name = "PRICE", default_value_t = 0.005)]
    put_price: f64,
    /// Price of 1,000 reads
    #[arg(long, value_name = "PRICE", default_value_t = 0.0004)]
    get_price: f64,
    /// Price of a GB that leaves the store
    #[arg(long, value_name = "PRICE", default_value_t = 0.09)]
    egress_price: f64,
    /// Price of a GB kept for a month
    #[arg(long, value_name = "PRICE", default_value_t = 0.023)]
    storage_price: f64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What a day costs.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Cost {
    pub merges: f64,
    pub puts: f64,
    pub gets: f64,
    /// Of one learner, in an hour.
    pub learner_requests_per_hour: f64,
    /// Into the store, and out of it.
    pub bytes_in: f64,
    pub bytes_out: f64,
    pub bytes_kept: f64,
    pub request_price: f64,
    pub egress_price: f64,
    pub storage_price: f64,
}

impl Cost {
    fn price(&self) -> f64 {
        self.request_price + self.egress_price + self.storage_price
    }
}

/// Bytes of an element in a codec.
fn element_bytes(codec: Codec) -> f64 {
    match codec {
        Codec::Bf16 => 2.0,
        // 256 values of four bits share an f32 scale.
        Codec::Int4 => 0.5 + 4.0 / 256.0,
        // 64 of 4,096 values with twelve bits of place and two of value, and a scale.
        Codec::TopK => (64.0 * 14.0 / 8.0 + 4.0) / 4_096.0,
    }
}

pub fn cost(arguments: &CostArgs) -> Result<(), Failure> {
    let parameters = RunFile::read(&arguments.config)?.parameters;
    let cost = of_a_day(&parameters, arguments);
    if arguments.json {
        println!("{}", serde_json::json!({ "per_day": cost, "price_per_day": cost.price() }));
        return Ok(());
    }
    let gb = |bytes: f64| bytes / 1e9;
    println!("{} miners with {} learners each, {} parameters, a day:", arguments.miners, arguments.learners, arguments.parameters);
    println!("  merges     {:>14.0}", cost.merges);
    println!("  writes     {:>14.0}", cost.puts);
    println!("  reads      {:>14.0}    {:.2} for requests", cost.gets, cost.request_price);
    println!("  into store {:>14.1} GB", gb(cost.bytes_in));
    println!("  out of it  {:>14.1} GB {:.2}", gb(cost.bytes_out), cost.egress_price);
    println!("  kept       {:>14.1} GB {:.2}", gb(cost.bytes_kept), cost.storage_price);
    println!("  price      {:>14.2}", cost.price());
    println!("a learner sends {:.0} requests an hour", cost.learner_requests_per_hour);
    Ok(())
}

fn of_a_day(parameters: &RunParameters, arguments: &CostArgs) -> Cost {
    let step_s = if parameters.step_target_ms > 0 { parameters.step_target_ms as f64 / 1e3 } else { arguments.step_seconds };
    let poll_s = parameters.poll_ms as f64 / 1e3;
    let fragments = f64::from(parameters.fragments);
    let merges = DAY_S / (f64::from(parameters.inner_steps) * step_s / fragments);
    let steps = DAY_S / step_s;
    let learners = (arguments.miners * arguments.learners) as f64;
    let silent = arguments.miners as f64 * f64::from(parameters.slots).max(arguments.learners as f64) - learners;
    let elements = arguments.parameters as f64 / fragments;
    let (payload, keyframe) = (elements * element_bytes(parameters.codec_up), elements * element_bytes(parameters.codec_down));
    let state = elements * if parameters.outer_momentum_ppm > 0 { 8.0 } else { 4.0 };
    let leases = steps / f64::from(parameters.lease_steps);
    let lease_bytes = f64::from(parameters.lease_steps) * f64::from(parameters.batch_rows) * f64::from(parameters.sequence_length) * 4.0;
    let chunks = |bytes: f64| (bytes / CHUNK).ceil().max(1.0);

    // One learner: progress each step, a payload each pull, a receipt each lease; the head, its grants, jobs, fragments, rows.
    let learner_puts = steps + merges + leases;
    let learner_gets = DAY_S / poll_s + merges * (GRANT_LOOKS + 1.0 + chunks(keyframe)) + leases * (1.0 + chunks(lease_bytes));
    // The orchestrator: records, grants, commitments and payloads of each learner, its own objects of each merge.
    let own_puts = learners * (2.0 * merges + 2.0 * leases + 36.0) + silent * 36.0 + merges * 7.0 + DAY_S / 60.0 + DAY_S;
    let own_gets = learners * (DAY_S / poll_s + merges + leases) + silent * DAY_S / (poll_s * SILENT_FACTOR);
    let changed_heads = 3.0 * merges;
    let bytes_in = learners * (steps * PROGRESS_BYTES + merges * (payload + GRANTS_BYTES)) + merges * (keyframe + state);
    let bytes_out = learners * (changed_heads * HEAD_BYTES + merges * (keyframe + GRANTS_BYTES) + leases * lease_bytes)
        + learners * (steps * PROGRESS_BYTES + merges * payload);
    let bytes_kept = fragments * VERSIONS_KEPT * (keyframe + state)
        + learners * payload * fragments * 5.0
        + 4.0 * arguments.parameters as f64 * element_bytes(Codec::Bf16);
    let (puts, gets) = (learners * learner_puts + own_puts, learners * learner_gets + own_gets);
    Cost {
        merges,
        puts,
        gets,
        learner_requests_per_hour: (learner_puts + learner_gets) / 24.0,
        bytes_in,
        bytes_out,
        bytes_kept,
        request_price: puts / 1e3 * arguments.put_price + gets / 1e3 * arguments.get_price,
        egress_price: bytes_out / 1e9 * arguments.egress_price,
        storage_price: bytes_kept / 1e9 * arguments.storage_price / 30.0,
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        arguments: CostArgs,
    }

    fn of(miners: u64, more: &[&str]) -> Cost {
        let config = concat!(env!("CARGO_MANIFEST_DIR"), "/../../configs/run-mainnet.toml");
        let miners = miners.to_string();
        let line = ["cost", "--config", config, "--miners", &miners].into_iter().chain(more.iter().copied());
        let arguments = Cli::parse_from(line).arguments;
        of_a_day(&RunFile::read(&arguments.config).unwrap().parameters, &arguments)
    }

    #[test]
    fn the_requests_of_a_learner_are_its_polls_and_the_chunks_of_its_transfers() {
        let cost = of(100, &[]);
        println!("a learner: {:.0} requests an hour; a day of 100 miners: {cost:?}", cost.learner_requests_per_hour);
        // The head each two seconds is 1,800; 180 merges bring an int4 frame of 387 MB in chunks of 4 MiB each.
        let chunks = 180.0 * (18e9 / 24.0 * 4.125 / 8.0 / CHUNK).ceil();
        assert!(cost.learner_requests_per_hour > 1_800.0 + chunks && cost.learner_requests_per_hour < 5_000.0 + chunks, "{cost:?}");
        assert_eq!(cost.merges, DAY_S / 20.0);
    }

    #[test]
    fn twice_the_miners_are_twice_the_uploads_and_a_price_of_nothing_costs_nothing() {
        let (one, two) = (of(50, &[]), of(100, &[]));
        let uploads = |cost: &Cost| cost.puts - cost.merges * 7.0;
        assert!((uploads(&two) / uploads(&one) - 2.0).abs() < 0.2, "{one:?} {two:?}");
        let free = of(50, &["--put-price", "0", "--get-price", "0", "--egress-price", "0", "--storage-price", "0"]);
        assert_eq!(free.price(), 0.0);
    }
}
