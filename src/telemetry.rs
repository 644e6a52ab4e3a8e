//! Logs and metrics: where they go, and the level that can be changed at run time.

use std::{
    fmt,
    io::IsTerminal as _,
    sync::{Arc, Mutex, PoisonError},
};

use prometheus_client::{
    collector::Collector,
    encoding::text,
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Metric, Registry},
};
use tracing_subscriber::{
    EnvFilter, Registry as Subscriber, fmt as log_fmt, layer::SubscriberExt as _, reload,
    util::SubscriberInitExt as _,
};

/// How log lines are written, to standard error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// The log filter of this process. Cheap to clone.
#[derive(Clone)]
pub struct LogFilter(reload::Handle<EnvFilter, Subscriber>);

impl fmt::Debug for LogFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("LogFilter").field(&self.get()).finish()
    }
}

impl LogFilter {
    /// Starts logging for the process with a filter such as `info` or `info,disco::xds=debug`. Once a process; later calls
    /// leave the first in place and give a handle that changes nothing.
    ///
    /// # Errors
    /// When the filter is not one; says what is wrong with it.
    pub fn start(filter: &str, format: LogFormat) -> Result<Self, String> {
        let (layer, handle) = reload::Layer::new(parse(filter)?);
        let subscriber = tracing_subscriber::registry().with(layer);
        let lines = log_fmt::layer().with_writer(std::io::stderr);
        // Only a subscriber that was set before can be in the way, and then that one goes on.
        let _ = match format {
            LogFormat::Text => subscriber
                .with(lines.with_target(false).with_ansi(std::io::stderr().is_terminal()).compact())
                .try_init(),
            LogFormat::Json => subscriber.with(lines.json().flatten_event(true)).try_init(),
        };
        Ok(Self(handle))
    }

    /// The filter in force.
    pub fn get(&self) -> String {
        self.0.with_current(ToString::to_string).unwrap_or_default()
    }

    /// Puts another filter in force.
    ///
    /// # Errors
    /// When it is not a filter; says what is wrong with it.
    pub fn set(&self, filter: &str) -> Result<(), String> {
        self.0.reload(parse(filter)?).map_err(|e| e.to_string())
    }
}

/// Checks a log filter.
///
/// # Errors
/// Says what is wrong with it.
pub fn check_filter(filter: &str) -> Result<(), String> {
    parse(filter).map(|_| ())
}

fn parse(filter: &str) -> Result<EnvFilter, String> {
    EnvFilter::builder().parse(filter).map_err(|error| {
        format!("is not a log filter ({error}): want a level (error, warn, info, debug, trace) or a list such as info,disco::xds=debug")
    })
}

/// The metrics of this process. Cheap to clone; every name begins with `disco_`.
#[derive(Debug, Clone)]
pub struct Metrics {
    registry: Arc<Mutex<Registry>>,
    propagation: Family<[(&'static str, &'static str); 1], Histogram>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("disco");
        let propagation = Family::new_with_constructor(seconds as fn() -> Histogram);
        registry.register(
            "propagation_seconds",
            "How long a change took: stored (request to durable), published (durable to ready for proxies), \
             acknowledged (ready, or asked for, to a proxy's acknowledgement)",
            propagation.clone(),
        );
        Self { registry: Arc::new(Mutex::new(registry)), propagation }
    }
}

/// A stage of a change on its way from a request to the proxies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// From the request to the durable write.
    Stored,
    /// From there to resources that streams can send.
    Published,
    /// From there to the acknowledgement of one proxy.
    Acknowledged,
}

/// From 0.1 ms to about 26 s, each bound twice the one before.
fn seconds() -> Histogram {
    Histogram::new(exponential_buckets(0.0001, 2.0, 18))
}

impl Metrics {
    /// A counter.
    pub fn counter(&self, name: &str, help: &str) -> Counter {
        self.register(name, help, Counter::default())
    }

    /// A gauge.
    pub fn gauge(&self, name: &str, help: &str) -> Gauge {
        self.register(name, help, Gauge::default())
    }

    /// A histogram of seconds from 0.1 ms to about 26 s, each bound twice the one before.
    pub fn seconds(&self, name: &str, help: &str) -> Histogram {
        self.register(name, help, seconds())
    }

    /// One stage of the histogram `disco_propagation_seconds`.
    pub fn propagation(&self, stage: Stage) -> Histogram {
        let name = match stage {
            Stage::Stored => "stored",
            Stage::Published => "published",
            Stage::Acknowledged => "acknowledged",
        };
        self.propagation.get_or_create(&[("stage", name)]).clone()
    }

    /// Any metric; keep the returned handle.
    pub fn register<M: Metric + Clone>(&self, name: &str, help: &str, metric: M) -> M {
        self.registry().register(name, help, metric.clone());
        metric
    }

    /// Figures that are read when the metrics are asked for.
    pub fn collect(&self, collector: impl Collector) {
        self.registry().register_collector(Box::new(collector));
    }

    /// The OpenMetrics text of all metrics.
    pub fn text(&self) -> String {
        let mut out = String::new();
        // Writing to a string does not fail.
        let _ = text::encode(&mut out, &self.registry());
        out
    }

    fn registry(&self) -> std::sync::MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_checked() {
        for good in ["info", "warn,disco::xds=debug", "off"] {
            assert_eq!(check_filter(good), Ok(()), "{good}");
        }
        assert!(check_filter("disco=loud").unwrap_err().contains("want a level"));
    }

    #[test]
    fn metrics_are_written_as_text() {
        let metrics = Metrics::default();
        metrics.counter("writes", "Accepted changes").inc();
        metrics.seconds("ack_seconds", "To the ACK").observe(0.0015);
        metrics.propagation(Stage::Published).observe(0.0001);
        let text = metrics.text();
        let stage = "disco_propagation_seconds_bucket{le=\"0.0001\",stage=\"published\"} 1";
        assert!(text.contains(stage), "{text}");
        assert!(text.contains("disco_writes_total 1"), "{text}");
        assert!(text.contains("disco_ack_seconds_bucket{le=\"0.0016\"} 1"), "{text}");
    }
}
