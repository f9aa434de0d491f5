//! What all runs share: the devnet's settings, model configuration and text.

use std::path::{Path, PathBuf};

use anyhow::Context;
use data::{Catalog, HeldOut, PrepareSettings, ShardReader, prepare};
use fragments::CheckpointTree;
use model::{Batch, ComputeType, Evaluator, Hyper, QuasarConfig, QuasarEvaluator, QuasarTrainer, Trainer, TrainerOptions, init};
use protocol::documents::{PPM, RunParameters};
use protocol::lease::row_order;
use protocol::{DType, Digest, FragmentPlan};

/// Rows that losses are measured on, spread evenly over the held-out text.
const HELD_OUT_ROWS: usize = 64;

/// Everything that does not depend on the seed.
pub struct Setting {
    pub parameters: RunParameters,
    /// Steps of each learner.
    pub steps: u64,
    pub training: Rows,
    pub held_out: Rows,
    /// Our training step in plain PyTorch.
    pub script: PathBuf,
    config: QuasarConfig,
    /// Where models are trained and judged.
    device: String,
    folder: tempfile::TempDir,
}

impl Setting {
    /// Reads the repository's configuration and cuts its text into rows. The learning rate follows its schedule over exactly
    /// `cycles` cycles, as on a devnet of that length. `model` is a configuration, as a path in the repository; `batch` the rows and the
    /// tokens in each of a learner's step, where they are not the devnet's.
    pub fn prepare(cycles: u64, model: &str, batch: Option<(u32, u32)>) -> anyhow::Result<Self> {
        // Asked at run time: clones may share one target folder.
        let started = std::env::var_os("CARGO_MANIFEST_DIR").context("the repository is unknown\nhint: use `cargo xtask bench …`")?;
        let root = Path::new(&started).ancestors().find(|folder| folder.join("Cargo.lock").is_file());
        let root = root.context("the package lies in no repository")?;
        let configs = root.join("configs");

        let path = configs.join("run-devnet.toml");
        let mut file: toml::Table = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?.parse()?;
        let parameters = file.remove("parameters").with_context(|| format!("{} has no [parameters]", path.display()))?;
        let mut parameters: RunParameters = parameters.try_into()?;
        anyhow::ensure!(parameters.inner_steps == parameters.fragments, "one fragment a step is expected: H = P");
        anyhow::ensure!(u16::from(parameters.overlap) < parameters.fragments, "a fragment would be merged again before it is applied");
        let steps = cycles * u64::from(parameters.inner_steps);
        parameters.cycles = cycles;
        (parameters.batch_rows, parameters.sequence_length) = batch.unwrap_or((parameters.batch_rows, parameters.sequence_length));
        parameters.inner.schedule.total_steps = steps;

        let folder = tempfile::tempdir()?;
        let corpus = configs.join("corpus");
        let out = folder.path().join("shards");
        let catalog = prepare(&PrepareSettings {
            inputs: vec![corpus.join("sotu.jsonl.xz")],
            tokenizer: corpus.join("tokenizer.json"),
            end_of_text: None,
            sequence_length: parameters.sequence_length,
            held_out: HeldOut::ids_from_file(&corpus.join("held_out.txt"))?,
            shard_tokens: data::prepare::SHARD_TOKENS_DEFAULT,
            shuffle_seed: None,
            name: "sotu".into(),
            licence: "CC0-1.0".into(),
            source: "State of the Union addresses".into(),
            out: out.clone(),
        })?;
        Ok(Self {
            training: Rows::read(&out, &catalog, false)?,
            held_out: Rows::read(&out, &catalog, true)?.spread(HELD_OUT_ROWS),
            script: root.join("tests/bench/pytorch_step.py"),
            config: QuasarConfig::from_file(&root.join(model))?,
            parameters,
            steps,
            device: "cpu".into(),
            folder,
        })
    }

    /// Trains on another device from now on: `cuda:N`, with the libraries of the full torch installation that
    /// `QUASAR_TORCH_CUDA_DIR` names.
    pub fn on(mut self, device: &str) -> anyhow::Result<Self> {
        if device != "cpu" {
            let torch = std::env::var_os("QUASAR_TORCH_CUDA_DIR")
                .context("a GPU needs QUASAR_TORCH_CUDA_DIR, the folder of a full torch installation")?;
            model::load_cuda(Path::new(&torch))?;
        }
        device.clone_into(&mut self.device);
        // libtorch loads parts of itself at their first use and fails if two threads do that at the same time.
        let base = self.base(1)?;
        self.train(&mut self.trainer(&base)?, 0, 0..1)?;
        Ok(self)
    }

    /// A learner of this model: f32, through libtorch's operations on every device.
    pub fn trainer(&self, base: &Base) -> anyhow::Result<QuasarTrainer> {
        let options = TrainerOptions {
            device: self.device.clone(),
            own_kernels: false,
            compute: Some(ComputeType::F32),
            ..TrainerOptions::default()
        };
        Ok(QuasarTrainer::open_with(&base.folder, base.plan.clone(), &options)?)
    }

    /// A fresh model and the plan of its fragments, as `checkpoint init` and `run create` make them.
    pub fn base(&self, seed: u64) -> anyhow::Result<Base> {
        let folder = self.folder.path().join(format!("base-{seed}"));
        if !folder.exists() {
            init::fresh(&self.config, seed, DType::F32, &folder)?;
        }
        let tree = CheckpointTree::open(&folder)?;
        let plan = fragments::plan(tree.contract(), usize::from(self.parameters.fragments))?;
        Ok(Base { folder, tree, plan })
    }

    /// A file name of our own.
    pub fn scratch(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Optimizer settings of the run's step `step`.
    pub fn hyper(&self, step: u64) -> Hyper {
        let inner = &self.parameters.inner;
        let ppm = |value: u64| value as f64 / PPM as f64;
        Hyper {
            lr: inner.lr(step),
            beta1: ppm(inner.beta1_ppm.into()),
            beta2: ppm(inner.beta2_ppm.into()),
            eps: inner.eps_pico as f64 * 1e-12,
            weight_decay: ppm(inner.weight_decay_ppm.into()),
            clip_norm: ppm(inner.clip_norm_ppm),
        }
    }

    /// The order in which the learners of a run with this seed read the training rows.
    pub fn order(&self, seed: u64, learners: usize) -> Order {
        let digest = Digest::derive("quasar learning bench rows", &[&seed.to_le_bytes()]);
        let rows = row_order(&digest, self.training.count() as u32);
        Order { rows, batch_rows: self.parameters.batch_rows as usize, learners }
    }

    /// Mean loss of a model on the held-out rows, in nats; of the base where there is no model.
    pub fn held_out_loss(&self, base: &Base, model: Option<&Model>) -> anyhow::Result<f64> {
        let mut judge = QuasarEvaluator::open(&base.folder, &base.plan, &self.device, 1)?;
        for (fragment, values) in model.into_iter().flatten().enumerate() {
            judge.apply(fragment, values)?;
        }
        let rows = &self.held_out;
        let losses = judge.losses(&Batch { tokens: rows.tokens(), rows: rows.count(), row_tokens: rows.row_tokens })?;
        Ok(losses.iter().sum::<f64>() / losses.len() as f64)
    }

    /// One step of a trainer on some rows; gives the training loss.
    pub fn train(&self, trainer: &mut QuasarTrainer, step: u64, rows: impl Iterator<Item = u32>) -> anyhow::Result<f64> {
        let (tokens, row_tokens) = (self.training.gather(rows), self.training.row_tokens);
        let batch = Batch { tokens: &tokens, rows: tokens.len() / row_tokens, row_tokens };
        Ok(trainer.step(&batch, &self.hyper(step), None, false)?.loss)
    }
}

/// The start of a run.
pub struct Base {
    pub folder: PathBuf,
    pub tree: CheckpointTree,
    pub plan: FragmentPlan,
}

/// All values of a model by fragment.
pub type Model = Vec<Vec<f32>>;

/// Token rows of equal length in memory.
pub struct Rows {
    tokens: Vec<u32>,
    pub row_tokens: usize,
}

impl Rows {
    fn read(folder: &Path, catalog: &Catalog, held_out: bool) -> anyhow::Result<Self> {
        let mut tokens = Vec::new();
        for shard in catalog.side(held_out) {
            let reader = ShardReader::open_verified(&Catalog::tokens_path(folder, shard), shard)?;
            for row in 0..reader.rows() {
                tokens.extend_from_slice(reader.row(row)?);
            }
        }
        anyhow::ensure!(!tokens.is_empty(), "the corpus has no row for one of its sides");
        Ok(Self { tokens, row_tokens: catalog.sequence_length as usize })
    }

    pub fn count(&self) -> usize {
        self.tokens.len() / self.row_tokens
    }

    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The tokens of some rows, one row after the other.
    pub fn gather(&self, rows: impl Iterator<Item = u32>) -> Vec<u32> {
        rows.flat_map(|row| &self.tokens[row as usize * self.row_tokens..][..self.row_tokens]).copied().collect()
    }

    /// At most `most` of the rows, at even distances.
    fn spread(self, most: usize) -> Self {
        let count = self.count();
        let kept = count.min(most);
        Self { tokens: self.gather((0..kept).map(|at| (at * count / kept) as u32)), row_tokens: self.row_tokens }
    }
}

/// Which rows are trained on when.
pub struct Order {
    rows: Vec<u32>,
    batch_rows: usize,
    learners: usize,
}

impl Order {
    /// Rows of learner `learner` at step `step`: no two learners share one, and none comes again before all were read.
    pub fn of(&self, step: u64, learner: usize) -> impl Iterator<Item = u32> + '_ {
        let start = (step as usize * self.learners + learner) * self.batch_rows;
        (start..start + self.batch_rows).map(|at| self.rows[at % self.rows.len()])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn learners_share_no_row_and_every_row_is_read_before_one_comes_again() {
        let order = Order { rows: row_order(&Digest::blake3(b"seed"), 24), batch_rows: 4, learners: 3 };
        let mut read: Vec<u32> =
            (0..2).flat_map(|step| (0..3).flat_map(move |learner| [(step, learner)])).flat_map(|(s, l)| order.of(s, l)).collect();
        read.sort_unstable();
        assert_eq!(read, (0..24).collect::<Vec<_>>());
    }

    #[test]
    fn a_spread_keeps_the_bound_and_takes_whole_rows_at_even_distances() {
        let rows = || Rows { tokens: (0..20).collect(), row_tokens: 2 };
        assert_eq!(rows().spread(3).tokens, [0, 1, 6, 7, 12, 13]);
        assert_eq!(rows().spread(99).tokens, rows().tokens);
    }
}
