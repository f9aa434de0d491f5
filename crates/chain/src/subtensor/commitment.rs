//! The fields of the commitments pallet: `Raw0` to `Raw128` for short bytes, `BigRaw` up to 512.

use protocol::AccountId;
use subxt::dynamic::{self, Value};
use subxt::ext::scale_value::{Composite, Primitive, ValueDef, Variant};

use super::read::{AtBlock, is_absent};
use crate::COMMITMENT_MAX;

/// Most commitments of one subnet that are read; each registered hotkey has at most one.
const COMMITMENTS_MAX: usize = 8192;

/// Longest field that has its length in its name.
const RAW_MAX: usize = 128;

/// The `info` argument of `set_commitment` with `data` (at most [`COMMITMENT_MAX`] bytes) as its only field.
pub(super) fn info(data: &[u8]) -> Value {
    debug_assert!(data.len() <= COMMITMENT_MAX);
    let field = if data.len() <= RAW_MAX {
        Value::unnamed_variant(format!("Raw{}", data.len()), [Value::from_bytes(data)])
    } else {
        Value::unnamed_variant("BigRaw", [Value::from_bytes(data)])
    };
    Value::named_composite([("fields", Value::unnamed_composite([Value::unnamed_composite([field])]))])
}

/// The bytes of the first field of a stored registration (`{ deposit, block, info: { fields } }`), if it is a field of plain bytes.
pub(super) fn plain_bytes<T>(registration: &Value<T>) -> Option<Vec<u8>> {
    let info = named(registration, "info")?;
    let mut fields = named(info, "fields")?;
    // Bounded vectors are wrapped once or more, depending on the runtime.
    loop {
        match &fields.value {
            ValueDef::Composite(Composite::Unnamed(items)) => fields = items.first()?,
            ValueDef::Variant(variant) => return variant_bytes(variant),
            _ => return None,
        }
    }
}

/// The plain bytes that hotkeys committed on the subnet.
pub(super) async fn all(at: &AtBlock, netuid: u16) -> Result<Vec<(AccountId, Vec<u8>)>, subxt::Error> {
    let address = dynamic::storage::<(u16, [u8; 32]), Value>("Commitments", "CommitmentOf");
    let mut entries = match at.storage().iter(address, (netuid,)).await {
        Ok(entries) => entries,
        Err(error) if is_absent(&error) => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    let mut found = Vec::new();
    while let Some(entry) = entries.next().await {
        let entry = entry?;
        let (_, account) = entry.key()?.decode()?;
        if let Some(bytes) = plain_bytes(&entry.value().decode()?) {
            found.push((AccountId(account), bytes));
        }
        if found.len() >= COMMITMENTS_MAX {
            break;
        }
    }
    Ok(found)
}

fn variant_bytes<T>(variant: &Variant<T>) -> Option<Vec<u8>> {
    let length = match variant.name.strip_prefix("Raw") {
        Some(digits) => Some(digits.parse::<usize>().ok()?),
        None if variant.name == "BigRaw" => None,
        None => return None,
    };
    let mut bytes = Vec::new();
    if let Some(value) = variant.values.values().next() {
        collect(value, &mut bytes)?;
    }
    length.is_none_or(|length| length == bytes.len()).then_some(bytes)
}

/// All bytes inside nested lists and wrappers.
fn collect<T>(value: &Value<T>, bytes: &mut Vec<u8>) -> Option<()> {
    match &value.value {
        ValueDef::Primitive(Primitive::U128(byte)) => {
            bytes.push(u8::try_from(*byte).ok()?);
            Some(())
        }
        ValueDef::Composite(composite) => composite.values().try_for_each(|value| collect(value, bytes)),
        _ => None,
    }
}

fn named<'a, T>(value: &'a Value<T>, name: &str) -> Option<&'a Value<T>> {
    match &value.value {
        ValueDef::Composite(Composite::Named(fields)) => fields.iter().find(|(field, _)| field == name).map(|(_, value)| value),
        _ => None,
    }
}
