use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
    sync::Arc,
    time::Duration,
};

use envoy_types::pb::{
    envoy::config::{core::v3 as core, endpoint::v3::ClusterStats},
    google::protobuf,
};

use crate::{model::Locality, xds::Node};

/// Drop categories that are told apart within one service's part of a report; the rest counts as [`OTHER`].
const CATEGORIES: usize = 16;

/// The longest category that is kept, in bytes.
const CATEGORY_BYTES: usize = 64;

/// Drops without a category, e.g. those of circuit breakers.
const OTHER: &str = "other";

/// A report over more than this is taken for an odd one and does not count longer for it.
const LONGEST: Duration = Duration::from_secs(3600);

/// What reports may be about.
pub trait Reportable: fmt::Debug + Send + Sync + 'static {
    /// The shared name of a service, if there is one of this name.
    fn service(&self, name: &str) -> Option<Arc<str>>;
    /// Where the instances of a service run.
    fn localities(&self, service: &str) -> HashSet<Locality>;
    /// The services that a client's reports may concern, for clients that must be told them one by one.
    fn wanted(&self, node: &Node) -> Vec<String>;
}

/// The calls of a service, by where they went.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Load {
    /// By the locality of the instances that took them.
    pub localities: BTreeMap<Locality, Traffic>,
    /// Calls a second that clients dropped on purpose, by category.
    pub drops: BTreeMap<String, f64>,
}

/// The calls to a locality.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Traffic {
    /// Clients that say so.
    pub reporters: usize,
    /// Calls sent a second, each retry as one.
    pub calls: f64,
    /// Failures a second. Envoy counts also those that found no connection, which were not sent.
    pub errors: f64,
    /// Calls under way when the clients last said so.
    pub in_progress: u64,
}

impl Load {
    /// Adds what others report.
    pub(super) fn add(&mut self, other: &Self) {
        for (locality, traffic) in &other.localities {
            let sum = self.localities.entry(locality.clone()).or_default();
            sum.reporters += traffic.reporters;
            sum.add_calls(traffic);
        }
        for (category, rate) in &other.drops {
            *self.drops.entry(category.clone()).or_default() += rate;
        }
    }

    /// Counts `rate` drops a second.
    fn drop(&mut self, category: &str, rate: f64) {
        let kept = category.len() <= CATEGORY_BYTES && !category.is_empty();
        let room = self.drops.len() < CATEGORIES || self.drops.contains_key(category);
        let category = if kept && room { category } else { OTHER };
        *self.drops.entry(category.to_owned()).or_default() += rate;
    }
}

impl Traffic {
    fn add_calls(&mut self, other: &Self) {
        self.calls += other.calls;
        self.errors += other.errors;
        self.in_progress = self.in_progress.saturating_add(other.in_progress);
    }
}

/// What one client reported last.
#[derive(Debug, Clone, Default)]
pub(super) struct Report {
    pub(super) services: HashMap<Arc<str>, Load>,
    /// The longest time that a part of it is over.
    pub(super) interval: Duration,
}

impl Report {
    /// Reads a report. Counters are of the time since the last one, over which the client itself says how long it was (rule C3);
    /// where it does not, it is taken to be `asked`. What was known to `before` needs no second look.
    pub(super) fn read(
        stats: &[ClusterStats],
        asked: Duration,
        known: &dyn Reportable,
        before: &Self,
    ) -> Self {
        let mut report = Self { services: HashMap::new(), interval: asked };
        let mut places: HashMap<Arc<str>, HashSet<Locality>> = HashMap::new();
        for cluster in stats {
            // Rule C3: clusters may share a service.
            let name = match cluster.cluster_service_name.as_str() {
                "" => &cluster.cluster_name,
                name => name,
            };
            let Some(service) = known.service(name) else { continue };
            let interval = cluster.load_report_interval.as_ref().and_then(duration).unwrap_or(asked);
            report.interval = report.interval.max(interval.min(LONGEST));
            let a_second = |count: u64| rate(count, interval);

            let load = report.services.entry(Arc::clone(&service)).or_default();
            let had = before.services.get(&service);
            for stats in &cluster.upstream_locality_stats {
                let locality = locality(stats.locality.as_ref());
                let in_use = had.is_some_and(|had| had.localities.contains_key(&locality))
                    || places
                        .entry(Arc::clone(&service))
                        .or_insert_with(|| known.localities(&service))
                        .contains(&locality);
                if !in_use {
                    continue;
                }
                let sum = load.localities.entry(locality).or_default();
                sum.reporters = 1;
                sum.add_calls(&Traffic {
                    reporters: 1,
                    calls: a_second(stats.total_issued_requests),
                    errors: a_second(stats.total_error_requests),
                    in_progress: stats.total_requests_in_progress,
                });
            }
            let mut rest = cluster.total_dropped_requests;
            for dropped in &cluster.dropped_requests {
                rest = rest.saturating_sub(dropped.dropped_count);
                if dropped.dropped_count > 0 {
                    load.drop(&dropped.category, a_second(dropped.dropped_count));
                }
            }
            if rest > 0 {
                load.drop(OTHER, a_second(rest));
            }
        }
        report
    }
}

fn locality(message: Option<&core::Locality>) -> Locality {
    message.map_or_else(Locality::default, |message| Locality {
        region: message.region.as_str().into(),
        zone: message.zone.as_str().into(),
        sub_zone: message.sub_zone.as_str().into(),
    })
}

/// Nothing that is not longer than zero: no rate can be told from that.
fn duration(message: &protobuf::Duration) -> Option<Duration> {
    let whole = Duration::from_secs(u64::try_from(message.seconds).ok()?);
    let duration = whole.checked_add(Duration::from_nanos(u64::try_from(message.nanos).ok()?))?;
    (!duration.is_zero()).then_some(duration)
}

#[allow(clippy::cast_precision_loss, reason = "counts of calls are far below 2^52")]
fn rate(count: u64, interval: Duration) -> f64 {
    count as f64 / interval.as_secs_f64()
}
