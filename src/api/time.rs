//! Times as texts: RFC 3339.

use std::time::SystemTime;

use jiff::Timestamp;

use crate::model::excerpt;

/// In UTC, to the millisecond.
pub(super) fn timestamp(at: SystemTime) -> String {
    Timestamp::try_from(at)
        .map_or_else(|_| String::new(), |at| at.strftime("%Y-%m-%dT%H:%M:%S%.3fZ").to_string())
}

/// Reads a time.
pub(super) fn read_time(text: &str) -> Result<SystemTime, String> {
    let time: Timestamp = text
        .parse()
        .map_err(|_| format!("{} is not a time: want RFC 3339, e.g. 2026-01-31T12:00:00Z", excerpt(text)))?;
    Ok(time.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        let text = "2026-01-31T12:00:00.250Z";
        assert_eq!(read_time(text).map(timestamp), Ok(text.to_owned()));
        assert!(read_time("yesterday").unwrap_err().contains("want RFC 3339"));
    }
}
