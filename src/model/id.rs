use std::{fmt, str::FromStr, sync::Arc};

use super::input::excerpt;

/// Longest label of a service or namespace name in bytes: the DNS bound, so that names fit an `:authority`.
pub const MAX_LABEL: usize = 63;

/// Longest instance id in bytes.
pub const MAX_INSTANCE_ID: usize = 128;

/// One accepted change. Grows for ever, across restarts; 0 is before the first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Revision(pub u64);

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Tells two runs of the same instance id apart. A later run has a greater one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Incarnation(pub u64);

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A service: `name` in the default namespace, `name.namespace` elsewhere. This is also its cluster and EDS name and
/// the `:authority` that callers use.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceId(Arc<str>);

impl ServiceId {
    /// The full name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The full name, shared.
    pub fn shared(&self) -> Arc<str> {
        Arc::clone(&self.0)
    }
}

impl FromStr for ServiceId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let labels = text.split('.');
        if labels.clone().count() <= 2 && labels.into_iter().all(is_label) {
            return Ok(Self(text.into()));
        }
        Err(format!(
            "{} is not a service name: want `name` or `name.namespace`, each 1 to {MAX_LABEL} of a-z, 0-9 and '-', \
             with no '-' at either end",
            excerpt(text)
        ))
    }
}

fn is_label(label: &str) -> bool {
    (1..=MAX_LABEL).contains(&label.len())
        && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !label.starts_with('-')
        && !label.ends_with('-')
}

impl fmt::Display for ServiceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// A name that may stand in keys and paths: its text, how it is read, and how it is shown.
macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(std::sync::Arc<str>);

        impl $name {
            /// As text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl std::str::FromStr for $name {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                $crate::model::id::check_name(text, $what).map(Self)
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(&self.0)
            }
        }
    };
}
pub(super) use name;

name! {
    /// The id of an instance, unique within its service. Not its address: an instance may move and keep its id.
    InstanceId, "an instance id"
}

/// The text, if it may be such a name.
pub(super) fn check_name(text: &str, what: &str) -> Result<Arc<str>, String> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b':');
    let edge = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = text.as_bytes();
    if bytes.len() <= MAX_INSTANCE_ID
        && edge(bytes.first())
        && edge(bytes.last())
        && bytes.iter().all(|b| plain(*b))
    {
        return Ok(text.into());
    }
    Err(format!(
        "{} is not {what}: want 1 to {MAX_INSTANCE_ID} of A-Z, a-z, 0-9, '-', '_', '.' and ':', with a letter or digit at \
         both ends",
        excerpt(text)
    ))
}

/// What identifies an instance: never its address.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InstanceKey {
    /// The service it is a copy of.
    pub service: ServiceId,
    /// Its id within the service.
    pub id: InstanceId,
}

impl fmt::Display for InstanceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.service, self.id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn service_names() {
        let long = "a".repeat(MAX_LABEL);
        for good in ["greeter", "a", "0", "greeter.payments", "a-b.c-d", long.as_str()] {
            assert_eq!(good.parse::<ServiceId>().unwrap().as_str(), good);
        }
        let too_long = "a".repeat(MAX_LABEL + 1);
        for bad in [
            "",
            ".",
            "a.",
            ".a",
            "a.b.c",
            "Greeter",
            "a_b",
            "-a",
            "a-",
            "a b",
            "a\n",
            "ü",
            "*",
            too_long.as_str(),
        ] {
            assert!(bad.parse::<ServiceId>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn instance_ids() {
        for good in ["a", "greeter-1", "host.zone:50051", "A_b"] {
            assert_eq!(good.parse::<InstanceId>().unwrap().as_str(), good);
        }
        for bad in ["", "-a", "a-", "a b", "a/b", "a\u{7}b", "é", &"a".repeat(MAX_INSTANCE_ID + 1)] {
            assert!(bad.parse::<InstanceId>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn errors_never_echo_control_characters_or_long_input() {
        let message = format!("a\u{1b}[31m\n{}", "x".repeat(10_000)).parse::<InstanceId>().unwrap_err();
        assert!(message.chars().all(|c| !c.is_control()), "{message}");
        assert!(message.len() < 400, "{message}");
    }
}
