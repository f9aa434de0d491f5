//! `cost`: requests, bytes and money of a day, computed from a run's parameters.

use std::path::PathBuf;

use daemon::Failure;
use protocol::documents::{Codec, OPENING_PARTS, PPM, PROGRESS_BYTES, RunParameters, opening_volume_bytes};
use protocol::files::CHUNK_BYTES;
use serde::Serialize;

use super::run::RunFile;
use crate::effects::payloads::PIECE_BYTES;
use crate::effects::pollers::SILENT_FACTOR;

const DAY_S: f64 = 86_400.0;
const HOUR_S: f64 = 3_600.0;
/// A ranged read of a large object takes a chunk of its file record at once.
const CHUNK: f64 = CHUNK_BYTES as f64;
/// Bytes of a learner's state for each element of the model, in an opening: weights and both moments.
const STATE_BYTES: f64 = 6.0;
/// Bytes of small documents: head, sealed grants.
const HEAD_BYTES: f64 = 4_096.0;
const GRANTS_BYTES: f64 = 16_384.0;

// How often everybody does what, as the machines do it. Where it depends on when things fall together it is what `cargo xtask sim
// requests` counts; a test compares the sums.

/// Records beyond that of each step, for each answered pull: committed, uploaded, applied.
const RECORDS_A_PULL: f64 = 3.0;
/// Looks for grants while a commitment waits, for each answered pull.
const GRANT_LOOKS: f64 = 2.0;
/// A learner's looks at its job and at both of its bundles are so many times rarer than those at the head; that at the pointer to the
/// run, by learners and by validators, is rarer still.
const CALM_LOOKS: (f64, f64) = (3.0, 10.0);
const MOVED: (f64, f64) = (50.0, 30.0);
/// Heads for each merge: the pull opens, it closes, the version is out, the next one opens.
const HEADS_A_MERGE: f64 = 4.0;
/// Objects for each merge: tape, state, keyframe or frame, both manifests, and two of the log.
const OBJECTS_A_MERGE: f64 = 7.0;
/// Objects for each lease: its record and its end, and the job twice.
const OBJECTS_A_LEASE: f64 = 4.0;
/// Standing grants of a slot in an hour: as they expire, and as versions go on.
const STANDING_AN_HOUR: f64 = 3.75;
/// The writer in an hour: renewals of its lease, heads that are only renewed, the status; looks for orders.
const RENEWALS_AN_HOUR: f64 = 360.0 + 60.0;
const STATUS_AN_HOUR: f64 = 3_500.0;
const ORDER_LOOKS_AN_HOUR: f64 = 720.0;
/// Looks of a validator at the other verdicts of each audit, until they are there.
const VERDICT_LOOKS: f64 = 3.7;
/// Looks for a reveal, and at the order, for each audit.
const REVEAL_LOOKS: f64 = 2.0;
const ORDER_LOOKS: f64 = 1.7;
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
    /// Validators that audit; in a cycle the share of the learners that the run sets is audited, by one of them each
    #[arg(long, value_name = "N", default_value_t = 2)]
    validators: u64,
    /// Parameters of the model; those of Quasar Preview if nothing is said
    #[arg(long, value_name = "N", default_value_t = 16_550_000_000)]
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

/// Who takes part, and how fast.
#[derive(Clone, Copy, Debug)]
pub struct Scale {
    pub miners: u64,
    /// Live ones of each miner.
    pub learners: u64,
    pub validators: u64,
    /// Elements of the model.
    pub elements: u64,
    pub step_s: f64,
}

/// Writes and reads.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Requests {
    pub puts: f64,
    pub gets: f64,
}

/// What a day costs.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Cost {
    pub merges: f64,
    pub puts: f64,
    pub gets: f64,
    /// The same by who sends them: the orchestrator, all learners, all validators.
    pub orchestrator: Requests,
    pub learners: Requests,
    pub validators: Requests,
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

impl CostArgs {
    fn scale(&self, parameters: &RunParameters) -> Scale {
        let step_s = if parameters.step_target_ms > 0 { parameters.step_target_ms as f64 / 1e3 } else { self.step_seconds };
        let (miners, learners, validators) = (self.miners, self.learners, self.validators);
        Scale { miners, learners, validators, elements: self.parameters, step_s }
    }
}

pub fn cost(arguments: &CostArgs) -> Result<(), Failure> {
    let parameters = RunFile::read(&arguments.config)?.parameters;
    let mut cost = of_a_day(&parameters, &arguments.scale(&parameters));
    cost.request_price = cost.puts / 1e3 * arguments.put_price + cost.gets / 1e3 * arguments.get_price;
    cost.egress_price = cost.bytes_out / 1e9 * arguments.egress_price;
    cost.storage_price = cost.bytes_kept / 1e9 * arguments.storage_price / 30.0;
    if arguments.json {
        println!("{}", serde_json::json!({ "per_day": cost, "price_per_day": cost.price() }));
        return Ok(());
    }
    let gb = |bytes: f64| bytes / 1e9;
    println!(
        "{} miners with {} learners each, {} validators, {} parameters, a day:",
        arguments.miners, arguments.learners, arguments.validators, arguments.parameters
    );
    println!("  merges     {:>14.0}", cost.merges);
    println!("  writes     {:>14.0}", cost.puts);
    println!("  reads      {:>14.0}    {:.2} for requests", cost.gets, cost.request_price);
    println!("  into store {:>14.1} GB", gb(cost.bytes_in));
    println!("  out of it  {:>14.1} GB {:.2}", gb(cost.bytes_out), cost.egress_price);
    println!("  kept       {:>14.1} GB {:.2}", gb(cost.bytes_kept), cost.storage_price);
    println!("  price      {:>14.2}", cost.price());
    for (who, sent) in [("orchestrator", cost.orchestrator), ("learners", cost.learners), ("validators", cost.validators)] {
        println!("{who:<12} {:>12.0} writes {:>14.0} reads", sent.puts, sent.gets);
    }
    println!("a learner sends {:.0} requests an hour", cost.learner_requests_per_hour);
    Ok(())
}

/// Requests and bytes of a day, without their price.
pub fn of_a_day(parameters: &RunParameters, scale: &Scale) -> Cost {
    let hours = DAY_S / HOUR_S;
    let looks = DAY_S / (parameters.poll_ms as f64 / 1e3);
    let fragments = f64::from(parameters.fragments);
    let merges = DAY_S / (f64::from(parameters.inner_steps) * scale.step_s / fragments);
    let (cycles, steps) = (merges / fragments, DAY_S / scale.step_s);
    let learners = (scale.miners * scale.learners) as f64;
    let validators = scale.validators as f64;
    let silent = scale.miners as f64 * f64::from(parameters.slots).max(scale.learners as f64) - learners;
    let audited = f64::from(parameters.audit.rate_ppm) / PPM as f64;
    let audits = if scale.validators > 0 { cycles * learners * audited } else { 0.0 };
    let elements = scale.elements as f64 / fragments;
    let (payload, keyframe) = (elements * element_bytes(parameters.codec_up), elements * element_bytes(parameters.codec_down));
    let state = elements * if parameters.outer_momentum_ppm > 0 { 8.0 } else { 4.0 };
    let leases = steps / f64::from(parameters.lease_steps);
    let lease_bytes = f64::from(parameters.lease_steps) * f64::from(parameters.batch_rows) * f64::from(parameters.sequence_length) * 4.0;
    let chunks = |bytes: f64| (bytes / CHUNK).ceil().max(1.0);
    let pieces = (payload / PIECE_BYTES as f64).ceil().max(1.0);
    // The state is the one part that may have more than one volume.
    let opening = scale.elements as f64 * STATE_BYTES;
    let volumes = (opening / opening_volume_bytes(scale.elements) as f64).ceil().max(1.0);
    let parts = f64::from(OPENING_PARTS) - 1.0 + volumes;

    // One learner: its record, at most one each look, a payload each pull, a receipt each lease, openings; the head, its job and grants,
    // fragments, rows, a merge manifest each cycle.
    let records = looks.min(steps + RECORDS_A_PULL * merges);
    let of_learner = Requests {
        puts: records + merges + leases + parts * audits / learners.max(1.0),
        gets: looks * (1.0 + CALM_LOOKS.0 / CALM_LOOKS.1 + 1.0 / MOVED.0)
            + merges * (GRANT_LOOKS + chunks(keyframe))
            + leases * chunks(lease_bytes)
            + cycles,
    };
    // The orchestrator: records, grants, commitments and payloads of each learner, orders and verdicts of audits, its own objects.
    let slots = learners + silent + validators;
    let orchestrator = Requests {
        puts: learners * (2.0 * merges + (OBJECTS_A_LEASE + 1.0) * leases)
            + audits * (parts + 1.0)
            + slots * STANDING_AN_HOUR * hours
            + merges * (OBJECTS_A_MERGE + HEADS_A_MERGE)
            + (RENEWALS_AN_HOUR + STATUS_AN_HOUR) * hours,
        gets: learners * (looks + merges * (1.0 + pieces) + leases)
            + silent * looks / SILENT_FACTOR as f64
            + audits * REVEAL_LOOKS
            + ORDER_LOOKS_AN_HOUR * hours,
    };
    // A validator: the head, each merge with its log head and keyframe, all verdicts; of its own audits order, evidence and opening.
    let of_validators = Requests {
        puts: 2.0 * audits,
        gets: validators * (looks * (1.0 + 1.0 / MOVED.1) + merges * (2.0 + chunks(keyframe)) + audits * VERDICT_LOOKS)
            + audits * (ORDER_LOOKS + parts + 2.0),
    };
    let of_learners = Requests { puts: learners * of_learner.puts, gets: learners * of_learner.gets };
    let changed_heads = HEADS_A_MERGE * merges;
    let record_bytes = records * PROGRESS_BYTES as f64;
    // Each is uploaded by its learner, read by one validator, and deleted once the verdict is there.
    let opened_bytes = audits * opening;
    let bytes_in = learners * (record_bytes + merges * (payload + GRANTS_BYTES)) + merges * (keyframe + state) + opened_bytes;
    let bytes_out = (learners + validators) * (changed_heads * HEAD_BYTES + merges * keyframe)
        + learners * (merges * GRANTS_BYTES + leases * lease_bytes + record_bytes + merges * payload)
        + opened_bytes;
    let bytes_kept = fragments * VERSIONS_KEPT * (keyframe + state)
        + learners * payload * fragments * 5.0
        + 4.0 * scale.elements as f64 * element_bytes(Codec::Bf16);
    let all = [orchestrator, of_learners, of_validators];
    Cost {
        merges,
        puts: all.iter().map(|sent| sent.puts).sum(),
        gets: all.iter().map(|sent| sent.gets).sum(),
        orchestrator,
        learners: of_learners,
        validators: of_validators,
        learner_requests_per_hour: (of_learner.puts + of_learner.gets) / hours,
        bytes_in,
        bytes_out,
        bytes_kept,
        request_price: 0.0,
        egress_price: 0.0,
        storage_price: 0.0,
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
        let parameters = RunFile::read(&arguments.config).unwrap().parameters;
        of_a_day(&parameters, &arguments.scale(&parameters))
    }

    #[test]
    fn the_requests_of_a_learner_are_its_polls_and_the_chunks_of_its_transfers() {
        let cost = of(100, &[]);
        println!("a learner: {:.0} requests an hour; a day of 100 miners: {cost:?}", cost.learner_requests_per_hour);
        // The head each two seconds is 1,800; 180 merges bring an int4 frame of 356 MB in chunks of 4 MiB each.
        let chunks = 180.0 * (16.55e9 / 24.0 * 4.125 / 8.0 / CHUNK).ceil();
        assert!(cost.learner_requests_per_hour > 1_800.0 + chunks && cost.learner_requests_per_hour < 5_000.0 + chunks, "{cost:?}");
        assert_eq!(cost.merges, DAY_S / 20.0);
    }

    #[test]
    fn the_state_of_every_opening_goes_into_the_store_and_out_of_it_once() {
        let validators = |count: &str| of(100, &["--validators", count]);
        let (none, two, four) = (validators("0"), validators("2"), validators("4"));
        // 180 cycles a day, in each of which one learner in fifty opens weights and moments of the whole model.
        let opened_bytes = 180.0 * 100.0 / 50.0 * 16.55e9 * 6.0;
        let is_close = |left: f64, right: f64| (left / right - 1.0).abs() < 1e-9;
        assert!(is_close(two.bytes_in - none.bytes_in, opened_bytes), "{none:?} {two:?}");
        assert_eq!(two.bytes_in, four.bytes_in, "each learner is audited by one validator, however many there are");
        // What two more validators read besides openings is the same for the first two of them.
        let others = four.bytes_out - two.bytes_out;
        assert!(others > 0.0 && is_close(two.bytes_out - none.bytes_out - others, opened_bytes), "{none:?} {two:?} {four:?}");
    }

    #[test]
    fn twice_the_miners_send_twice_as_much_and_validators_send_something_too() {
        let (one, two) = (of(50, &[]), of(100, &[]));
        assert!((two.learners.puts / one.learners.puts - 2.0).abs() < 1e-9, "{one:?} {two:?}");
        assert!(two.orchestrator.puts < 2.0 * one.orchestrator.puts, "its own objects do not grow with them");
        let (none, more) = (of(50, &["--validators", "0"]), of(50, &["--validators", "4"]));
        assert_eq!((none.validators.puts, none.validators.gets), (0.0, 0.0));
        assert!(more.validators.gets > one.validators.gets && more.puts >= one.puts && one.puts > none.puts, "{none:?} {one:?} {more:?}");
        for cost in [one, two, none, more] {
            let parts = [cost.orchestrator, cost.learners, cost.validators];
            assert_eq!(cost.puts, parts.iter().map(|part| part.puts).sum::<f64>());
        }
        assert_eq!(one.price(), 0.0, "a price is what the tariffs make of it");
    }
}
