//! The header of a safetensors file, read strictly and written by hand so that large files can be streamed.
//!
//! Layout: u64 little-endian length of the JSON header, the header, then the data. The header maps each tensor name to
//! `dtype`, `shape` and `data_offsets` (relative to the data), and may hold `__metadata__`, a map of strings. As the
//! format demands, the tensors must tile the data: no holes, no overlap, nothing behind the last one.

use std::collections::BTreeMap;
use std::fmt;

use protocol::DType;
use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

/// Longest header that is read. The header of the 18B model's whole contract is about 70 KB.
pub const HEADER_BYTES_MAX: u64 = 16 << 20;

/// Most dimensions of a tensor.
pub(crate) const DIMENSIONS_MAX: usize = 8;

const LENGTH_BYTES: usize = 8;
const METADATA: &str = "__metadata__";

/// Why a header is refused.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    #[error("file of {length} bytes is too short for a safetensors header\nhint: the download is incomplete; fetch it again")]
    TooShort { length: u64 },
    #[error("header claims {claimed} bytes, the limit is {HEADER_BYTES_MAX}\nhint: this is not a safetensors file, or it is damaged")]
    TooLong { claimed: u64 },
    #[error("header claims {claimed} bytes, the file has {available} left\nhint: the file is truncated; fetch it again")]
    Truncated { claimed: u64, available: u64 },
    #[error("header is not valid: {message}\nhint: the file is damaged or not safetensors; fetch it again")]
    Json { message: String },
    #[error("tensor `{tensor}` has element type {dtype}, known are F32, BF16 and F16\nhint: convert the checkpoint to BF16 or F32")]
    ElementType { tensor: String, dtype: String },
    #[error("tensor `{tensor}` has {dimensions} dimensions, the limit is {DIMENSIONS_MAX}")]
    Dimensions { tensor: String, dimensions: usize },
    #[error("tensor `{tensor}` of shape {shape:?} needs {needed} bytes but has {given}\nhint: the header lies; fetch the file again")]
    Size { tensor: String, shape: Vec<u64>, needed: u128, given: u64 },
    #[error(
        "tensor `{tensor}` begins at {begin}, expected {expected}: tensors overlap or leave a hole\nhint: the header lies; fetch the file again"
    )]
    Offsets { tensor: String, begin: u64, expected: u64 },
    #[error("tensors end at {end} but the file holds {available} bytes of data\nhint: the file is truncated or padded; fetch it again")]
    Length { end: u64, available: u64 },
}

/// One tensor of a file; `begin` and `end` are byte offsets from the start of the *data*.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TensorInfo {
    pub name: String,
    pub dtype: DType,
    pub shape: Vec<u64>,
    pub begin: u64,
    pub end: u64,
}

/// A checked header.
#[derive(Debug)]
pub(crate) struct Header {
    /// In the order of the data.
    pub tensors: Vec<TensorInfo>,
    /// Byte offset of the data in the file.
    pub data_start: usize,
}

/// Product of the dimensions; `None` if it does not fit.
pub(crate) fn element_count(shape: &[u64]) -> Option<u64> {
    shape.iter().try_fold(1u64, |product, dimension| product.checked_mul(*dimension))
}

/// Reads and checks the header of a whole file.
pub(crate) fn parse(file: &[u8]) -> Result<Header, HeaderError> {
    let length = file.len() as u64;
    let claimed = match file.first_chunk::<LENGTH_BYTES>() {
        Some(bytes) => u64::from_le_bytes(*bytes),
        None => return Err(HeaderError::TooShort { length }),
    };
    if claimed > HEADER_BYTES_MAX {
        return Err(HeaderError::TooLong { claimed });
    }
    let available = length - LENGTH_BYTES as u64;
    if claimed > available {
        return Err(HeaderError::Truncated { claimed, available });
    }
    let data_start = LENGTH_BYTES + claimed as usize;
    let raw: RawHeader =
        serde_json::from_slice(&file[LENGTH_BYTES..data_start]).map_err(|error| HeaderError::Json { message: error.to_string() })?;
    let mut tensors = raw.tensors.into_iter().map(|(name, entry)| entry.check(name)).collect::<Result<Vec<_>, _>>()?;
    tensors.sort_by_key(|tensor| (tensor.begin, tensor.end));
    let mut expected = 0;
    for tensor in &tensors {
        if tensor.begin != expected {
            return Err(HeaderError::Offsets { tensor: tensor.name.clone(), begin: tensor.begin, expected });
        }
        expected = tensor.end;
    }
    let available = length - data_start as u64;
    if expected != available {
        return Err(HeaderError::Length { end: expected, available });
    }
    Ok(Header { tensors, data_start })
}

struct RawHeader {
    tensors: BTreeMap<String, RawTensor>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTensor {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

impl RawTensor {
    fn check(self, name: String) -> Result<TensorInfo, HeaderError> {
        let Some(dtype) = DType::from_name(&self.dtype) else {
            return Err(HeaderError::ElementType { tensor: name, dtype: self.dtype });
        };
        if self.shape.len() > DIMENSIONS_MAX {
            return Err(HeaderError::Dimensions { tensor: name, dimensions: self.shape.len() });
        }
        let [begin, end] = self.data_offsets;
        let given = end.saturating_sub(begin);
        // A dimension of zero hides what the others would need: they have to be possible by themselves.
        let nonzero = self.shape.iter().filter(|dimension| **dimension > 0);
        let room = nonzero.fold(u128::from(dtype.bytes()), |product, dimension| product.saturating_mul(u128::from(*dimension)));
        let needed = if self.shape.contains(&0) && room <= u128::from(u64::MAX) { 0 } else { room };
        if begin > end || needed != u128::from(given) {
            return Err(HeaderError::Size { tensor: name, shape: self.shape, needed, given });
        }
        Ok(TensorInfo { name, dtype, shape: self.shape, begin, end })
    }
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HeaderVisitor;
        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = RawHeader;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a map of tensor names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let (mut tensors, mut metadata) = (BTreeMap::new(), None);
                while let Some(name) = map.next_key::<String>()? {
                    if name == METADATA {
                        if metadata.replace(map.next_value::<BTreeMap<String, String>>()?).is_some() {
                            return Err(A::Error::custom("`__metadata__` stands twice"));
                        }
                        continue;
                    }
                    let tensor = map.next_value()?;
                    if let Some(_first) = tensors.insert(name.clone(), tensor) {
                        return Err(A::Error::custom(format!("tensor `{name}` stands twice")));
                    }
                }
                Ok(RawHeader { tensors })
            }
        }
        deserializer.deserialize_map(HeaderVisitor)
    }
}

/// Length and header of a file that holds `tensors` one behind the other in the given order. The same arguments give
/// the same bytes. The header is padded with spaces so that the data begins at a multiple of eight.
pub(crate) fn build<'a>(metadata: &[(&str, String)], tensors: impl IntoIterator<Item = (&'a str, DType, Vec<u64>)>) -> Vec<u8> {
    let mut json = String::from("{");
    if !metadata.is_empty() {
        let entries: Vec<String> = metadata.iter().map(|(key, value)| format!("{}:{}", quoted(key), quoted(value))).collect();
        json.push_str(&format!("{}:{{{}}}", quoted(METADATA), entries.join(",")));
    }
    let mut begin = 0;
    for (name, dtype, shape) in tensors {
        let end = begin + shape.iter().product::<u64>() * dtype.bytes();
        if json.len() > 1 {
            json.push(',');
        }
        let shape: Vec<String> = shape.iter().map(u64::to_string).collect();
        json.push_str(&format!(
            "{}:{{\"dtype\":\"{}\",\"shape\":[{}],\"data_offsets\":[{begin},{end}]}}",
            quoted(name),
            dtype.name(),
            shape.join(",")
        ));
        begin = end;
    }
    json.push('}');
    let padded = json.len().next_multiple_of(LENGTH_BYTES);
    json.push_str(&" ".repeat(padded - json.len()));
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(json.as_bytes());
    bytes
}

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn file(json: &str, data: usize) -> Vec<u8> {
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(json.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    fn entry(shape: &str, begin: u64, end: u64) -> String {
        format!(r#"{{"dtype":"F32","shape":{shape},"data_offsets":[{begin},{end}]}}"#)
    }

    #[test]
    fn dimensions_whose_product_overflows_are_refused_also_beside_a_zero() {
        for shape in ["[4294967296,4294967296,0]", "[0,4294967296,4294967296]", "[18446744073709551615,2]"] {
            let refused = parse(&file(&format!(r#"{{"a":{}}}"#, entry(shape, 0, 0)), 0)).err().unwrap();
            assert!(matches!(refused, HeaderError::Size { .. }), "{shape}: {refused}");
        }
        assert!(parse(&file(&format!(r#"{{"a":{}}}"#, entry("[0,7]", 0, 0)), 0)).is_ok());
    }

    #[test]
    fn a_built_header_reads_back_and_the_safetensors_library_reads_it_too() {
        let metadata = [("plan", "a\"b".to_owned())];
        let mut bytes = build(&metadata, [("b", DType::Bf16, vec![2, 3]), ("a\n", DType::F32, vec![]), ("c", DType::F16, vec![1])]);
        let data_start = bytes.len();
        bytes.resize(data_start + 12 + 4 + 2, 0);
        let header = parse(&bytes).unwrap();
        assert_eq!((header.data_start, header.data_start % 8), (data_start, 0));
        let names: Vec<&str> = header.tensors.iter().map(|tensor| tensor.name.as_str()).collect();
        assert_eq!(names, ["b", "a\n", "c"]);
        assert_eq!((header.tensors[1].begin, header.tensors[1].end), (12, 16));
        let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(theirs.tensor("b").unwrap().shape(), [2, 3]);
    }

    #[test]
    fn lying_headers_are_refused_with_their_reason() {
        let one = |shape, begin, end| format!(r#"{{"a":{}}}"#, entry(shape, begin, end));
        let two = |first: String, second: String| format!(r#"{{"a":{first},"b":{second}}}"#);
        assert!(matches!(parse(&[1, 2]), Err(HeaderError::TooShort { length: 2 })));
        assert!(matches!(parse(&u64::MAX.to_le_bytes()), Err(HeaderError::TooLong { .. })));
        assert!(matches!(parse(&100u64.to_le_bytes()), Err(HeaderError::Truncated { available: 0, .. })));
        assert!(matches!(parse(&file("{not json", 0)), Err(HeaderError::Json { .. })));
        assert!(matches!(parse(&file(&one("[2]", 0, 12), 12)), Err(HeaderError::Size { needed: 8, given: 12, .. })));
        assert!(matches!(parse(&file(&one("[2]", 8, 0), 8)), Err(HeaderError::Size { .. })));
        assert!(matches!(parse(&file(&one("[4294967296,4294967296,2]", 0, 0), 0)), Err(HeaderError::Size { .. })));
        assert!(matches!(parse(&file(&one("[2]", 0, 8), 4)), Err(HeaderError::Length { end: 8, available: 4 })));
        assert!(matches!(parse(&file(&one("[2]", 0, 8), 9)), Err(HeaderError::Length { .. })));
        assert!(matches!(parse(&file(&one("[2]", 4, 12), 12)), Err(HeaderError::Offsets { expected: 0, .. })));
        let overlap = two(entry("[2]", 0, 8), entry("[2]", 4, 12));
        assert!(matches!(parse(&file(&overlap, 12)), Err(HeaderError::Offsets { begin: 4, expected: 8, .. })));
        let twice = r#"{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#;
        assert!(matches!(parse(&file(twice, 0)), Err(HeaderError::Json { .. })));
        let integer = r#"{"a":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}"#;
        assert!(matches!(parse(&file(integer, 8)), Err(HeaderError::ElementType { .. })));
        let deep = one("[1,1,1,1,1,1,1,1,1]", 0, 4);
        assert!(matches!(parse(&file(&deep, 4)), Err(HeaderError::Dimensions { dimensions: 9, .. })));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), length in 0u64..200) {
            let _ = parse(&bytes);
            let mut framed = length.to_le_bytes().to_vec();
            framed.extend(bytes);
            let _ = parse(&framed);
        }

        #[test]
        fn a_header_with_one_byte_changed_is_read_consistently_or_refused(position in 8usize..120, byte in any::<u8>()) {
            let mut bytes = build(&[], [("alpha", DType::F32, vec![2, 2]), ("beta", DType::Bf16, vec![4])]);
            let position = position.min(bytes.len() - 1);
            bytes.resize(bytes.len() + 24, 0);
            bytes[position] = byte;
            if let Ok(header) = parse(&bytes) {
                let end = header.tensors.last().map_or(0, |tensor| tensor.end);
                prop_assert_eq!(header.data_start as u64 + end, bytes.len() as u64);
            }
        }
    }
}
