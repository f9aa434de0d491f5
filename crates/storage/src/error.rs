//! What can go wrong with a store, sorted by what the caller can do about it.

/// A failed store operation. Messages name keys, never URLs or credentials.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// There is no such object (or an anonymous reader may not know).
    #[error("there is no object `{key}`")]
    NotFound { key: String },
    /// The store refused the credentials or the request.
    #[error(
        "the store denied access to `{key}`\nhint: check access key, secret key and bucket policy, and that this machine's clock is right"
    )]
    Denied { key: String },
    /// The condition of a conditional write did not hold: somebody else wrote first.
    #[error("the condition on writing `{key}` did not hold")]
    PreconditionFailed { key: String },
    /// The object is larger than the caller accepts.
    #[error("`{key}` is larger than the {limit} bytes allowed here")]
    TooLarge { key: String, limit: u64 },
    /// The store cannot be reached, is overloaded or answered with a server error. Worth trying again.
    #[error("the store did not serve `{key}`: {reason}\nhint: this is retried; if it persists check the endpoint and the network")]
    Unavailable { key: String, reason: String },
    /// The request makes no sense: a bad key, range, digest or setting. Trying again does not help.
    #[error("the store request for `{key}` is invalid: {reason}")]
    Invalid { key: String, reason: String },
}

impl StoreError {
    /// Whether the same request may succeed later without anybody changing anything.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Unavailable { .. })
    }

    pub(crate) fn invalid(key: &str, reason: impl Into<String>) -> Self {
        Self::Invalid { key: key.to_owned(), reason: reason.into() }
    }

    pub(crate) fn unavailable(key: &str, reason: impl Into<String>) -> Self {
        Self::Unavailable { key: key.to_owned(), reason: reason.into() }
    }
}
