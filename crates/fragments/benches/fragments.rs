//! How fast codecs, norms, merges and checkpoints are, beside what the machine can do, in one table.
//!
//! ```sh
//! cargo bench -p quasar-fragments                          # everything
//! cargo bench -p quasar-fragments -- merge                 # only rows whose name contains "merge"
//! QUASAR_DEV_PYTHON=python3 cargo bench -p quasar-fragments   # with the same merge in PyTorch, on the same payloads
//! ```
//!
//! Threads are those of rayon (`RAYON_NUM_THREADS`, by default all cores). Times are the best of several rounds, by the clock and by
//! the processor time of all threads divided by their number; on an idle machine the two agree, on a busy one the second is what
//! the clock would show if the machine were idle. Bytes are those that must pass between memory and processor: every read of a
//! payload and every read or write of a result, once for each pass. The bandwidth that they are compared with is that of a triad
//! a = b + s·c over f32 arrays in the same process; rates and shares are by processor time.

#![expect(clippy::disallowed_methods, clippy::disallowed_macros, reason = "a benchmark measures time, starts its peers and prints")]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use fragments::checkpoint::{assemble, split};
use fragments::codec::{self, FileSource, PayloadHeader, Source};
use fragments::contract::TensorSpec;
use fragments::merge::{Offer, merge_payloads, payload_norms};
use fragments::{Contract, merge};
use protocol::documents::Codec;
use protocol::{DType, Digest, FragmentPlan, MergeRule, Slice};
use quasar_fragments as fragments;
use rayon::prelude::*;

const ROUNDS: usize = 5;
const LEARNERS: usize = 16;
const SPARSE_LEARNERS: usize = 100;
const SPARSE_ELEMENTS: u64 = 30_000_000;
const TREE_SHARDS: usize = 4;

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let only: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let bench = Bench { only, triad: triad(), measured: RefCell::default() };
    keep_memory();
    println!("{} threads, triad {:.1} GB/s", rayon::current_num_threads(), bench.triad);
    println!("| what | s (clock) | s (processor) | GB/s | of the triad | peak RSS |");
    println!("|---|---|---|---|---|---|");
    bench.codecs()?;
    bench.dense_merges()?;
    bench.sparse_merge()?;
    bench.checkpoints()
}

/// Memory that was freed is used again. Otherwise the kernel clears the pages of every result anew, which on some virtual machines
/// takes longer than the merge, and on others nothing. The PyTorch peer is started with the same settings.
fn keep_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    for (parameter, value) in [(libc::M_MMAP_MAX, 0), (libc::M_TRIM_THRESHOLD, libc::c_int::MAX)] {
        // SAFETY: changes how the allocator gets memory and nothing else.
        unsafe { libc::mallopt(parameter, value) };
    }
}

/// What earlier rows had does not count into the peak of the next.
fn give_back_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: gives free memory back and changes nothing else.
    unsafe {
        libc::malloc_trim(0)
    };
}

struct Bench {
    /// Parts of names of the rows that are wanted; none = all.
    only: Vec<String>,
    /// GB/s.
    triad: f64,
    /// Processor time of the rows so far, by name.
    measured: RefCell<BTreeMap<String, f64>>,
}

impl Bench {
    fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|part| name.contains(part.as_str()))
    }

    /// Runs `work` several times and prints a row; `bytes` pass between memory and processor in each.
    fn row(&self, name: &str, bytes: f64, mut work: impl FnMut() -> Result<(), Failure>) -> Result<f64, Failure> {
        if !self.wants(name) {
            return Ok(f64::NAN);
        }
        give_back_memory();
        reset_peak();
        let mut best = Times::WORST;
        for _ in 0..ROUNDS {
            best = best.min(timed(&mut work)?);
        }
        let rate = bytes / best.processor / 1e9;
        let Times { clock, processor } = best;
        println!("| {name} | {clock:.3} | {processor:.3} | {rate:.1} | {:.0} % | {} MiB |", 100.0 * rate / self.triad, peak_mib());
        self.measured.borrow_mut().insert(name.to_owned(), processor);
        Ok(processor)
    }

    fn codecs(&self) -> Result<(), Failure> {
        let slices = dense_slices();
        let elements = slices.iter().map(Slice::elements).sum::<u64>() as usize;
        let mut values = vec![0.0f32; elements];
        fill(&mut values, 1);
        for (name, codec) in [("bf16", Codec::Bf16), ("int4", Codec::Int4), ("topk", Codec::TopK)] {
            let header = PayloadHeader::of_slices(codec, &slices, Digest::ZERO, 0, 0);
            let mut bytes = codec::encode(&header, &values)?;
            let moved = bytes.len() as f64 + 4.0 * elements as f64;
            self.row(&format!("{name} encode"), moved, || Ok(codec::encode_into(&header, black_box(&values), &mut bytes)?))?;
            let mut decoded = vec![0.0f32; elements];
            self.row(&format!("{name} decode"), moved, || Ok(codec::decode_into(black_box(&bytes), &header, &mut decoded)?))?;
            self.row(&format!("{name} norms"), bytes.len() as f64, || {
                black_box(payload_norms(&header, &bytes)?);
                Ok(())
            })?;
        }
        self.row("f32 norms", 4.0 * elements as f64, || {
            black_box(merge::unit_norms(&slices, &values)?);
            Ok(())
        })?;
        Ok(())
    }

    fn dense_merges(&self) -> Result<(), Failure> {
        let slices = dense_slices();
        let elements = slices.iter().map(Slice::elements).sum::<u64>() as usize;
        for (name, codec) in [("bf16", Codec::Bf16), ("int4", Codec::Int4)] {
            let row = format!("{name} merge of {LEARNERS} x {} M", elements / 1_000_000);
            if !self.wants(&row) {
                continue;
            }
            let header = PayloadHeader::of_slices(codec, &slices, Digest::ZERO, 0, 0);
            let folder = tempfile::tempdir()?;
            let mut payloads = Vec::new();
            let mut values = vec![0.0f32; elements];
            for learner in 0..LEARNERS as u64 {
                fill(&mut values, learner + 1);
                payloads.push(codec::encode(&header, &values)?);
            }
            drop(values);
            // Norms, sketches and sums read every payload; the result is written, then read and scaled.
            let moved = 3.0 * LEARNERS as f64 * payloads[0].len() as f64 + 12.0 * elements as f64;
            let offers: Vec<Offer> = payloads.iter().map(|payload| offer(&header, payload)).collect();
            let mut merged = None;
            let ours = self.row(&row, moved, || {
                merged = Some(merge_payloads(&slices, &offers)?);
                Ok(())
            })?;
            let result = merged.ok_or("nothing was merged")?;
            let paths: Vec<PathBuf> = (0..LEARNERS).map(|learner| folder.path().join(format!("{learner}.qfd"))).collect();
            for (path, payload) in paths.iter().zip(&payloads) {
                std::fs::write(path, payload)?;
            }
            drop(payloads);
            let files = paths.iter().map(|path| FileSource::open(path)).collect::<Result<Vec<_>, _>>()?;
            let offers: Vec<Offer> = files.iter().map(|file| offer(&header, file)).collect();
            self.row(&format!("{row}, from files"), moved, || {
                let again = merge_payloads(&slices, &offers)?;
                if again == result { Ok(()) } else { Err("files and memory give different merges".into()) }
            })?;
            self.pytorch(name, &slices, folder.path(), &result.delta, ours)?;
        }
        Ok(())
    }

    /// The same work on the same payloads in PyTorch on the same threads. `ours` is the processor time of our merge.
    fn pytorch(&self, codec: &str, slices: &[Slice], payloads: &Path, delta: &[f32], ours: f64) -> Result<(), Failure> {
        let Ok(python) = std::env::var("QUASAR_DEV_PYTHON") else {
            println!("| the same in PyTorch | QUASAR_DEV_PYTHON names no Python | | | | |");
            return Ok(());
        };
        let units: Vec<String> = slices
            .iter()
            .flat_map(|slice| {
                let unit = slice.unit_rows * slice.row_elements;
                std::iter::repeat_n(
                    format!("{unit} {}", if slice.rule == MergeRule::Rda { "rda" } else { "mean" }),
                    (slice.rows() / slice.unit_rows) as usize,
                )
            })
            .collect();
        std::fs::write(payloads.join("units.txt"), units.join("\n"))?;
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/bench/pytorch_merge.py");
        let numbers = [LEARNERS, rayon::current_num_threads(), 3].map(|number| number.to_string());
        // Threads that wait for each other by spinning would be charged for it.
        let kept = [("MALLOC_MMAP_MAX_", "0"), ("MALLOC_TRIM_THRESHOLD_", "2147483647"), ("OMP_WAIT_POLICY", "passive")];
        let output = Command::new(python).envs(kept).arg(script).arg(payloads).arg(codec).args(numbers).output()?;
        if !output.status.success() {
            return Err(format!("the PyTorch merge failed:\n{}", String::from_utf8_lossy(&output.stderr)).into());
        }
        let theirs = std::fs::read(payloads.join("merged.f32"))?;
        let theirs: &[f32] = bytemuck::try_cast_slice(&theirs).map_err(|error| error.to_string())?;
        let square = |value: f32| f64::from(value) * f64::from(value);
        let difference = delta.iter().zip(theirs).map(|(ours, theirs)| square(ours - theirs)).sum::<f64>().sqrt();
        let relative = difference / delta.iter().map(|value| square(*value)).sum::<f64>().sqrt();
        for line in String::from_utf8(output.stdout)?.lines() {
            let [name, clock, processor, version, peak] = line.split_whitespace().collect::<Vec<_>>()[..] else {
                return Err("the PyTorch merge printed something else".into());
            };
            let (clock, processor): (f64, f64) = (clock.parse()?, processor.parse()?);
            let ours = if name == "merge" { Some(ours) } else { self.measured.borrow().get(&format!("{codec} {name}")).copied() };
            let factor = ours.map_or_else(String::new, |ours| format!(" ({:.1} x our time)", processor / ours));
            println!("| {codec} {name} in PyTorch {version}{factor} | {clock:.3} | {processor:.3} | | | {peak} MiB |");
        }
        println!("| relative difference of the two merges: {relative:.0e} | | | | | |");
        if relative < 1e-3 { Ok(()) } else { Err("ours and the PyTorch merge differ".into()) }
    }

    fn sparse_merge(&self) -> Result<(), Failure> {
        let row = format!("topk merge of {SPARSE_LEARNERS} x {} M", SPARSE_ELEMENTS / 1_000_000);
        if !self.wants(&row) {
            return Ok(());
        }
        let slices =
            [slice("experts", 14, 1 << 21, 1, MergeRule::Rda), slice("rest", 1, SPARSE_ELEMENTS - 14 * (1 << 21), 1, MergeRule::Mean)];
        let header = PayloadHeader::of_slices(Codec::TopK, &slices, Digest::ZERO, 0, 0);
        let payloads = (0..SPARSE_LEARNERS as u64)
            .into_par_iter()
            .map(|learner| {
                let mut values = vec![0.0f32; SPARSE_ELEMENTS as usize];
                // One element of each 64: what top-k would choose of values that are otherwise small.
                values.chunks_mut(64).enumerate().for_each(|(place, values)| {
                    let word = random(learner << 40 | place as u64);
                    let value = 1.0 + (word >> 40) as f32 / (1 << 24) as f32;
                    let index = word as usize % values.len();
                    values[index] = if word >> 63 == 1 { -value } else { value };
                });
                codec::encode(&header, &values)
            })
            .collect::<Result<Vec<_>, _>>()?;
        let offers: Vec<Offer> = payloads.iter().map(|payload| offer(&header, payload)).collect();
        let moved = 3.0 * SPARSE_LEARNERS as f64 * payloads[0].len() as f64 + 12.0 * SPARSE_ELEMENTS as f64;
        self.row(&row, moved, || {
            black_box(merge_payloads(&slices, &offers)?);
            Ok(())
        })?;
        Ok(())
    }

    /// In turns, so that a slower moment of the disk is a slower moment for all. What is read is in the kernel's cache before the clock
    /// starts; the clock stops when what was written is on the disk.
    fn checkpoints(&self) -> Result<(), Failure> {
        const NAMES: [&str; 3] = ["cp of a tree, and sync", "split into 24 fragments", "assemble"];
        if !NAMES.iter().any(|name| self.wants(name)) {
            return Ok(());
        }
        let root = tempfile::tempdir_in(std::env::var_os("QUASAR_BENCH_DIR").map_or_else(std::env::temp_dir, PathBuf::from))?;
        let [base, fragments, out, copy] = ["base", "fragments", "out", "copy"].map(|name| root.path().join(name));
        let bytes = write_tree(&base)? as f64;
        let mut best = [Times::WORST; 3];
        let mut peaks = [0; 3];
        for _ in 0..ROUNDS {
            let mut measure = |number: usize, input: &Path, output: &Path, work: &dyn Fn() -> Result<(), Failure>| -> Result<(), Failure> {
                if output.exists() {
                    std::fs::remove_dir_all(output)?;
                }
                run(&mut Command::new("sync"))?;
                for entry in std::fs::read_dir(input)? {
                    std::io::copy(&mut std::fs::File::open(entry?.path())?, &mut std::io::sink())?;
                }
                give_back_memory();
                reset_peak();
                let (start, before) = (Instant::now(), process_seconds());
                work()?;
                let processor = (process_seconds() - before) / rayon::current_num_threads() as f64;
                best[number] = best[number].min(Times { clock: start.elapsed().as_secs_f64(), processor });
                peaks[number] = peaks[number].max(peak_mib());
                Ok(())
            };
            measure(0, &base, &copy, &|| {
                run(Command::new("cp").arg("-r").arg(&base).arg(&copy))?;
                let written = std::fs::read_dir(&copy)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>, std::io::Error>>()?;
                run(Command::new("sync").args(written))
            })?;
            std::fs::remove_dir_all(&copy)?;
            measure(1, &base, &fragments, &|| {
                let _: FragmentPlan = split(&base, 24, &fragments)?;
                Ok(())
            })?;
            measure(2, &fragments, &out, &|| {
                assemble(&base, &fragments, &out)?;
                Ok(())
            })?;
        }
        for ((name, times), peak) in NAMES.iter().zip(best).zip(peaks) {
            let (share, rate) = (100.0 * best[0].clock / times.clock, 2.0 * bytes / times.clock / 1e9);
            let Times { clock, processor } = times;
            let gigabytes = bytes / 1e9;
            println!("| {name}, {gigabytes:.1} GB ({share:.0} % of cp's speed) | {clock:.3} | {processor:.3} | {rate:.2} | | {peak} MiB |");
        }
        Ok(())
    }
}

/// Seconds by the clock, and processor seconds by thread.
#[derive(Clone, Copy)]
struct Times {
    clock: f64,
    processor: f64,
}

impl Times {
    const WORST: Self = Self { clock: f64::INFINITY, processor: f64::INFINITY };

    fn min(self, other: Self) -> Self {
        Self { clock: self.clock.min(other.clock), processor: self.processor.min(other.processor) }
    }
}

fn timed(work: &mut dyn FnMut() -> Result<(), Failure>) -> Result<Times, Failure> {
    let (start, before) = (Instant::now(), processor_seconds());
    work()?;
    let processor = (processor_seconds() - before) / rayon::current_num_threads() as f64;
    Ok(Times { clock: start.elapsed().as_secs_f64(), processor })
}

/// Processor time of all threads so far, to a nanosecond.
fn processor_seconds() -> f64 {
    let threads = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let nanoseconds = |task: std::fs::DirEntry| {
        let text = std::fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
        text.split_whitespace().next().and_then(|time| time.parse::<u64>().ok()).unwrap_or_default()
    };
    threads.map(nanoseconds).sum::<u64>() as f64 / 1e9
}

/// Processor time of this process, with threads and children that have ended, to ten milliseconds.
fn process_seconds() -> f64 {
    const TICKS_PER_SECOND: f64 = 100.0;
    let text = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // utime, stime, cutime, cstime: fields 14 to 17, of which the second one, in brackets, may hold blanks.
    let fields = text.rsplit(')').next().unwrap_or_default().split_whitespace().skip(11).take(4);
    fields.filter_map(|field| field.parse::<u64>().ok()).sum::<u64>() as f64 / TICKS_PER_SECOND
}

fn offer<'a>(header: &'a PayloadHeader, payload: &'a dyn Source) -> Offer<'a> {
    Offer { header, payload, weight: 1, unit_weights: None }
}

/// A triad over three arrays that are far larger than any cache; best of several rounds, in GB/s.
fn triad() -> f64 {
    const ELEMENTS: usize = 64 << 20;
    const TASK: usize = 1 << 20;
    let (b, c) = (vec![1.0f32; ELEMENTS], vec![2.0f32; ELEMENTS]);
    let mut a = vec![0.0f32; ELEMENTS];
    let mut best = Times::WORST;
    for round in 0..2 * ROUNDS {
        let factor = round as f32;
        let mut work = || {
            a.par_chunks_mut(TASK).zip(b.par_chunks(TASK)).zip(c.par_chunks(TASK)).for_each(|((a, b), c)| {
                for ((a, b), c) in a.iter_mut().zip(b).zip(c) {
                    *a = b + factor * c;
                }
            });
            black_box(&a);
            Ok(())
        };
        if let Ok(times) = timed(&mut work) {
            best = best.min(times);
        }
    }
    12.0 * ELEMENTS as f64 / best.processor / 1e9
}

fn slice(tensor: &str, rows: u64, row_elements: u64, unit_rows: u64, rule: MergeRule) -> Slice {
    Slice { tensor: tensor.to_owned(), row_start: 0, row_end: rows, row_elements, unit_rows, dtype: DType::Bf16, rule }
}

/// 64 million parameters in the proportions of the real fragments: experts, rows of an embedding, a matrix, vectors, a scalar.
fn dense_slices() -> Vec<Slice> {
    vec![
        slice("a.experts_w12", 16, 2048 * 1024, 1, MergeRule::Rda),
        slice("a.experts_w3", 16, 512 * 2048, 1, MergeRule::Rda),
        slice("a.gain", 1, 1, 1, MergeRule::Mean),
        slice("b.norm", 2048, 1, 2048, MergeRule::Mean),
        slice("b.weight", 2048, 2048, 2048, MergeRule::Rda),
        slice("embeddings", 4600, 2048, 4600, MergeRule::Mean),
    ]
}

fn random(counter: u64) -> u64 {
    let mut word = counter.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ word >> 31
}

/// A pseudo-gradient: a tenth common to all learners, the rest its own.
fn fill(values: &mut [f32], learner: u64) {
    let uniform = |word: u64| (word >> 40) as f32 / (1 << 23) as f32 - 1.0;
    values.par_chunks_mut(1 << 16).enumerate().for_each(|(chunk, values)| {
        for (index, value) in values.iter_mut().enumerate() {
            let place = (chunk << 16 | index) as u64;
            *value = 1e-3 * (0.33 * uniform(random(place)) + uniform(random(learner << 40 | place)));
        }
    });
}

/// A tree of about 2 GB in four shards; returns its bytes.
fn write_tree(dir: &Path) -> Result<u64, Failure> {
    std::fs::create_dir_all(dir)?;
    let mut index = serde_json::Map::new();
    let mut total = 0;
    for shard in 0..TREE_SHARDS {
        let name = format!("model-{:05}-of-{TREE_SHARDS:05}.safetensors", shard + 1);
        let spec = |name: &str, shape: &[u64]| TensorSpec {
            name: format!("model.layers.{shard}.{name}"),
            shape: shape.to_vec(),
            dtype: DType::Bf16,
        };
        let contract = Contract::new(vec![
            spec("mlp.experts_w12", &[64, 2048, 1024]),
            spec("mlp.experts_w3", &[64, 512, 2048]),
            spec("attention.dense.weight", &[2048, 2048]),
            spec("embed.weight", &[20_000, 2048]),
            spec("norm.weight", &[2048]),
        ])?;
        let (mut header, mut at) = (serde_json::Map::new(), 0);
        for tensor in &contract.tensors {
            let end = at + tensor.bytes();
            header.insert(tensor.name.clone(), serde_json::json!({"dtype": "BF16", "shape": tensor.shape, "data_offsets": [at, end]}));
            index.insert(tensor.name.clone(), name.clone().into());
            at = end;
        }
        let header = serde_json::Value::from(header).to_string();
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.as_bytes());
        let start = file.len();
        file.resize(start + at as usize, 0);
        file[start..].par_chunks_mut(2 << 16).enumerate().for_each(|(chunk, bytes)| {
            for (element, two) in bytes.chunks_exact_mut(2).enumerate() {
                // Any mantissa and sign, a moderate exponent.
                let word = random((shard << 50 | chunk << 16 | element) as u64) as u16;
                two.copy_from_slice(&(word & 0x80ff | 0x3c00).to_le_bytes());
            }
        });
        std::fs::write(dir.join(name), &file)?;
        total += file.len() as u64;
    }
    std::fs::write(dir.join("model.safetensors.index.json"), serde_json::json!({"metadata": {}, "weight_map": index}).to_string())?;
    run(&mut Command::new("sync"))?;
    Ok(total)
}

fn run(command: &mut Command) -> Result<(), Failure> {
    let status = command.status()?;
    if status.success() { Ok(()) } else { Err(format!("{command:?}: {status}").into()) }
}

/// Forgets the highest memory use so far.
fn reset_peak() {
    // Where the kernel does not offer it, peaks are those since the start.
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// Highest resident memory since [`reset_peak`].
fn peak_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).unwrap_or_default() / 1024
}
