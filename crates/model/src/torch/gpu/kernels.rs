//! The set of own kernels for one model on one GPU: compiled at start with the model's sizes as constants, kept in a cache.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use tch::{Device, Kind, Tensor};

use super::driver::{self, Argument, Function, Gpu, Stream};
use super::pinned::Pool;
use crate::QuasarConfig;
use crate::torch::ops::Result;

const COMMON: &str = include_str!("kernels/common.cuh");
const TILE: &str = include_str!("kernels/tile.cuh");

/// Elements of a row of a tile of 128 and of 64 columns in shared memory, and of 32.
const WIDE: usize = 136;
const HALF: usize = 72;
const QUARTER: usize = 40;
/// f32 values in a row of per-slot values.
const SLOT_ROW: usize = 65;

/// Dynamic shared memory: bf16 elements and f32 values.
const fn shared(halves: usize, singles: usize) -> usize {
    2 * halves + 4 * singles
}

/// One source file, and its kernels with their dynamic shared memory in bytes.
struct Source {
    name: &'static str,
    text: &'static str,
    /// Whether it uses the tile products.
    has_tiles: bool,
    /// Whether its kernels use shared memory as far as there is some, and need none.
    is_frugal: bool,
    kernels: &'static [(&'static str, usize)],
}

impl Source {
    /// Its kernels with the dynamic shared memory that they get of a GPU that has `shared_bytes` for a block.
    fn sized(&self, shared_bytes: usize) -> Vec<(&'static str, usize)> {
        let most = if self.is_frugal { shared_bytes.saturating_sub(FIXED_BYTES) } else { usize::MAX };
        self.kernels.iter().map(|(name, bytes)| (*name, (*bytes).min(most))).collect()
    }
}

const SLOT_CHUNK: usize = shared(4 * 32 * WIDE + 2 * 128 * HALF + 32 * HALF + 32 * QUARTER, 4 * 32 * SLOT_ROW + 2 * 32 * 33);
/// Static shared memory of a block, at most, bytes.
const FIXED_BYTES: usize = 1024;
/// Logits that a block keeps: 12 vectors of 16 bytes for each of 1,024 threads.
const LOSS_ROW: usize = 12 * 1024 * 16;
const STATES: usize = shared(128 * HALF + 2 * (2 * 64 * WIDE + 64 * HALF), 0);
const OUTPUT: usize = shared(3 * 64 * WIDE + 128 * WIDE + 64 * HALF, 0);

const SOURCES: [Source; 7] = [
    Source {
        name: "norm.cu",
        text: include_str!("kernels/norm.cu"),
        has_tiles: false,
        is_frugal: false,
        kernels: &[
            ("rms_forward", 0),
            ("rms_backward", 0),
            ("column_sums", 0),
            ("column_partials", 0),
            ("branch_scale", 0),
            ("branch_add", 0),
            ("branch_enter", 0),
            ("branch_leave", 0),
        ],
    },
    Source {
        name: "attention.cu",
        text: include_str!("kernels/attention.cu"),
        has_tiles: false,
        is_frugal: false,
        kernels: &[
            ("qk_forward", 0),
            ("qk_backward", 0),
            ("head_gate_forward", 0),
            ("head_gate_backward", 0),
            ("delta_inputs", 0),
            ("delta_inputs_backward", 0),
        ],
    },
    Source {
        name: "moe.cu",
        text: include_str!("kernels/moe.cu"),
        has_tiles: false,
        is_frugal: false,
        kernels: &[
            ("route_forward", 0),
            ("route_backward", 0),
            ("sort_count", 0),
            ("sort_scan", 0),
            ("sort_place", 0),
            ("gather_rows", 0),
            ("combine_rows", 0),
            ("swiglu_forward", 0),
            ("swiglu_backward", 0),
        ],
    },
    Source {
        name: "loss.cu",
        text: include_str!("kernels/loss.cu"),
        has_tiles: false,
        is_frugal: true,
        kernels: &[("cross_entropy", LOSS_ROW)],
    },
    Source {
        name: "adamw.cu",
        text: include_str!("kernels/adamw.cu"),
        has_tiles: false,
        is_frugal: false,
        kernels: &[
            ("square_sums", 0),
            ("judge", 0),
            ("adamw", 0),
            ("split_values", 0),
            ("join_values", 0),
            ("copy_values", 0),
            ("copy_bytes", 0),
            ("moments_out", 0),
            ("moments_in", 0),
        ],
    },
    Source {
        name: "linear.cu",
        text: include_str!("kernels/linear.cu"),
        has_tiles: true,
        is_frugal: false,
        kernels: &[
            ("delta_prepare", shared(2 * 64 * WIDE + 64 * HALF, 64 * 68 + 64)),
            ("delta_states", STATES),
            ("delta_output", OUTPUT),
            ("delta_local", shared(3 * 64 * WIDE + 64 * HALF, 0)),
            ("delta_states_backward", shared(128 * HALF + 2 * (3 * 64 * WIDE + 2 * 64 * HALF), 0)),
            ("delta_gradients", shared(6 * 64 * WIDE + 128 * WIDE + 2 * 64 * HALF, 3 * 64)),
            ("decay_states", STATES),
            ("decay_output", OUTPUT),
            ("decay_states_backward", shared(128 * HALF + 2 * (64 * WIDE + 64 * HALF), 0)),
            ("decay_gradients", shared(4 * 64 * WIDE + 2 * 128 * WIDE + 2 * 64 * HALF, 0)),
        ],
    },
    Source {
        name: "slots.cu",
        text: include_str!("kernels/slots.cu"),
        has_tiles: true,
        is_frugal: false,
        kernels: &[
            ("slot_inputs", 0),
            ("slot_inputs_backward", 0),
            ("slot_gates", 0),
            ("slot_walk", 0),
            ("slot_output", SLOT_CHUNK),
            ("slot_softmax_backward", SLOT_CHUNK),
            (
                "slot_gradients",
                shared(4 * 32 * WIDE + 3 * 128 * HALF + 2 * 32 * HALF + 2 * 32 * QUARTER, 5 * 32 * SLOT_ROW + 2 * 32 * 33 + 512),
            ),
        ],
    },
];

/// Constants of an optimizer step, as the kernel lays them out.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct StepSettings {
    pub keep: f32,
    pub beta1: f32,
    pub beta2: f32,
    pub step_size: f32,
    pub root_factor: f32,
    pub eps: f32,
    pub step: u32,
}

/// The kernels use bf16 products and asynchronous copies of this compute capability.
const CAPABILITY_MIN: u32 = 80;
/// Sizes that the kernels are built for.
const HEAD_DIM: usize = 128;
const ROTARY_WIDTH: usize = 64;
const SLOTS: usize = 64;
const THREADS_MAX: usize = 1024;
const WARP: usize = 32;

/// Why a model cannot run on the kernels, if it cannot.
pub(crate) fn unsupported(config: &QuasarConfig) -> Option<String> {
    let must: [(&str, bool); 10] = [
        ("head_dim must be 128", config.head_dim == HEAD_DIM),
        ("the rotary width must be 64", config.rotary_width() == ROTARY_WIDTH),
        ("hybrid_raven_slots must be 64", config.raven_slots == SLOTS),
        (
            "hidden_size must be a multiple of 1024, up to 8192",
            config.hidden_size.is_multiple_of(1024) && config.hidden_size <= 8 * THREADS_MAX,
        ),
        ("num_experts must be a multiple of 32, up to 1024", config.num_experts.is_multiple_of(WARP) && config.num_experts <= THREADS_MAX),
        ("n_group must be at most 32", config.n_group <= WARP),
        ("num_experts_per_tok must be at most 32", config.num_experts_per_tok <= WARP),
        ("vocab_size must be a multiple of 8", config.vocab_size.is_multiple_of(8)),
        (
            "the widths of the feed-forward layers must be multiples of 8",
            config.intermediate_size.is_multiple_of(8) && config.moe_intermediate_size.is_multiple_of(8),
        ),
        ("num_loops must be 1", config.num_loops == 1),
    ];
    must.iter().find(|(_, holds)| !holds).map(|(text, _)| (*text).to_owned())
}

/// Why a GPU cannot run the kernels, if it cannot: known before anything is compiled.
fn too_small(name: &str, capability: u32, shared_bytes: usize) -> Option<String> {
    if capability < CAPABILITY_MIN {
        let [has, needed] = [capability, CAPABILITY_MIN].map(|capability| format!("{}.{}", capability / 10, capability % 10));
        return Some(format!("the GPU ({name}) has compute capability {has}, and {needed} is needed"));
    }
    let kernels = SOURCES.iter().filter(|source| !source.is_frugal).flat_map(|source| source.kernels);
    let (kernel, needed) = kernels.max_by_key(|(_, bytes)| *bytes)?;
    (*needed > shared_bytes).then(|| {
        format!("the GPU ({name}) has {shared_bytes} bytes of shared memory for a block of threads, and {needed} are needed ({kernel})")
    })
}

/// All kernels for one model on one GPU.
pub(crate) struct Kernels {
    pub gpu: Gpu,
    pub device: Device,
    /// For copies beside the computation.
    pub side: Stream,
    pub pool: Pool,
    hidden: u32,
    functions: HashMap<&'static str, Function>,
}

impl Kernels {
    /// Compiles the kernels for `config` with `further` options for the compiler, or takes them from `cache`, a folder for machine code.
    pub fn new(config: &QuasarConfig, device: Device, cache: Option<&Path>, further: &[String]) -> std::result::Result<Self, String> {
        let Device::Cuda(index) = device else { return Err("not a CUDA device".into()) };
        let gpu = Gpu::open(index)?;
        if let Some(reason) = too_small(&gpu.name()?, gpu.capability, gpu.shared_bytes as usize) {
            return Err(reason);
        }
        let sizes = [
            ("HIDDEN", config.hidden_size),
            ("HEADS", config.num_attention_heads),
            ("KV_HEADS", config.num_key_value_heads),
            ("EXPERTS", config.num_experts),
            ("GROUPS", config.n_group),
            ("GROUPS_KEPT", config.topk_group),
            ("CHOICES", config.num_experts_per_tok),
            ("VOCABULARY", config.vocab_size),
            ("SLOTS", config.raven_slots),
            ("KEPT", config.raven_topk),
        ];
        let mut options: Vec<String> = ["--std=c++17", "-default-device", "-diag-suppress=177"].map(str::to_owned).into();
        options.extend(sizes.iter().map(|(name, value)| format!("-D{name}={value}")));
        options.extend_from_slice(further);
        let codes: Vec<_> = std::thread::scope(|scope| {
            let threads = SOURCES.each_ref().map(|source| scope.spawn(|| code_of(source, gpu.capability, &options, cache)));
            threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| Err("the compiler's thread panicked".into()))).collect()
        });
        let mut functions = HashMap::new();
        for (source, code) in SOURCES.iter().zip(codes) {
            let kernels = source.sized(gpu.shared_bytes as usize);
            let loaded = driver::load(&gpu, &code?, &kernels).or_else(|reason| {
                // A damaged cache must not cost the kernels.
                tracing::warn!(%reason, source = source.name, "kept kernels cannot be loaded; compiling them again");
                driver::load(&gpu, &code_of(source, gpu.capability, &options, None)?, &kernels)
            })?;
            functions.extend(source.kernels.iter().map(|(name, _)| *name).zip(loaded));
        }
        let side = Stream::beside(&gpu)?;
        Ok(Self { gpu, device, side, pool: Pool::default(), hidden: config.hidden_size as u32, functions })
    }

    /// Launches a kernel of this set. The call sites in this module's siblings pair each kernel with its arguments; they are checked
    /// against libtorch by the tests on a GPU.
    pub fn launch(&self, name: &str, blocks: impl Into<Blocks>, threads: impl Into<Blocks>, arguments: &[Argument]) -> Result<()> {
        self.launch_in(Stream::NULL, name, blocks, threads, arguments)
    }

    /// As [`Kernels::launch`], in a stream.
    pub fn launch_in(
        &self,
        stream: Stream,
        name: &str,
        blocks: impl Into<Blocks>,
        threads: impl Into<Blocks>,
        arguments: &[Argument],
    ) -> Result<()> {
        let function = *self.functions.get(name).ok_or_else(|| tch::TchError::Kind(format!("there is no kernel {name}")))?;
        let (blocks, threads) = (blocks.into(), threads.into());
        // SAFETY: see above.
        unsafe { driver::launch(&self.gpu, stream, function, (blocks.0, blocks.1), (threads.0, threads.1), arguments) }
            .map_err(|reason| tch::TchError::Torch(format!("kernel {name}: {reason}")))
    }

    /// Threads of a block that takes one row of the hidden width.
    pub fn row_threads(&self) -> u32 {
        self.hidden / 8
    }

    /// Blocks for kernels that walk over rows and keep partial sums.
    pub fn walkers(&self, rows: i64) -> u32 {
        (8 * self.gpu.multiprocessors).min(rows.max(1) as u32)
    }

    pub fn empty(&self, shape: &[i64], kind: Kind) -> Result<Tensor> {
        Tensor::f_empty(shape, (kind, self.device))
    }

    /// Sums the rows of `[rows, columns]` f32.
    pub fn column_sums(&self, partial: &Tensor) -> Result<Tensor> {
        let size = partial.size();
        let out = self.empty(&[size[1]], Kind::Float)?;
        let blocks = (size[1] as u32).div_ceil(32);
        self.launch(
            "column_sums",
            blocks,
            (32u32, 8u32),
            &[partial.into(), (&out).into(), (size[0] as i32).into(), (size[1] as i32).into()],
        )?;
        Ok(out)
    }
}

/// Blocks or threads in two dimensions.
pub(crate) struct Blocks(u32, u32);

impl From<u32> for Blocks {
    fn from(x: u32) -> Self {
        Self(x, 1)
    }
}

impl From<i64> for Blocks {
    fn from(x: i64) -> Self {
        Self(x as u32, 1)
    }
}

impl From<(u32, u32)> for Blocks {
    fn from((x, y): (u32, u32)) -> Self {
        Self(x, y)
    }
}

impl From<(i64, i64)> for Blocks {
    fn from((x, y): (i64, i64)) -> Self {
        Self(x as u32, y as u32)
    }
}

/// Blocks of 8 warps for one warp an item.
pub(crate) fn warps(items: i64) -> i64 {
    (items + 7) / 8
}

/// Machine code of one source file, from the cache where it lies there. The name of the cached file says everything that the code depends on.
fn code_of(source: &Source, capability: u32, options: &[String], cache: Option<&Path>) -> std::result::Result<Vec<u8>, String> {
    let text = format!("{COMMON}\n{}\n{}", if source.has_tiles { TILE } else { "" }, source.text);
    let Some(folder) = cache else { return driver::compile(source.name, &text, capability, options) };
    let mut hasher = blake3::Hasher::new();
    hasher.update(format!("{:?} {capability} {options:?} ", driver::compiler_version()?).as_bytes()).update(text.as_bytes());
    let file: PathBuf = folder.join(format!("{}-{}.cubin", source.name.trim_end_matches(".cu"), &hasher.finalize().to_hex()[..32]));
    if let Ok(code) = std::fs::read(&file) {
        return Ok(code);
    }
    let code = driver::compile(source.name, &text, capability, options)?;
    // Through a file of its own: another process may do the same.
    let unfinished = folder.join(format!("{}.{}.tmp", source.name, std::process::id()));
    let stored = std::fs::create_dir_all(folder)
        .and_then(|()| std::fs::write(&unfinished, &code))
        .and_then(|()| std::fs::rename(&unfinished, &file));
    if let Err(error) = stored {
        tracing::warn!(%error, folder = %folder.display(), "compiled kernels could not be kept: the next start compiles them again");
    }
    Ok(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpus_with_too_little_shared_memory_are_told_so_before_anything_is_compiled() {
        let enough = [("NVIDIA H100 80GB HBM3", 90, 232_448), ("NVIDIA B200", 100, 232_448), ("NVIDIA A100-SXM4-80GB", 80, 166_912)];
        for (name, capability, shared_bytes) in enough {
            assert_eq!(too_small(name, capability, shared_bytes), None);
            for (kernel, bytes) in SOURCES.iter().flat_map(|source| source.sized(shared_bytes)) {
                assert!(bytes + FIXED_BYTES <= shared_bytes, "{kernel} on {name}");
            }
        }
        let reason = too_small("NVIDIA L40S", 89, 101_376).unwrap();
        assert!(["NVIDIA L40S", "101376", "159744", "delta_states_backward"].iter().all(|part| reason.contains(part)), "{reason}");
        let old = too_small("Tesla V100", 70, 98_304).unwrap();
        assert!(old.contains("Tesla V100") && old.contains("7.0") && old.contains("8.0"), "{old}");
    }
}
