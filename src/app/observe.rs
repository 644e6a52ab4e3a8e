use std::time::Duration;

use prometheus_client::metrics::{counter::Counter, gauge::Gauge, histogram::Histogram};

use crate::{
    telemetry::Metrics,
    xds::{Observer, Protocol, ResourceType, Response},
};

/// What happens on the streams, as metrics.
#[derive(Debug)]
pub(super) struct StreamMetrics {
    connected: Gauge,
    sent: Counter,
    rejected: Counter,
    unanswered: Counter,
    to_ack: Histogram,
}

impl StreamMetrics {
    pub(super) fn new(metrics: &Metrics) -> Self {
        Self {
            connected: metrics.gauge("xds_streams", "Connected proxies"),
            sent: metrics.counter("xds_responses", "Responses sent"),
            rejected: metrics.counter("xds_rejections", "Responses that proxies rejected"),
            unanswered: metrics.counter("xds_unanswered", "Responses that were not answered in time"),
            to_ack: metrics
                .seconds("xds_propagation_seconds", "From a published change to its acknowledgement"),
        }
    }
}

impl Observer for StreamMetrics {
    fn connected(&self, _: Protocol) {
        self.connected.inc();
    }

    fn disconnected(&self, _: Protocol) {
        self.connected.dec();
    }

    fn sent(&self, _: Protocol, _: &Response) {
        self.sent.inc();
    }

    fn acknowledged(&self, _: Protocol, _: ResourceType, latency: Duration) {
        self.to_ack.observe(latency.as_secs_f64());
    }

    fn rejected(&self, _: Protocol, _: ResourceType, _: &str) {
        self.rejected.inc();
    }

    fn unanswered(&self, _: Protocol, responses: u64) {
        self.unanswered.inc_by(responses);
    }
}
