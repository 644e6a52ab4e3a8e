//! What stands on a command line: values that need words of their own when they are wrong.

use std::net::SocketAddr;

use jiff::Timestamp;

use crate::{
    model::{InstanceKey, excerpt, parse_duration},
    rt,
};

/// What stands for an instance in a usage line.
pub(super) const KEY: &str = "SERVICE/ID";

/// Reads `SERVICE/ID`.
pub(super) fn instance_key(text: &str) -> Result<InstanceKey, String> {
    let (service, id) = text
        .split_once('/')
        .ok_or_else(|| "want SERVICE/ID, e.g. greeter/a; `disco instance list` shows them".to_owned())?;
    Ok(InstanceKey { service: service.parse()?, id: id.parse()? })
}

/// Reads `KEY=VALUE`.
pub(super) fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(format!("{} is not KEY=VALUE, such as version=1.2", excerpt(text))),
    }
}

/// Reads a time, or how long ago it was.
pub(super) fn when(text: &str) -> Result<Timestamp, String> {
    if let Ok(time) = text.parse() {
        return Ok(time);
    }
    let ago = parse_duration(text)
        .map_err(|_| "want a time, e.g. 2026-01-31T12:00:00Z, or how long ago, e.g. 10m".to_owned())?;
    let then = rt::now().checked_sub(ago).and_then(|then| Timestamp::try_from(then).ok());
    then.ok_or_else(|| "that is too long ago".to_owned())
}

/// Reads a number whose range the server knows.
pub(super) fn whole(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("{} is not a whole number, such as 42", excerpt(text)))
}

/// Reads where to listen.
pub(super) fn listen(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| {
        format!(
            "{} is not an address to listen on: want IP:PORT, e.g. 127.0.0.1:18000; port 0 takes any free one",
            excerpt(text)
        )
    })
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    #[test]
    fn times() {
        let at: Timestamp = "2026-01-31T12:00:00Z".parse().unwrap();
        assert_eq!(when("2026-01-31T13:00:00+01:00"), Ok(at));
        let then = SystemTime::from(when("10m").unwrap());
        assert!((600..700).contains(&rt::now().duration_since(then).unwrap().as_secs()));
        assert!(when("yesterday").unwrap_err().starts_with("want a time"));
    }

    #[test]
    fn numbers_and_addresses() {
        assert_eq!(whole("42"), Ok(42));
        for bad in ["", "x", "-1", "1.5", "18446744073709551616"] {
            assert!(whole(bad).unwrap_err().contains("is not a whole number"), "{bad}");
        }
        assert!(listen("[::1]:0").is_ok());
        for bad in ["localhost:1", "18000", "127.0.0.1"] {
            assert!(listen(bad).unwrap_err().contains("want IP:PORT"), "{bad}");
        }
    }
}
