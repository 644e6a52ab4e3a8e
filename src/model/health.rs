use std::{
    fmt,
    num::{NonZeroU16, NonZeroU32},
    ops::RangeInclusive,
    str::FromStr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use super::{
    id::{Incarnation, InstanceKey, Revision},
    input::{Problems, excerpt},
    registration::{Limits, check_port, format_duration},
};

/// What is known of whether an instance works.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Verdict {
    /// Nobody has said yet.
    Unknown,
    /// It works.
    Healthy,
    /// It works, but others are better: it gets calls when no healthy instance is left.
    Degraded,
    /// It does not work.
    Unhealthy,
}

impl Verdict {
    /// Whether it was seen to work, more or less.
    pub fn works(self) -> bool {
        matches!(self, Self::Healthy | Self::Degraded)
    }

    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Healthy => "healthy",
            Self::Degraded => "degraded",
            Self::Unhealthy => "unhealthy",
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The verdict on an instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Health {
    /// What it is.
    pub verdict: Verdict,
    /// Since when.
    pub since: SystemTime,
    /// What was seen, for people. Empty when there is nothing to say.
    pub reason: Arc<str>,
    /// Whether this run of the instance has ever been seen to work, or is not checked. Before that proxies are not told of it.
    pub passed: bool,
    /// The change that brought it; 0 for an instance without a check.
    pub revision: Revision,
}

impl Health {
    /// That of an instance without a check.
    pub fn unchecked(since: SystemTime) -> Self {
        let revision = Revision::default();
        Self { verdict: Verdict::Unknown, since, reason: "".into(), passed: true, revision }
    }

    /// That of an instance as it is registered with a check.
    pub fn first(check: &Check, since: SystemTime) -> Self {
        let (verdict, reason) = match check {
            Check::Owner => (Verdict::Healthy, "registered by its owner, who checks it"),
            Check::Server(_) => (Verdict::Unknown, "not checked yet"),
        };
        let unchecked = Self::unchecked(since);
        Self { verdict, reason: reason.into(), passed: verdict.works(), ..unchecked }
    }
}

/// A verdict on one run of an instance, from whoever checks it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HealthReport {
    /// The instance.
    pub key: InstanceKey,
    /// The run of it that was checked. Of another run it says nothing.
    pub incarnation: Incarnation,
    /// What it is.
    pub verdict: Verdict,
    /// What was seen.
    pub reason: String,
}

/// Longest reason of a verdict in characters.
const REASON: usize = 256;

impl HealthReport {
    /// The reason as it is kept: bounded, on one line.
    pub fn kept_reason(&self) -> Arc<str> {
        let clean = self.reason.chars().map(|c| if c.is_control() { ' ' } else { c });
        clean.take(REASON).collect::<String>().into()
    }
}

/// Who finds out whether an instance works.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Check {
    /// Its owner, who says so on the session that registered it. Taken to work until then: it registers what works.
    Owner,
    /// The server, by asking it again and again. Proxies are not told of it before it has passed once.
    Server(ServerCheck),
}

/// How the server checks an instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerCheck {
    /// What it asks.
    pub probe: Probe,
    /// The port asked, if that is not the one that takes calls.
    pub port: Option<NonZeroU16>,
    /// Longest time from one check to the next.
    pub interval: Duration,
    /// How long the answer may take; not longer than the interval.
    pub timeout: Duration,
    /// Good results in a row that make an unhealthy instance healthy.
    pub healthy_threshold: NonZeroU32,
    /// Bad results in a row that make a healthy instance unhealthy.
    pub unhealthy_threshold: NonZeroU32,
    /// By up to how many percent of the interval each check comes earlier, at random: 0 to 50.
    pub jitter: u8,
}

/// One way to ask a process whether it works.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Probe {
    /// It accepts a connection.
    Tcp,
    /// It answers GET of this path. Redirects are not followed.
    Http {
        /// Begins with `/`.
        path: String,
        /// Statuses of one that works.
        expect: Statuses,
        /// Statuses of one that is degraded.
        degraded: Statuses,
    },
    /// `grpc.health.v1.Health/Check` answers SERVING.
    Grpc {
        /// The service asked for; empty: the server as a whole.
        service: String,
    },
}

/// Ranges of HTTP statuses.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Statuses(Vec<RangeInclusive<u16>>);

/// Most ranges of statuses in one list.
const RANGES: usize = 16;

impl Statuses {
    /// 200 to 399.
    pub fn usual() -> Self {
        Self(vec![200..=399])
    }

    /// Checks ranges of statuses.
    ///
    /// # Errors
    /// Says what is wrong and what would be right.
    pub fn check(ranges: &[(i128, i128)]) -> Result<Self, String> {
        if ranges.len() > RANGES {
            return Err(format!("has {} entries: want at most {RANGES}", ranges.len()));
        }
        let check = |(first, last): &(i128, i128)| {
            let status = |n: i128| u16::try_from(n).ok().filter(|n| (100..=599).contains(n));
            match (status(*first), status(*last)) {
                (Some(first), Some(last)) if first <= last => Ok(first..=last),
                _ => Err(format!(
                    "{first}-{last} is no range of statuses: want e.g. 200 or 200-299, within 100-599"
                )),
            }
        };
        ranges.iter().map(check).collect::<Result<_, _>>().map(Self)
    }

    /// Reads `200` or `200-299`.
    ///
    /// # Errors
    /// Says what would be right.
    pub fn parse_range(text: &str) -> Result<(i128, i128), String> {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        match (first.trim().parse(), last.trim().parse()) {
            (Ok(first), Ok(last)) => Ok((first, last)),
            _ => Err(format!("{} is no range of statuses: want e.g. 200 or 200-299", excerpt(text))),
        }
    }

    /// Whether the status is among them.
    pub fn contains(&self, status: u16) -> bool {
        self.0.iter().any(|range| range.contains(&status))
    }

    /// First and last of each range.
    pub fn ranges(&self) -> impl Iterator<Item = (u16, u16)> {
        self.0.iter().map(|range| (*range.start(), *range.end()))
    }
}

/// A check as it came over the wire: right in its types, nothing else checked.
#[derive(Debug, Clone, Default)]
pub struct RawCheck {
    /// What is asked, and by whom.
    pub kind: RawKind,
    /// Absent: the port that takes calls.
    pub port: Option<i128>,
    /// Absent: 5 s.
    pub interval: Option<Duration>,
    /// Absent: 1 s, or the interval if that is shorter.
    pub timeout: Option<Duration>,
    /// Absent: 2.
    pub healthy_threshold: Option<i128>,
    /// Absent: 3.
    pub unhealthy_threshold: Option<i128>,
    /// Absent: 10.
    pub jitter: Option<i128>,
}

/// The kind of a [`RawCheck`].
#[derive(Debug, Clone, Default)]
pub enum RawKind {
    /// A connection.
    #[default]
    Tcp,
    /// An HTTP request.
    Http {
        /// Empty: `/`.
        path: String,
        /// First and last status of each range; none: 200 to 399.
        expect: Vec<(i128, i128)>,
        /// Likewise of a degraded instance; none: none.
        degraded: Vec<(i128, i128)>,
    },
    /// A call of `grpc.health.v1`.
    Grpc {
        /// The service asked for.
        service: String,
    },
    /// The owner says.
    Owner,
}

/// Longest path, and longest gRPC service name, in bytes.
const TEXT: usize = 1024;
/// Longest interval.
const INTERVAL_MAX: Duration = Duration::from_secs(60 * 60);
/// Shortest time-out.
const TIMEOUT_MIN: Duration = Duration::from_millis(10);
/// Greatest threshold.
const THRESHOLD: i128 = 100;
/// Greatest jitter in percent.
const JITTER: i128 = 50;

impl Check {
    /// Checks a raw check, noting everything that is wrong with it under `health`.
    pub fn check_into(raw: RawCheck, limits: &Limits, problems: &mut Problems) -> Option<Self> {
        let before = problems.0.len();
        let RawCheck { kind, port, interval, timeout, healthy_threshold, unhealthy_threshold, jitter } = raw;
        let probe = match kind {
            RawKind::Owner => None,
            RawKind::Tcp => Some(Probe::Tcp),
            RawKind::Grpc { service } => {
                let service = problems.take("health.service", check_grpc_service(service));
                Some(Probe::Grpc { service: service.unwrap_or_default() })
            }
            RawKind::Http { path, expect, degraded } => {
                let path = if path.is_empty() { "/".to_owned() } else { path };
                let path = problems.take("health.path", check_path(path)).unwrap_or_default();
                let expect = problems.take("health.expect", Statuses::check(&expect)).unwrap_or_default();
                let expect = if expect == Statuses::default() { Statuses::usual() } else { expect };
                let degraded = problems.take("health.degraded", Statuses::check(&degraded));
                Some(Probe::Http { path, expect, degraded: degraded.unwrap_or_default() })
            }
        };
        let port = port.and_then(|port| problems.take("health.port", check_port(port)));
        let mut time = |name: &str,
                        given: Option<Duration>,
                        usual: Duration,
                        range: RangeInclusive<Duration>| {
            let time = given.unwrap_or(usual.clamp(*range.start(), *range.end()));
            if !range.contains(&time) {
                let (time, least, most) =
                    (format_duration(time), format_duration(*range.start()), format_duration(*range.end()));
                problems
                    .add(format!("health.{name}"), format!("{time} is out of range: want {least} to {most}"));
            }
            time
        };
        let least = limits.check_interval_min;
        let interval = time("interval", interval, Duration::from_secs(5), least..=INTERVAL_MAX.max(least));
        let timeout =
            time("timeout", timeout, Duration::from_secs(1), TIMEOUT_MIN..=interval.max(TIMEOUT_MIN));
        let mut number = |name: &str, given: Option<i128>, usual: i128, range: RangeInclusive<i128>| {
            let number = given.unwrap_or(usual);
            if !range.contains(&number) {
                let (least, most) = range.into_inner();
                let message = format!("{number} is out of range: want a whole number from {least} to {most}");
                problems.add(format!("health.{name}"), message);
            }
            number
        };
        let healthy = number("healthy_threshold", healthy_threshold, 2, 1..=THRESHOLD);
        let unhealthy = number("unhealthy_threshold", unhealthy_threshold, 3, 1..=THRESHOLD);
        let jitter = number("jitter", jitter, 10, 0..=JITTER);
        if problems.0.len() > before {
            return None;
        }
        let Some(probe) = probe else { return Some(Self::Owner) };
        let threshold = |n: i128| u32::try_from(n).ok().and_then(NonZeroU32::new);
        Some(Self::Server(ServerCheck {
            probe,
            port,
            interval,
            timeout,
            healthy_threshold: threshold(healthy)?,
            unhealthy_threshold: threshold(unhealthy)?,
            jitter: u8::try_from(jitter).ok()?,
        }))
    }
}

fn check_path(path: String) -> Result<String, String> {
    let plain = |b: u8| b.is_ascii_graphic() && !matches!(b, b'#' | b'"' | b'<' | b'>' | b'\\' | b'^' | b'`');
    if path.starts_with('/') && path.len() <= TEXT && path.bytes().all(plain) {
        return Ok(path);
    }
    Err(format!("{} is not a path: want one such as /healthz, at most {TEXT} bytes", excerpt(&path)))
}

fn check_grpc_service(service: String) -> Result<String, String> {
    if service.len() <= TEXT && service.bytes().all(|b| b.is_ascii_graphic()) {
        return Ok(service);
    }
    Err(format!("{} is not a gRPC service: want one such as greeter.v1.Greeter", excerpt(&service)))
}

/// Reads `tcp`, `http`, `http:/path`, `grpc` or `grpc:service`.
impl FromStr for Probe {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (kind, detail) = text.split_once(':').unwrap_or((text, ""));
        match (kind, detail) {
            ("tcp", "") => Ok(Self::Tcp),
            ("http", path) => {
                let path = if path.is_empty() { "/" } else { path };
                let path = check_path(path.to_owned())?;
                Ok(Self::Http { path, expect: Statuses::usual(), degraded: Statuses::default() })
            }
            ("grpc", service) => Ok(Self::Grpc { service: check_grpc_service(service.to_owned())? }),
            _ => Err(format!(
                "{} is not a check: want tcp, http, http:/path, grpc or grpc:service",
                excerpt(text)
            )),
        }
    }
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp => f.write_str("tcp"),
            Self::Http { path, .. } => write!(f, "http {path}"),
            Self::Grpc { service } if service.is_empty() => f.write_str("grpc"),
            Self::Grpc { service } => write!(f, "grpc {service}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(raw: RawCheck) -> Result<Check, String> {
        let mut problems = Problems::default();
        let check = Check::check_into(raw, &Limits::default(), &mut problems);
        check.ok_or_else(|| problems.to_string())
    }

    #[test]
    fn defaults() {
        let Ok(Check::Server(check)) = check(RawCheck::default()) else { panic!("refused") };
        assert_eq!((check.interval, check.timeout), (Duration::from_secs(5), Duration::from_secs(1)));
        assert_eq!(
            (check.healthy_threshold.get(), check.unhealthy_threshold.get(), check.jitter),
            (2, 3, 10)
        );
    }

    #[test]
    fn every_wrong_field_is_named() {
        let http = |path: &str, expect: &[(i128, i128)]| RawKind::Http {
            path: path.into(),
            expect: expect.to_vec(),
            degraded: Vec::new(),
        };
        let second = Some(Duration::from_secs(1));
        let some = RawCheck::default;
        for (raw, want) in [
            (RawCheck { port: Some(0), ..some() }, "health.port: 0 is out of range"),
            (
                RawCheck { interval: Some(Duration::from_millis(1)), ..some() },
                "health.interval: 1ms is out of range: want 500ms to 1h",
            ),
            (
                RawCheck { interval: second, timeout: Some(Duration::from_secs(2)), ..some() },
                "health.timeout: 2s is out of range: want 10ms to 1s",
            ),
            (
                RawCheck { healthy_threshold: Some(0), ..some() },
                "health.healthy_threshold: 0 is out of range: want a whole number from 1 to 100",
            ),
            (RawCheck { unhealthy_threshold: Some(101), ..some() }, "health.unhealthy_threshold: 101"),
            (RawCheck { jitter: Some(51), ..some() }, "health.jitter: 51 is out of range"),
            (RawCheck { kind: http("healthz", &[]), ..some() }, "health.path: \"healthz\" is not a path"),
            (RawCheck { kind: http("/a b", &[]), ..some() }, "health.path: \"/a b\" is not a path"),
            (RawCheck { kind: http("/", &[(200, 99)]), ..some() }, "health.expect: 200-99 is no range"),
            (RawCheck { kind: http("/", &[(200, 700)]), ..some() }, "health.expect: 200-700 is no range"),
            (
                RawCheck { kind: RawKind::Grpc { service: "a\nb".into() }, ..some() },
                "health.service: \"a\\nb\" is not a gRPC service",
            ),
        ] {
            let message = check(raw).unwrap_err();
            assert!(message.starts_with(want), "want {want:?}, got {message:?}");
        }
    }

    #[test]
    fn statuses() {
        let ranges = ["200-299", "304"].map(|text| Statuses::parse_range(text).unwrap());
        let statuses = Statuses::check(&ranges).unwrap();
        for (status, want) in [(199, false), (200, true), (299, true), (300, false), (304, true)] {
            assert_eq!(statuses.contains(status), want, "{status}");
        }
        assert!(Statuses::parse_range("2xx").unwrap_err().contains("want e.g. 200 or 200-299"));
    }

    #[test]
    fn probes_as_text() {
        for (text, shown) in [
            ("tcp", "tcp"),
            ("http", "http /"),
            ("http:/healthz?x=1", "http /healthz?x=1"),
            ("grpc", "grpc"),
            ("grpc:a.B", "grpc a.B"),
        ] {
            assert_eq!(text.parse::<Probe>().unwrap().to_string(), shown);
        }
        for bad in ["", "tls", "tcp:1", "http:healthz", "http:/a b", "grpc:a b", "http:/\u{7}"] {
            let message = bad.parse::<Probe>().unwrap_err();
            assert!(message.contains("want"), "{message}");
        }
    }
}
