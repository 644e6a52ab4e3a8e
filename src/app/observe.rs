use std::{sync::Arc, time::Duration};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::{
        counter::{ConstCounter, Counter},
        gauge::{ConstGauge, Gauge},
        histogram::Histogram,
    },
};

use crate::{
    catalog::Reader,
    rt,
    store::FileStore,
    telemetry::{Metrics, Stage},
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
            to_ack: metrics.propagation(Stage::Acknowledged),
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

/// The catalog, as metrics.
#[derive(Debug)]
pub(super) struct CatalogMetrics(pub(super) Reader);

impl Collector for CatalogMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let stale = self.0.stale().and_then(|stale| rt::now().duration_since(stale.since).ok());
        let gauge = ConstGauge::new(stale.unwrap_or_default().as_secs_f64());
        let help = "How long what is known may have been older than the truth, 0 while it is not";
        gauge.encode(encoder.encode_descriptor("catalog_stale_seconds", help, None, gauge.metric_type())?)
    }
}

/// What the embedded store did, as metrics.
#[derive(Debug)]
pub(super) struct StoreMetrics(pub(super) Arc<FileStore>);

impl Collector for StoreMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let stats = self.0.stats();
        for (name, help, value) in [
            ("store_commits", "Commits made durable", stats.commits),
            ("store_syncs", "Writes with one sync each that made them so", stats.batches),
            ("store_failed_syncs", "Writes or syncs that failed", stats.failed_batches),
            ("store_written_bytes", "Bytes appended to logs", stats.bytes),
            ("store_snapshots", "Snapshots written", stats.snapshots),
        ] {
            let counter = ConstCounter::new(value);
            counter.encode(encoder.encode_descriptor(name, help, None, counter.metric_type())?)?;
        }
        Ok(())
    }
}
