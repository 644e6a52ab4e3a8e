use std::{
    collections::BTreeMap,
    net::IpAddr,
    num::{NonZeroU16, NonZeroU32},
    time::Duration,
};

use super::{
    health::{Check, RawCheck},
    id::{Incarnation, InstanceId, InstanceKey, ServiceId},
    input::{Problems, excerpt},
    instance::Locality,
};

/// Bounds on what may be registered. Each is configurable under `limits`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Shortest TTL.
    pub ttl_min: Duration,
    /// Longest TTL.
    pub ttl_max: Duration,
    /// TTL of a registration that names none.
    pub ttl_default: Duration,
    /// Greatest weight.
    pub weight_max: u32,
    /// Most metadata entries of one instance.
    pub metadata_entries: usize,
    /// Longest metadata key in bytes.
    pub metadata_key: usize,
    /// Longest metadata value in bytes.
    pub metadata_value: usize,
    /// Longest part of a locality in bytes.
    pub locality: usize,
    /// Most instances of one service.
    pub instances_per_service: usize,
    /// Shortest interval of a health check.
    pub check_interval_min: Duration,
    /// Most services.
    pub services: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            ttl_min: Duration::from_secs(1),
            ttl_max: Duration::from_secs(60 * 60),
            ttl_default: Duration::from_secs(30),
            weight_max: 65_535,
            metadata_entries: 64,
            metadata_key: 63,
            metadata_value: 1024,
            locality: 128,
            instances_per_service: 50_000,
            check_interval_min: Duration::from_millis(500),
            services: 100_000,
        }
    }
}

/// A registration as it came over the wire: right in its types, nothing else checked.
#[derive(Debug, Clone, Default)]
pub struct RawRegistration {
    /// Service name.
    pub service: String,
    /// Instance id.
    pub id: String,
    /// Absent: the server chooses.
    pub incarnation: Option<u64>,
    /// See [`Registration::new_run`].
    pub new_run: bool,
    /// Absent is a problem, as is a host name.
    pub address: Option<String>,
    /// Absent is a problem.
    pub port: Option<i128>,
    /// Region, zone and sub-zone.
    pub locality: [String; 3],
    /// Absent means 1.
    pub weight: Option<i128>,
    /// What the owner says of it.
    pub metadata: BTreeMap<String, String>,
    /// Absent means the default.
    pub ttl: Option<Duration>,
    /// Absent: nobody checks whether it works.
    pub check: Option<RawCheck>,
}

/// What an owner asks to be registered; valid.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registration {
    /// What identifies the instance.
    pub key: InstanceKey,
    /// Absent: keep the present one, or let the server choose.
    pub incarnation: Option<Incarnation>,
    /// It has not been registered before, so that it is later than the present run whatever its incarnation says.
    pub new_run: bool,
    /// Where it listens.
    pub address: IpAddr,
    /// The port that takes its calls.
    pub port: NonZeroU16,
    /// Where it runs.
    pub locality: Locality,
    /// Share of the calls.
    pub weight: NonZeroU32,
    /// What its owner says of it.
    pub metadata: BTreeMap<String, String>,
    /// How long it lasts without a renewal, unless a session holds it.
    pub ttl: Duration,
    /// Who checks whether it works.
    pub check: Option<Check>,
}

/// Fields of an instance to change; the others stay.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Update {
    /// New weight.
    pub weight: Option<NonZeroU32>,
    /// New metadata, replacing all.
    pub metadata: Option<BTreeMap<String, String>>,
}

impl Registration {
    /// Checks a raw registration and reports everything that is wrong with it.
    pub fn check(raw: RawRegistration, limits: &Limits) -> Result<Self, Problems> {
        let mut problems = Problems::default();
        let registration = Self::check_into(raw, limits, &mut problems);
        match registration {
            Some(registration) if problems.is_empty() => Ok(registration),
            _ => Err(problems),
        }
    }

    /// As [`Registration::check`], adding to problems that the reading of the input has found.
    pub fn check_into(raw: RawRegistration, limits: &Limits, problems: &mut Problems) -> Option<Self> {
        let RawRegistration {
            service,
            id,
            incarnation,
            new_run,
            address,
            port,
            locality,
            weight,
            metadata,
            ttl,
            check,
        } = raw;
        let service = problems.take("service", service.parse::<ServiceId>());
        let id = problems.take("id", id.parse::<InstanceId>());
        let reported = |problems: &Problems, field: &str| problems.0.iter().any(|p| p.field == field);

        let address = match address {
            Some(text) => problems.take("address", check_address(&text)),
            None => {
                if !reported(problems, "address") {
                    problems.add("address", "is missing: want the IP address that the instance listens on");
                }
                None
            }
        };
        let port = match port {
            Some(port) => problems.take("port", check_port(port)),
            None => {
                if !reported(problems, "port") {
                    problems.add("port", "is missing: want a whole number from 1 to 65535");
                }
                None
            }
        };
        if incarnation == Some(0) {
            problems.add("incarnation", "0 is not an incarnation: want 1 or more, or leave it out");
        }
        let weight = problems.take("weight", check_weight(weight.unwrap_or(1), limits));
        check_metadata(&metadata, limits, problems);
        let ttl = ttl.unwrap_or(limits.ttl_default);
        if !(limits.ttl_min..=limits.ttl_max).contains(&ttl) {
            problems.add(
                "ttl",
                format!(
                    "{} is out of range: want {} to {}",
                    format_duration(ttl),
                    format_duration(limits.ttl_min),
                    format_duration(limits.ttl_max)
                ),
            );
        }
        let check = check.and_then(|check| Check::check_into(check, limits, problems));
        for (name, part) in ["region", "zone", "sub_zone"].iter().zip(&locality) {
            if part.len() > limits.locality || part.chars().any(char::is_control) {
                problems.add(
                    format!("locality.{name}"),
                    format!(
                        "{} is not usable: want at most {} bytes of plain text",
                        excerpt(part),
                        limits.locality
                    ),
                );
            }
        }
        let [region, zone, sub_zone] = locality.map(Into::into);

        Some(Self {
            key: InstanceKey { service: service?, id: id? },
            incarnation: incarnation.map(Incarnation),
            new_run,
            address: address?,
            port: port?,
            locality: Locality { region, zone, sub_zone },
            weight: weight?,
            metadata,
            ttl,
            check,
        })
    }
}

impl Update {
    /// Checks a raw update and reports everything that is wrong with it.
    pub fn check_into(
        weight: Option<i128>,
        metadata: Option<BTreeMap<String, String>>,
        limits: &Limits,
        problems: &mut Problems,
    ) -> Self {
        if let Some(metadata) = &metadata {
            check_metadata(metadata, limits, problems);
        }
        let weight = weight.and_then(|weight| problems.take("weight", check_weight(weight, limits)));
        Self { weight, metadata }
    }
}

fn check_address(text: &str) -> Result<IpAddr, String> {
    let address: IpAddr = text.parse().map_err(|_| {
        format!(
            "{} is not an IP address: want an IPv4 or IPv6 literal such as 10.0.0.7; host names are never handed to \
             proxies, so resolve it first",
            excerpt(text)
        )
    })?;
    if address.is_unspecified() || address.is_multicast() {
        return Err(format!(
            "{address} is not an address that callers can reach: want the one that the instance is reachable at"
        ));
    }
    Ok(address)
}

pub(super) fn check_port(port: i128) -> Result<NonZeroU16, String> {
    u16::try_from(port)
        .ok()
        .and_then(NonZeroU16::new)
        .ok_or_else(|| format!("{port} is out of range: want a whole number from 1 to 65535"))
}

fn check_weight(weight: i128, limits: &Limits) -> Result<NonZeroU32, String> {
    u32::try_from(weight)
        .ok()
        .filter(|weight| *weight <= limits.weight_max)
        .and_then(NonZeroU32::new)
        .ok_or_else(|| {
            format!("{weight} is out of range: want a whole number from 1 to {}", limits.weight_max)
        })
}

/// Adds what is wrong with metadata by the limits.
pub fn check_metadata(metadata: &BTreeMap<String, String>, limits: &Limits, problems: &mut Problems) {
    if metadata.len() > limits.metadata_entries {
        problems.add(
            "metadata",
            format!("has {} entries: want at most {}", metadata.len(), limits.metadata_entries),
        );
        return;
    }
    for (key, value) in metadata {
        if key.is_empty() || key.len() > limits.metadata_key || key.chars().any(char::is_control) {
            problems.add(
                "metadata",
                format!(
                    "{} is not a key: want 1 to {} bytes of plain text",
                    excerpt(key),
                    limits.metadata_key
                ),
            );
        }
        if value.len() > limits.metadata_value {
            problems.add(
                format!("metadata.{}", excerpt(key)),
                format!("has {} bytes: want at most {}", value.len(), limits.metadata_value),
            );
        }
    }
}

/// Reads a duration such as `30s`, `1m30s` or `500ms`.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong =
        || format!("{} is not a duration: want a number and a unit, such as 30s, 5m or 500ms", excerpt(text));
    // The friendly format also takes years and ISO 8601; a duration here always has a fixed length.
    let duration: jiff::SignedDuration = text.parse().map_err(|_| wrong())?;
    Duration::try_from(duration).map_err(|_| wrong())
}

/// Writes a duration the way [`parse_duration`] reads it.
pub fn format_duration(duration: Duration) -> String {
    let nanos = duration.as_nanos();
    let in_units =
        |unit: u128, name: &str| (nanos.is_multiple_of(unit)).then(|| format!("{}{name}", nanos / unit));
    if nanos == 0 {
        return "0s".to_owned();
    }
    let hours = in_units(3_600_000_000_000, "h").or_else(|| in_units(60_000_000_000, "m"));
    hours
        .or_else(|| in_units(1_000_000_000, "s"))
        .or_else(|| in_units(1_000_000, "ms"))
        .or_else(|| in_units(1_000, "us"))
        .unwrap_or_else(|| format!("{nanos}ns"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw() -> RawRegistration {
        RawRegistration {
            service: "greeter".into(),
            id: "a".into(),
            address: Some("127.0.0.1".into()),
            port: Some(50051),
            ..RawRegistration::default()
        }
    }

    fn wrong(change: impl FnOnce(&mut RawRegistration)) -> String {
        let mut raw = raw();
        change(&mut raw);
        Registration::check(raw, &Limits::default()).map(|_| ()).unwrap_err().to_string()
    }

    #[test]
    fn defaults() {
        let registration = Registration::check(raw(), &Limits::default()).unwrap();
        assert_eq!(registration.weight.get(), 1);
        assert_eq!(registration.ttl, Duration::from_secs(30));
        assert_eq!(registration.incarnation, None);
    }

    #[test]
    fn every_wrong_field_is_named() {
        type Change = fn(&mut RawRegistration);
        let cases: [(&str, Change); 14] = [
            ("address: \"db.local\" is not an IP address", |r| r.address = Some("db.local".into())),
            ("address: \"10.0.0.1:80\" is not an IP address", |r| r.address = Some("10.0.0.1:80".into())),
            ("address: 0.0.0.0 is not an address that callers can reach", |r| {
                r.address = Some("0.0.0.0".into())
            }),
            ("address: is missing", |r| r.address = None),
            ("port: 0 is out of range", |r| r.port = Some(0)),
            ("port: 70000 is out of range", |r| r.port = Some(70_000)),
            ("port: is missing", |r| r.port = None),
            ("ttl: 0s is out of range: want 1s to 1h", |r| r.ttl = Some(Duration::ZERO)),
            ("ttl: 8760h is out of range", |r| r.ttl = Some(Duration::from_secs(365 * 86_400))),
            ("weight: 0 is out of range", |r| r.weight = Some(0)),
            ("service: \"a\\u{7}b\" is not a service name", |r| r.service = "a\u{7}b".into()),
            ("id: ", |r| r.id = "x".repeat(10_000)),
            ("locality.zone: ", |r| r.locality[1] = "z\n".into()),
            ("incarnation: 0 is not an incarnation", |r| r.incarnation = Some(0)),
        ];
        for (want, change) in cases {
            let message = wrong(change);
            assert!(message.starts_with(want), "want {want:?}, got {message:?}");
            assert!(message.len() < 400);
        }
    }

    #[test]
    fn problems_are_reported_together() {
        let message = wrong(|r| {
            r.address = Some("nope".into());
            r.port = Some(0);
            r.ttl = Some(Duration::ZERO);
        });
        assert!(["address:", "port:", "ttl:"].iter().all(|field| message.contains(field)), "{message}");
    }

    #[test]
    fn durations() {
        for text in ["30s", "500ms", "90s", "1h", "5m", "0s", "7us"] {
            assert_eq!(format_duration(parse_duration(text).unwrap()), text);
        }
        assert_eq!(parse_duration("1m30s").unwrap(), Duration::from_secs(90));
        for bad in ["", "30", "-5s", "s", "1 fortnight", "99999999999999999999s"] {
            assert!(parse_duration(bad).is_err(), "{bad:?}");
        }
    }
}
