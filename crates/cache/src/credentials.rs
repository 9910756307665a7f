//! What a cache wants to see before it answers. Nothing here can be printed by accident.

use std::fmt;

/// Who asks. Sent to the cache's own host only, never to one that it leads to.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
#[non_exhaustive]
pub enum Credentials {
    /// Nobody in particular, or whom the URL names.
    #[default]
    None,
    /// HTTP Basic (RFC 7617).
    Basic { user: String, password: Secret },
    /// A bearer token (RFC 6750).
    Bearer(Secret),
    /// The text of a netrc file: the entry of the cache's host counts, else its `default`.
    Netrc(Secret),
    /// Keys of an S3 service.
    Aws { access_key_id: String, secret_access_key: Secret, session_token: Option<Secret> },
}

/// Text that no message, log line or panic shows.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Secret(String);

impl Secret {
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// For the one place that sends it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_do_not_show() {
        let (user, password) = ("who".to_owned(), Secret::new("hush"));
        let shown = format!("{:?}", Credentials::Basic { user, password });
        assert!(shown.contains("who") && !shown.contains("hush"));
    }
}
