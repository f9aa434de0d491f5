//! Object keys that every S3 store treats alike.
//!
//! Stores differ on empty segments, trailing slashes, encodings and list order, so keys are segments of `[A-Za-z0-9._=-]` joined by `/`,
//! none empty, none `.` or `..` (the embedded server maps keys to files).

use crate::StoreError;

/// Longest key that S3 accepts, in bytes.
pub const MAX_KEY_BYTES: usize = 1024;
/// Longest segment that common file systems accept, in bytes.
pub const MAX_SEGMENT_BYTES: usize = 255;

/// Whether `key` names an object that every store can hold.
pub fn is_valid(key: &str) -> bool {
    key.len() <= MAX_KEY_BYTES && key.split('/').all(is_valid_segment)
}

/// Whether `prefix` can be listed: empty, or a valid key followed by `/`, or the beginning of a valid key.
pub fn is_valid_prefix(prefix: &str) -> bool {
    prefix.is_empty() || is_valid(prefix.strip_suffix('/').unwrap_or(prefix))
}

fn is_valid_segment(segment: &str) -> bool {
    !segment.is_empty()
        && segment.len() <= MAX_SEGMENT_BYTES
        && segment != "."
        && segment != ".."
        && segment.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'=' | b'-'))
}

/// `Ok` if `key` is valid.
pub fn check(key: &str) -> Result<(), StoreError> {
    if is_valid(key) {
        return Ok(());
    }
    // The key may come from outside: shown shortened and escaped.
    let shown: String = key.chars().take(80).flat_map(char::escape_default).collect();
    Err(StoreError::invalid(&shown, "a key is made of segments of [A-Za-z0-9._=-], none empty, joined by `/`"))
}

/// The path of `key` in a URL, without leading slash, percent-encoded as signature version 4 wants it (of our alphabet only `=` changes).
pub(crate) fn url_path(key: &str) -> String {
    key.replace('=', "%3D")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_the_protocol_are_valid_and_keys_that_stores_disagree_on_are_not() {
        for key in ["a", "quasar/netuid=24/public/head.qsr", "a/b-c_d.e/0", "..."] {
            assert!(is_valid(key), "{key}");
        }
        for key in ["", "/a", "a/", "a//b", "a/../b", "./a", "a b", "ä", "a%2Fb", "a\0", &"x".repeat(256), &"x/".repeat(600)] {
            assert!(!is_valid(key), "{key}");
        }
        assert!(is_valid_prefix("") && is_valid_prefix("a/") && is_valid_prefix("a/b"));
        assert!(!is_valid_prefix("/") && !is_valid_prefix("a//"));
    }
}
