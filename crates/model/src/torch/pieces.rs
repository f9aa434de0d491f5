//! A batch that is passed through in pieces: groups of rows, or documents.

use std::ops::Range;

use crate::{Batch, QuasarConfig, Routes};

impl Batch<'_> {
    /// The batch as pieces that are passed through one after the other: groups of `rows` whole rows, or, with the token that ends a document,
    /// every document by itself. A row is cut behind each such token, unless one side would have a single token, which predicts nothing.
    pub(crate) fn pieces(&self, rows: usize, document_end: Option<u32>) -> Vec<Piece> {
        let Some(last) = document_end else {
            let group = |from: usize| {
                let rows = rows.min(self.rows - from);
                Piece { range: from * self.row_tokens..(from + rows) * self.row_tokens, row_tokens: self.row_tokens }
            };
            return (0..self.rows).step_by(rows.max(1)).map(group).collect();
        };
        let mut pieces = Vec::new();
        for row in 0..self.rows {
            let (mut from, end) = (row * self.row_tokens, (row + 1) * self.row_tokens);
            for at in from + 1..end {
                if self.tokens[at - 1] == last && at - from >= 2 && end - at >= 2 {
                    pieces.push(Piece { range: from..at, row_tokens: at - from });
                    from = at;
                }
            }
            pieces.push(Piece { range: from..end, row_tokens: end - from });
        }
        pieces
    }
}

/// A part of a batch: tokens `range`, in rows of `row_tokens`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub range: Range<usize>,
    pub row_tokens: usize,
}

impl Piece {
    pub fn of<'a>(&self, batch: &Batch<'a>) -> Batch<'a> {
        let tokens = &batch.tokens[self.range.clone()];
        Batch { tokens, rows: tokens.len() / self.row_tokens, row_tokens: self.row_tokens }
    }

    /// Tokens that are predicted.
    pub fn predicted(&self) -> usize {
        self.range.len() / self.row_tokens * (self.row_tokens - 1)
    }
}

impl Routes {
    /// The choices for some of the `tokens` tokens of a batch.
    pub(crate) fn part(&self, config: &QuasarConfig, tokens: usize, range: &Range<usize>) -> Self {
        let choices = config.num_experts_per_tok;
        let part = range.start * choices..range.end * choices;
        Self(self.0.chunks((tokens * choices).max(1)).flat_map(|layer| &layer[part.clone()]).copied().collect())
    }

    /// The choices of a batch from those of its pieces in order.
    pub(crate) fn join(config: &QuasarConfig, parts: &[Self]) -> Self {
        let layers = config.moe_passes();
        let of_layer =
            |layer: usize| parts.iter().flat_map(move |part| &part.0[part.0.len() / layers * layer..part.0.len() / layers * (layer + 1)]);
        Self((0..layers).flat_map(of_layer).copied().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_cut_where_documents_end() {
        let tokens = [9, 1, 2, 9, 3, 9, 9, 4, 5, 6, 7, 9];
        let batch = Batch { tokens: &tokens, rows: 2, row_tokens: 6 };
        let ranges = |last| batch.pieces(2, last).into_iter().map(|piece| piece.range).collect::<Vec<_>>();
        assert_eq!(ranges(None), vec![Range { start: 0, end: 12 }]);
        assert_eq!(ranges(Some(9)), [0..4, 4..6, 6..12], "a last or single token is no document");
        assert_eq!(batch.pieces(1, None).len(), 2);
        assert_eq!(batch.pieces(2, Some(9)).iter().map(Piece::predicted).sum::<usize>(), 3 + 1 + 5);
    }

    #[test]
    fn routes_of_pieces_join_to_those_of_the_batch() {
        let config = QuasarConfig::from_json(include_str!("../../tests/data/small_config.json")).unwrap();
        let count = 7 * config.num_experts_per_tok * config.moe_passes();
        let routes = Routes((0..count).map(|n| (n % config.num_experts) as u16).collect());
        let parts = [0..2, 2..3, 3..7].map(|range| routes.part(&config, 7, &range));
        assert_eq!(Routes::join(&config, &parts), routes);
    }
}
