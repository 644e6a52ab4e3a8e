//! Checks and verdicts on the wire and in the store.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use super::record::wire_time;
use crate::{
    model::{Check, Health, Incarnation, Limits, Problems, RawCheck, RawKind, Revision, Verdict},
    proto::v1::{self, health_check::Kind},
};

/// Reads the wire form of a check; what is wrong is noted under `health`. A check without a kind is none.
pub fn raw_check(check: Option<v1::HealthCheck>, problems: &mut Problems) -> Option<RawCheck> {
    let v1::HealthCheck { kind, port, interval, timeout, healthy_threshold, unhealthy_threshold, jitter } =
        check?;
    let ranges = |ranges: Vec<v1::StatusRange>| {
        ranges.into_iter().map(|range| (range.first.into(), range.last.into())).collect()
    };
    let kind = match kind {
        Some(Kind::Tcp(_)) => RawKind::Tcp,
        Some(Kind::Owner(_)) => RawKind::Owner,
        Some(Kind::Grpc(v1::GrpcCheck { service })) => RawKind::Grpc { service },
        Some(Kind::Http(v1::HttpCheck { path, expect, degraded })) => {
            RawKind::Http { path, expect: ranges(expect), degraded: ranges(degraded) }
        }
        None => {
            problems.add("health", "has no kind: want grpc, http, tcp or owner, or leave it out");
            return None;
        }
    };
    let mut time = |name: &str, time: Option<prost_types::Duration>| {
        problems
            .take(name, Duration::try_from(time?).map_err(|_| "is negative: want a time above 0".to_owned()))
    };
    let given = |n: u32| (n != 0).then_some(i128::from(n));
    Some(RawCheck {
        kind,
        port: given(port),
        interval: time("health.interval", interval),
        timeout: time("health.timeout", timeout),
        healthy_threshold: given(healthy_threshold),
        unhealthy_threshold: given(unhealthy_threshold),
        jitter: jitter.map(i128::from),
    })
}

/// Reads a stored check: what was accepted once stays accepted when the limits become narrower.
pub(super) fn stored_check(check: Option<v1::HealthCheck>) -> Result<Option<Arc<Check>>, String> {
    let mut problems = Problems::default();
    let raw = raw_check(check, &mut problems);
    let limits = Limits { check_interval_min: Duration::from_millis(1), ..Limits::default() };
    let check = raw.and_then(|raw| Check::check_into(raw, &limits, &mut problems));
    if problems.is_empty() { Ok(check.map(Arc::new)) } else { Err(problems.to_string()) }
}

/// The wire form of a verdict.
pub fn health_to_proto(health: &Health) -> v1::Health {
    v1::Health {
        verdict: match health.verdict {
            Verdict::Unknown => v1::Verdict::Unspecified,
            Verdict::Healthy => v1::Verdict::Healthy,
            Verdict::Degraded => v1::Verdict::Degraded,
            Verdict::Unhealthy => v1::Verdict::Unhealthy,
        }
        .into(),
        since: Some(health.since.into()),
        reason: health.reason.to_string(),
        revision: health.revision.0,
        incarnation: 0,
        passed: health.passed,
    }
}

/// The verdict that a client sent.
pub fn verdict_from_proto(verdict: v1::Verdict) -> Verdict {
    match verdict {
        v1::Verdict::Unspecified => Verdict::Unknown,
        v1::Verdict::Healthy => Verdict::Healthy,
        v1::Verdict::Degraded => Verdict::Degraded,
        v1::Verdict::Unhealthy => Verdict::Unhealthy,
    }
}

pub(super) fn health_from_proto(
    message: v1::Health,
    revision: Revision,
) -> Result<(Incarnation, Health), String> {
    let health = Health {
        verdict: verdict_from_proto(message.verdict()),
        since: wire_time(message.since, "since")?.unwrap_or(SystemTime::UNIX_EPOCH),
        reason: message.reason.into(),
        passed: message.passed,
        revision,
    };
    Ok((Incarnation(message.incarnation), health))
}
