//! The fragment plan: which rows of which tensors make up each fragment, and how each slice is merged
//! (`docs/protocol.md`, fragments). How a plan is computed lies in the crate `fragments`.

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

use crate::{Digest, codec};

/// Element type of a tensor in checkpoint files, under the names of the safetensors format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, Serialize, Deserialize)]
pub enum DType {
    F32 = 0,
    #[serde(rename = "BF16")]
    Bf16 = 1,
    F16 = 2,
}

impl DType {
    pub const fn bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }

    /// The name in a safetensors header.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::Bf16 => "BF16",
            Self::F16 => "F16",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        [Self::F32, Self::Bf16, Self::F16].into_iter().find(|dtype| dtype.name() == name)
    }
}

/// How contributions to a slice are combined.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MergeRule {
    /// Weighted mean: embeddings, routers, norms, scalars.
    Mean = 0,
    /// Radial-directional averaging per unit (Decoupled DiLoCo, section 3): mean direction, median radius.
    Rda = 1,
}

/// Rows `[row_start, row_end)` of one tensor. A tensor `[d0, d1, …]` has `d0` rows of `d1·…` elements.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, Serialize, Deserialize)]
pub struct Slice {
    pub tensor: String,
    pub row_start: u64,
    pub row_end: u64,
    pub row_elements: u64,
    /// Rows in one merge unit: one expert of a fused expert tensor, else the whole slice.
    pub unit_rows: u64,
    pub dtype: DType,
    pub rule: MergeRule,
}

impl Slice {
    pub fn rows(&self) -> u64 {
        self.row_end - self.row_start
    }

    pub fn elements(&self) -> u64 {
        self.rows() * self.row_elements
    }
}

/// All fragments; the slices of a fragment stand in canonical order (tensor name, first row), which is the order of its
/// elements in every flat buffer.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct FragmentPlan {
    pub fragments: Vec<Vec<Slice>>,
}

impl FragmentPlan {
    /// BLAKE3 of the canonical encoding; pinned in the run manifest.
    pub fn digest(&self) -> Digest {
        Digest::blake3(&codec::encode(self))
    }

    /// Elements of fragment `fragment`.
    pub fn elements(&self, fragment: usize) -> u64 {
        self.fragments[fragment].iter().map(Slice::elements).sum()
    }

    pub fn total_elements(&self) -> u64 {
        (0..self.fragments.len()).map(|fragment| self.elements(fragment)).sum()
    }
}
