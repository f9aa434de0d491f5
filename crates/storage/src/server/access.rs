//! Who may do what: the key holder everything, the world only reads under some prefixes.

use std::sync::Arc;

use async_trait::async_trait;
use s3s::access::{S3Access, S3AccessContext};
use s3s::{S3Result, s3_error};

pub(super) struct PublicPrefixes {
    pub(super) bucket: Arc<str>,
    pub(super) prefixes: Vec<String>,
}

#[async_trait]
impl S3Access for PublicPrefixes {
    async fn check(&self, context: &mut S3AccessContext<'_>) -> S3Result<()> {
        // Signatures, presigned ones included, were verified before; what is left to judge are unsigned requests.
        if context.credentials().is_some() {
            return Ok(());
        }
        let is_read = matches!(context.s3_op().name(), "GetObject" | "HeadObject");
        let is_public = context
            .s3_path()
            .as_object()
            .is_some_and(|(bucket, key)| bucket == &*self.bucket && self.prefixes.iter().any(|prefix| key.starts_with(prefix.as_str())));
        if is_read && is_public { Ok(()) } else { Err(s3_error!(AccessDenied)) }
    }
}
