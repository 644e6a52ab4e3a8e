use std::time::Duration;

use crate::{
    model::{Check, Probe, ServerCheck, Statuses},
    proto::v1::{self, health_check::Kind},
};

/// The wire form of a check, which is also how a server stores it.
pub fn check_to_proto(check: &Check) -> v1::HealthCheck {
    let ServerCheck { probe, port, interval, timeout, healthy_threshold, unhealthy_threshold, jitter } =
        match check {
            Check::Server(check) => check,
            Check::Owner => {
                return v1::HealthCheck { kind: Some(Kind::Owner(v1::OwnerCheck {})), ..Default::default() };
            }
        };
    let ranges = |statuses: &Statuses| {
        let range = |(first, last): (u16, u16)| v1::StatusRange { first: first.into(), last: last.into() };
        statuses.ranges().map(range).collect()
    };
    v1::HealthCheck {
        kind: Some(match probe {
            Probe::Tcp => Kind::Tcp(v1::TcpCheck {}),
            Probe::Grpc { service } => Kind::Grpc(v1::GrpcCheck { service: service.clone() }),
            Probe::Http { path, expect, degraded } => Kind::Http(v1::HttpCheck {
                path: path.clone(),
                expect: ranges(expect),
                degraded: ranges(degraded),
            }),
        }),
        port: port.map_or(0, |port| port.get().into()),
        interval: Some(duration(*interval)),
        timeout: Some(duration(*timeout)),
        healthy_threshold: healthy_threshold.get(),
        unhealthy_threshold: unhealthy_threshold.get(),
        jitter: Some(u32::from(*jitter)),
    }
}

fn duration(duration: Duration) -> prost_types::Duration {
    // Times of a check are bounded to hours, far within the range of the message.
    prost_types::Duration::try_from(duration).unwrap_or_default()
}
