//! The loss of a checkpoint on a file of tokens.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use super::evaluator::{EvaluatorOptions, QuasarEvaluator};
use crate::{Batch, Evaluator, TrainError};

/// Rows read and evaluated at a time.
const ROWS_AT_A_TIME: usize = 16;
/// Longest sequence that is evaluated.
const SEQUENCE_MAX: usize = 1 << 20;

/// A measured loss.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Loss {
    /// Mean next-token loss in nats.
    pub loss: f64,
    /// Tokens read: rows times sequence length.
    pub tokens: u64,
    pub rows: u64,
}

/// Mean loss of the checkpoint in `folder` on the headerless little-endian u32 tokens of `file`, cut into rows of
/// `sequence_length`; a shorter rest at the end is left out. At most `max_rows` rows are read.
pub fn checkpoint_loss(
    folder: &Path,
    file: &Path,
    sequence_length: usize,
    options: &EvaluatorOptions,
    max_rows: Option<u64>,
) -> Result<Loss, TrainError> {
    if !(2..=SEQUENCE_MAX).contains(&sequence_length) {
        return Err(TrainError::Batch(format!("a sequence length of {sequence_length}; it must lie between 2 and {SEQUENCE_MAX}")));
    }
    let io = |source| TrainError::Io { path: file.display().to_string(), source };
    let mut reader = BufReader::new(File::open(file).map_err(io)?);
    let bytes = reader.get_ref().metadata().map_err(io)?.len();
    if !bytes.is_multiple_of(4) {
        return Err(TrainError::Batch(format!("{} has {bytes} bytes, which is no whole number of u32 tokens", file.display())));
    }
    let rows = (bytes / 4 / sequence_length as u64).min(max_rows.unwrap_or(u64::MAX));
    if rows == 0 {
        return Err(TrainError::Batch(format!("{} holds no row of {sequence_length} tokens", file.display())));
    }
    let mut evaluator = QuasarEvaluator::open_with(folder, None, options)?;
    let (mut sum, mut left) = (0.0, rows);
    while left > 0 {
        let now = left.min(ROWS_AT_A_TIME as u64) as usize;
        let mut buffer = vec![0u8; 4 * now * sequence_length];
        reader.read_exact(&mut buffer).map_err(io)?;
        let (words, _) = buffer.as_chunks::<4>();
        let tokens: Vec<u32> = words.iter().map(|word| u32::from_le_bytes(*word)).collect();
        sum += evaluator.losses(&Batch { tokens: &tokens, rows: now, row_tokens: sequence_length })?.iter().sum::<f64>();
        left -= now as u64;
    }
    Ok(Loss { loss: sum / rows as f64, tokens: rows * sequence_length as u64, rows })
}
