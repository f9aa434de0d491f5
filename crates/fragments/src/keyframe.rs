//! Keyframes: the public bf16 form Θ̂ of one fragment version, as a safetensors file that any tool can read.
//!
//! A slice becomes the tensor `{tensor}@{row_start}` of shape `[rows, row elements]` (`[rows]` if a row is one
//! element). Values are rounded to bf16 whatever the checkpoint's element type is. The bytes are a pure function of
//! plan, fragment, version and values, so a reader generates the header that it expects and compares byte for byte.

use protocol::{DType, Digest, FragmentPlan, Slice};

use crate::number::{append_f32, append_rounded, first_non_finite_bytes};
use crate::safetensors_header;

/// Which version of which fragment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyframeId {
    /// Digest of the run's fragment plan.
    pub plan: Digest,
    pub fragment: u32,
    pub version: u64,
}

/// Why a keyframe is not written or read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum KeyframeError {
    #[error("the plan has no fragment {fragment}")]
    Fragment { fragment: u32 },
    #[error("{got} values were given for a fragment of {expected} elements")]
    Values { got: u64, expected: u64 },
    #[error("the keyframe has {got} bytes, expected are {expected}\nhint: the download is incomplete, or another plan is in force")]
    Length { got: u64, expected: u64 },
    #[error("the keyframe's header differs from the expected one at byte {byte}\nhint: it is of another plan, fragment or version")]
    Header { byte: usize },
    #[error("element {element} of the keyframe is not a finite bf16 number\nhint: the run diverged or the file is damaged")]
    NotFinite { element: u64 },
}

/// Name of a slice in keyframes and fragment files: `{tensor}@{row_start}`.
pub fn slice_name(slice: &Slice) -> String {
    format!("{}@{}", slice.tensor, slice.row_start)
}

/// Exact length in bytes of a keyframe of fragment `id.fragment`.
pub fn keyframe_bytes(plan: &FragmentPlan, id: &KeyframeId) -> Result<u64, KeyframeError> {
    Ok(header(plan, id)?.len() as u64 + plan.elements(id.fragment as usize) * DType::Bf16.bytes())
}

/// The keyframe of `values` (slice order). Refuses values that are not finite after rounding.
pub fn write(plan: &FragmentPlan, id: &KeyframeId, values: &[f32]) -> Result<Vec<u8>, KeyframeError> {
    let mut bytes = header(plan, id)?;
    let (data_start, expected) = (bytes.len(), plan.elements(id.fragment as usize));
    if values.len() as u64 != expected {
        return Err(KeyframeError::Values { got: values.len() as u64, expected });
    }
    bytes.reserve_exact(values.len() * DType::Bf16.bytes() as usize);
    append_rounded(DType::Bf16, values, &mut bytes);
    refuse_non_finite(&bytes[data_start..])?;
    Ok(bytes)
}

/// The values of a keyframe in slice order.
pub fn read(plan: &FragmentPlan, id: &KeyframeId, bytes: &[u8]) -> Result<Vec<f32>, KeyframeError> {
    let header = header(plan, id)?;
    let elements = plan.elements(id.fragment as usize);
    let expected = header.len() as u64 + elements * DType::Bf16.bytes();
    if bytes.len() as u64 != expected {
        return Err(KeyframeError::Length { got: bytes.len() as u64, expected });
    }
    let (found, body) = bytes.split_at(header.len());
    if let Some(byte) = found.iter().zip(&header).position(|(found, expected)| found != expected) {
        return Err(KeyframeError::Header { byte });
    }
    refuse_non_finite(body)?;
    let mut values = Vec::with_capacity(elements as usize);
    append_f32(DType::Bf16, body, &mut values);
    Ok(values)
}

fn header(plan: &FragmentPlan, id: &KeyframeId) -> Result<Vec<u8>, KeyframeError> {
    let slices = plan.fragments.get(id.fragment as usize).ok_or(KeyframeError::Fragment { fragment: id.fragment })?;
    let metadata = [("fragment", id.fragment.to_string()), ("plan", id.plan.to_string()), ("version", id.version.to_string())];
    let names: Vec<String> = slices.iter().map(slice_name).collect();
    let entries = slices.iter().zip(&names).map(|(slice, name)| {
        let shape = if slice.row_elements == 1 { vec![slice.rows()] } else { vec![slice.rows(), slice.row_elements] };
        (name.as_str(), DType::Bf16, shape)
    });
    Ok(safetensors_header::build(&metadata, entries))
}

fn refuse_non_finite(body: &[u8]) -> Result<(), KeyframeError> {
    match first_non_finite_bytes(DType::Bf16, body) {
        Some(element) => Err(KeyframeError::NotFinite { element: element as u64 }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{fixture, plan};

    fn keyframe() -> (FragmentPlan, KeyframeId, Vec<f32>, Vec<u8>) {
        let plan = plan(&fixture::small_contract(), 6).unwrap();
        let id = KeyframeId { plan: plan.digest(), fragment: 4, version: 12 };
        let values = fixture::values(1, plan.elements(4) as usize);
        let bytes = write(&plan, &id, &values).unwrap();
        (plan, id, values, bytes)
    }

    #[test]
    fn a_keyframe_reads_back_as_the_rounded_values_and_writes_the_same_bytes_again() {
        let (plan, id, values, bytes) = keyframe();
        assert_eq!(bytes.len() as u64, keyframe_bytes(&plan, &id).unwrap());
        let read_back = read(&plan, &id, &bytes).unwrap();
        assert!(values.iter().zip(&read_back).all(|(value, rounded)| (value - rounded).abs() <= value.abs() / 256.0));
        assert_eq!(write(&plan, &id, &read_back).unwrap(), bytes);
    }

    #[test]
    fn the_safetensors_library_reads_a_keyframe() {
        let (plan, _, _, bytes) = keyframe();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(file.len(), plan.fragments[4].len());
        let slice = &plan.fragments[4][0];
        let tensor = file.tensor(&slice_name(slice)).unwrap();
        assert_eq!(tensor.shape().iter().product::<usize>() as u64, slice.elements());
    }

    #[test]
    fn keyframes_of_another_version_truncated_or_not_finite_are_refused() {
        let (plan, id, mut values, mut bytes) = keyframe();
        let newer = KeyframeId { version: 13, ..id };
        assert!(matches!(read(&plan, &newer, &bytes), Err(KeyframeError::Header { .. })));
        assert!(matches!(read(&plan, &id, &bytes[..bytes.len() - 1]), Err(KeyframeError::Length { .. })));
        assert!(matches!(read(&plan, &KeyframeId { fragment: 6, ..id }, &bytes), Err(KeyframeError::Fragment { fragment: 6 })));
        let last = bytes.len() - 1;
        bytes[last] = 0x7f;
        bytes[last - 1] = 0x80;
        assert_eq!(read(&plan, &id, &bytes), Err(KeyframeError::NotFinite { element: values.len() as u64 - 1 }));
        values[3] = f32::INFINITY;
        assert_eq!(write(&plan, &id, &values), Err(KeyframeError::NotFinite { element: 3 }));
        assert!(matches!(write(&plan, &id, &values[1..]), Err(KeyframeError::Values { .. })));
    }
}
