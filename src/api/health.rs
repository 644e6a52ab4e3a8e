//! Checks and verdicts as JSON.

use std::time::Duration;

use serde::Serialize;

use super::time::timestamp;
use crate::model::{
    Check, Fields, Health, Probe, Problems, RawCheck, RawKind, ServerCheck, Statuses, Value, excerpt,
    format_duration, parse_duration,
};

#[derive(Debug, Serialize)]
pub(super) struct HealthDto {
    verdict: &'static str,
    since: String,
    reason: String,
    passed: bool,
    revision: u64,
}

impl From<&Health> for HealthDto {
    fn from(health: &Health) -> Self {
        Self {
            verdict: health.verdict.name(),
            since: timestamp(health.since),
            reason: health.reason.to_string(),
            passed: health.passed,
            revision: health.revision.0,
        }
    }
}

/// As it may be sent in a PUT.
#[derive(Debug, Default, Serialize)]
pub(super) struct CheckDto {
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    service: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    expect: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    degraded: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    port: Option<u16>,
    #[serde(flatten)]
    times: Option<TimesDto>,
}

#[derive(Debug, Serialize)]
struct TimesDto {
    interval: String,
    timeout: String,
    healthy_threshold: u32,
    unhealthy_threshold: u32,
    jitter: u8,
}

impl From<&Check> for CheckDto {
    fn from(check: &Check) -> Self {
        let Check::Server(ServerCheck {
            probe,
            port,
            interval,
            timeout,
            healthy_threshold,
            unhealthy_threshold,
            jitter,
        }) = check
        else {
            return Self { kind: "owner", ..Self::default() };
        };
        let times = TimesDto {
            interval: format_duration(*interval),
            timeout: format_duration(*timeout),
            healthy_threshold: healthy_threshold.get(),
            unhealthy_threshold: unhealthy_threshold.get(),
            jitter: *jitter,
        };
        let common = Self { port: port.map(Into::into), times: Some(times), ..Self::default() };
        match probe {
            Probe::Tcp => Self { kind: "tcp", ..common },
            Probe::Grpc { service } => Self { kind: "grpc", service: Some(service.clone()), ..common },
            Probe::Http { path, expect, degraded } => Self {
                kind: "http",
                path: Some(path.clone()),
                expect: ranges(expect),
                degraded: ranges(degraded),
                ..common
            },
        }
    }
}

fn ranges(statuses: &Statuses) -> Vec<String> {
    let text = |(first, last)| if first == last { format!("{first}") } else { format!("{first}-{last}") };
    statuses.ranges().map(text).collect()
}

const WANT: &str = "want none, grpc, http, tcp, owner, or {\"kind\": one of these, \"interval\": \"5s\", …}";

/// The field `health`: the name of a kind, or a map with its settings.
pub(super) fn read_check(fields: &mut Fields<'_>, problems: &mut Problems) -> Option<RawCheck> {
    let node = fields.node("health")?;
    let path = fields.path("health");
    match &node.value {
        Value::Text(kind) => {
            if kind == "none" {
                return None;
            }
            let kind = read_kind(kind).map_err(|message| problems.add_at(path, message, node.at)).ok()?;
            Some(RawCheck { kind, ..RawCheck::default() })
        }
        Value::Map(_) => {
            let mut fields = Fields::of(node, &path, problems);
            let before = problems.0.len();
            let kind = fields.parse("kind", problems, read_kind);
            let kind = match kind {
                Some(RawKind::Http { .. }) => Some(RawKind::Http {
                    path: fields.text("path", problems).unwrap_or_default().to_owned(),
                    expect: read_ranges("expect", &mut fields, problems),
                    degraded: read_ranges("degraded", &mut fields, problems),
                }),
                Some(RawKind::Grpc { .. }) => Some(RawKind::Grpc {
                    service: fields.text("service", problems).unwrap_or_default().to_owned(),
                }),
                Some(kind) => Some(kind),
                None => {
                    if problems.0.len() == before {
                        problems.add_at(fields.path("kind"), format!("is missing: {WANT}"), node.at);
                    }
                    // What belongs to a kind is not to be called unknown.
                    for name in ["path", "expect", "degraded", "service"] {
                        fields.node(name);
                    }
                    None
                }
            };
            let mut integer = |name: &'static str| fields.integer(name, i128::MIN..=i128::MAX, problems);
            let (port, healthy_threshold, unhealthy_threshold, jitter) = (
                integer("port"),
                integer("healthy_threshold"),
                integer("unhealthy_threshold"),
                integer("jitter"),
            );
            let interval: Option<Duration> = fields.parse("interval", problems, parse_duration);
            let timeout = fields.parse("timeout", problems, parse_duration);
            fields.finish(problems);
            let kind = kind?;
            Some(RawCheck { kind, port, interval, timeout, healthy_threshold, unhealthy_threshold, jitter })
        }
        _ => {
            problems.add_at(path, format!("is not a check: {WANT}"), node.at);
            None
        }
    }
}

fn read_kind(text: &str) -> Result<RawKind, String> {
    match text {
        "tcp" => Ok(RawKind::Tcp),
        "http" => Ok(RawKind::Http { path: String::new(), expect: Vec::new(), degraded: Vec::new() }),
        "grpc" => Ok(RawKind::Grpc { service: String::new() }),
        "owner" => Ok(RawKind::Owner),
        _ => Err(format!("{} is not a kind of check: {WANT}", excerpt(text))),
    }
}

/// A list of statuses: `200`, or `"200-299"`.
fn read_ranges(name: &'static str, fields: &mut Fields<'_>, problems: &mut Problems) -> Vec<(i128, i128)> {
    let path = fields.path(name);
    let items = fields.list(name, problems).unwrap_or_default();
    let mut ranges = Vec::with_capacity(items.len());
    for item in items {
        let range = match &item.value {
            Value::Int(status) => Ok((*status, *status)),
            Value::Text(text) => Statuses::parse_range(text),
            _ => Err("is not a status: want e.g. 200 or \"200-299\"".to_owned()),
        };
        match range {
            Ok(range) => ranges.push(range),
            Err(message) => problems.add_at(path.clone(), message, item.at),
        }
    }
    ranges
}
