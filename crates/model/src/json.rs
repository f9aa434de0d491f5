//! Reading single keys of a `config.json` with errors that name the key.

use serde_json::{Map, Value};

use crate::ConfigError;

/// The keys of a configuration, as found.
pub(crate) struct Keys<'a>(pub &'a Map<String, Value>);

impl Keys<'_> {
    /// The value of `key`; an explicit null counts as absent, as in Python.
    fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    pub fn size(&self, key: &'static str, limit: usize) -> Result<usize, ConfigError> {
        self.size_or(key, limit, None)
    }

    /// A count in `0..=limit`.
    pub fn size_or(&self, key: &'static str, limit: usize, default: Option<usize>) -> Result<usize, ConfigError> {
        match self.get(key) {
            None => default.ok_or(ConfigError::Missing { key }),
            Some(value) => value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| *n <= limit).ok_or_else(|| ConfigError::Value {
                key,
                found: value.to_string(),
                expected: format!("an integer from 0 to {limit}"),
            }),
        }
    }

    pub fn number_or(&self, key: &'static str, default: f64) -> Result<f64, ConfigError> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => value.as_f64().filter(|n| n.is_finite()).ok_or_else(|| ConfigError::Value {
                key,
                found: value.to_string(),
                expected: "a finite number".into(),
            }),
        }
    }

    pub fn flag_or(&self, key: &'static str, default: bool) -> Result<bool, ConfigError> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => {
                value.as_bool().ok_or_else(|| ConfigError::Value { key, found: value.to_string(), expected: "true or false".into() })
            }
        }
    }

    pub fn text_or(&self, key: &'static str, default: &str) -> Result<String, ConfigError> {
        match self.get(key) {
            None => Ok(default.to_owned()),
            Some(value) => value.as_str().map(str::to_owned).ok_or_else(|| ConfigError::Value {
                key,
                found: value.to_string(),
                expected: "a string".into(),
            }),
        }
    }

    /// A list; absent means empty.
    pub fn list(&self, key: &'static str) -> Result<&[Value], ConfigError> {
        match self.get(key) {
            None => Ok(&[]),
            Some(value) => value.as_array().map(Vec::as_slice).ok_or_else(|| ConfigError::Value {
                key,
                found: value.to_string(),
                expected: "a list".into(),
            }),
        }
    }

    /// Refuses every value of `key` but `implemented`, which is also what an absent key means.
    pub fn only_flag(&self, key: &'static str, implemented: bool) -> Result<(), ConfigError> {
        match self.flag_or(key, implemented)? {
            found if found == implemented => Ok(()),
            found => Err(ConfigError::Unsupported { key: key.to_owned(), found: found.to_string(), implemented: implemented.to_string() }),
        }
    }

    /// As [`Keys::only_flag`], for numbers.
    pub fn only_number(&self, key: &'static str, implemented: f64) -> Result<(), ConfigError> {
        match self.number_or(key, implemented)? {
            found if found == implemented => Ok(()),
            found => Err(ConfigError::Unsupported { key: key.to_owned(), found: found.to_string(), implemented: implemented.to_string() }),
        }
    }

    /// As [`Keys::only_flag`], for strings, the first of which is the default.
    pub fn only_text(&self, key: &'static str, implemented: &[&str]) -> Result<(), ConfigError> {
        let found = self.text_or(key, implemented[0])?;
        if implemented.contains(&found.as_str()) {
            return Ok(());
        }
        Err(ConfigError::Unsupported { key: key.to_owned(), found: format!("{found:?}"), implemented: format!("{:?}", implemented[0]) })
    }

    /// Refuses a key that is present with anything but null, an empty list, an empty string, zero or false.
    pub fn only_off(&self, key: &str) -> Result<(), ConfigError> {
        let Some(value) = self.get(key) else { return Ok(()) };
        let off = match value {
            Value::Bool(on) => !on,
            Value::Number(n) => n.as_f64() == Some(0.0),
            Value::String(text) => text.is_empty(),
            Value::Array(items) => items.is_empty(),
            Value::Object(items) => items.is_empty(),
            Value::Null => true,
        };
        if off {
            Ok(())
        } else {
            Err(ConfigError::Unsupported { key: key.to_owned(), found: value.to_string(), implemented: "off".into() })
        }
    }
}
