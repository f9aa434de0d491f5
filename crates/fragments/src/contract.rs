//! The parameter contract: which tensors of a checkpoint are trained, synchronised and released.
//!
//! It lies beside the weights as `quasar_parameter_contract.json`:
//!
//! ```json
//! {"version":1,"tensors":[{"name":"lm_head.weight","shape":[157184,2048],"dtype":"BF16"}]}
//! ```
//!
//! `version` is 1. `tensors` is sorted by name, each name once; `shape` lists the dimensions (empty for a scalar);
//! `dtype` is the element type in the checkpoint file (`F32`, `BF16` or `F16`). Buffers (routing bias, rotary
//! frequencies, decay slopes) are no parameters: they are in the checkpoint but not in the contract.

use protocol::DType;
use serde::{Deserialize, Serialize};

use crate::safetensors_header::{DIMENSIONS_MAX, element_count};

/// Name of the contract file in a checkpoint folder.
pub const CONTRACT_FILE: &str = "quasar_parameter_contract.json";

/// Longest contract file that is read.
pub const CONTRACT_BYTES_MAX: u64 = 16 << 20;

const VERSION: u32 = 1;
const BUFFER_SUFFIXES: [&str; 3] = [".expert_bias", ".slope", ".inv_freq"];

/// Whether a tensor name of the Quasar architecture denotes a buffer, which is not trained.
pub fn is_buffer(name: &str) -> bool {
    BUFFER_SUFFIXES.iter().any(|suffix| name.ends_with(suffix))
}

/// One parameter: its name, dimensions and element type in the checkpoint file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorSpec {
    pub name: String,
    pub shape: Vec<u64>,
    pub dtype: DType,
}

impl TensorSpec {
    /// Rows: the first dimension; a scalar has one row.
    pub fn rows(&self) -> u64 {
        self.shape.first().copied().unwrap_or(1)
    }

    /// Elements in a row: the product of the dimensions behind the first.
    pub fn row_elements(&self) -> u64 {
        self.shape.iter().skip(1).product()
    }

    /// Elements in all.
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }

    /// Bytes in a checkpoint file.
    pub fn bytes(&self) -> u64 {
        self.elements() * self.dtype.bytes()
    }
}

/// All parameters, sorted by name. Made by [`Contract::new`] or [`Contract::from_json`], which check it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contract {
    pub tensors: Vec<TensorSpec>,
}

/// Why a contract is refused.
#[derive(Debug, thiserror::Error)]
pub enum ContractError {
    #[error("the parameter contract has {length} bytes, the limit is {CONTRACT_BYTES_MAX}")]
    TooLong { length: u64 },
    #[error(
        "the parameter contract is not valid: {message}\nhint: it must read {{\"version\":1,\"tensors\":[{{\"name\",\"shape\",\"dtype\"}}]}}; without the file the contract is taken from the weights"
    )]
    Json { message: String },
    #[error("the parameter contract has version {version}, this program knows version {VERSION}\nhint: install a newer release")]
    Version { version: u32 },
    #[error("the contract is empty\nhint: the checkpoint holds no parameters")]
    Empty,
    #[error("tensor `{tensor}` stands twice in the contract")]
    Duplicate { tensor: String },
    #[error("`{tensor}` is a buffer and cannot be in the contract\nhint: list trained parameters only")]
    Buffer { tensor: String },
    #[error(
        "tensor `{tensor}` has the unusable shape {shape:?}\nhint: every dimension must be at least 1, with at most {DIMENSIONS_MAX} dimensions"
    )]
    Shape { tensor: String, shape: Vec<u64> },
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ContractFile {
    version: u32,
    tensors: Vec<TensorSpec>,
}

impl Contract {
    /// Sorts by name and checks: at least one tensor, no name twice, no buffer, no empty or overflowing shape.
    pub fn new(mut tensors: Vec<TensorSpec>) -> Result<Self, ContractError> {
        tensors.sort_by(|left, right| left.name.cmp(&right.name));
        if tensors.is_empty() {
            return Err(ContractError::Empty);
        }
        if let Some(pair) = tensors.windows(2).find(|pair| pair[0].name == pair[1].name) {
            return Err(ContractError::Duplicate { tensor: pair[0].name.clone() });
        }
        let mut total = 0u64;
        for tensor in &tensors {
            if is_buffer(&tensor.name) {
                return Err(ContractError::Buffer { tensor: tensor.name.clone() });
            }
            let bytes = element_count(&tensor.shape).and_then(|elements| elements.checked_mul(DType::F32.bytes()));
            total = match bytes.and_then(|bytes| total.checked_add(bytes)) {
                Some(sum) if tensor.shape.len() <= DIMENSIONS_MAX && bytes != Some(0) => sum,
                _ => return Err(ContractError::Shape { tensor: tensor.name.clone(), shape: tensor.shape.clone() }),
            };
        }
        Ok(Self { tensors })
    }

    /// Reads the JSON form.
    pub fn from_json(bytes: &[u8]) -> Result<Self, ContractError> {
        if bytes.len() as u64 > CONTRACT_BYTES_MAX {
            return Err(ContractError::TooLong { length: bytes.len() as u64 });
        }
        let file: ContractFile = serde_json::from_slice(bytes).map_err(|error| ContractError::Json { message: error.to_string() })?;
        if file.version != VERSION {
            return Err(ContractError::Version { version: file.version });
        }
        Self::new(file.tensors)
    }

    /// Writes the JSON form: one tensor a line, the same contract always as the same bytes.
    pub fn to_json(&self) -> Vec<u8> {
        let lines: Vec<String> = self
            .tensors
            .iter()
            .map(|tensor| {
                let name = serde_json::Value::from(tensor.name.as_str());
                format!("{{\"name\":{name},\"shape\":{:?},\"dtype\":\"{}\"}}", tensor.shape, tensor.dtype.name())
            })
            .collect();
        format!("{{\"version\":{VERSION},\"tensors\":[\n{}\n]}}\n", lines.join(",\n")).into_bytes()
    }

    /// The parameter `name`.
    pub fn get(&self, name: &str) -> Option<&TensorSpec> {
        let index = self.tensors.binary_search_by(|tensor| tensor.name.as_str().cmp(name)).ok()?;
        Some(&self.tensors[index])
    }

    /// Elements of all parameters.
    pub fn elements(&self) -> u64 {
        self.tensors.iter().map(TensorSpec::elements).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(name: &str, shape: &[u64]) -> TensorSpec {
        TensorSpec { name: name.to_owned(), shape: shape.to_vec(), dtype: DType::Bf16 }
    }

    #[test]
    fn the_json_form_reads_back_and_is_sorted_by_name() {
        let contract = Contract::new(vec![spec("z.weight", &[2, 3]), spec("a\"quoted", &[]), spec("m", &[4])]).unwrap();
        let json = contract.to_json();
        assert_eq!(Contract::from_json(&json).unwrap(), contract);
        let text = String::from_utf8(json).unwrap();
        assert!(text.contains(r#"{"name":"z.weight","shape":[2, 3],"dtype":"BF16"}"#), "{text}");
        assert_eq!(contract.tensors[0].name, "a\"quoted");
        assert_eq!(contract.get("z.weight").map(TensorSpec::elements), Some(6));
        assert!(contract.get("absent").is_none());
    }

    #[test]
    fn a_scalar_has_one_row_of_one_element_and_a_vector_one_element_a_row() {
        assert_eq!((spec("s", &[]).rows(), spec("s", &[]).row_elements()), (1, 1));
        assert_eq!((spec("v", &[5]).rows(), spec("v", &[5]).row_elements()), (5, 1));
        assert_eq!((spec("e", &[4, 3, 2]).rows(), spec("e", &[4, 3, 2]).row_elements()), (4, 6));
    }

    #[test]
    fn bad_contracts_are_refused_with_their_reason() {
        assert!(matches!(Contract::new(vec![]), Err(ContractError::Empty)));
        assert!(matches!(Contract::new(vec![spec("a", &[1]), spec("a", &[1])]), Err(ContractError::Duplicate { .. })));
        assert!(matches!(Contract::new(vec![spec("a.expert_bias", &[1])]), Err(ContractError::Buffer { .. })));
        assert!(matches!(Contract::new(vec![spec("a", &[3, 0])]), Err(ContractError::Shape { .. })));
        assert!(matches!(Contract::new(vec![spec("a", &[u64::MAX, 2])]), Err(ContractError::Shape { .. })));
        assert!(matches!(Contract::new(vec![spec("a", &[1; 9])]), Err(ContractError::Shape { .. })));
        assert!(matches!(Contract::from_json(b"{"), Err(ContractError::Json { .. })));
        assert!(matches!(Contract::from_json(br#"{"version":2,"tensors":[]}"#), Err(ContractError::Version { version: 2 })));
        let unknown = br#"{"version":1,"tensors":[{"name":"a","shape":[1],"dtype":"BF16","extra":1}]}"#;
        assert!(matches!(Contract::from_json(unknown), Err(ContractError::Json { .. })));
    }
}
