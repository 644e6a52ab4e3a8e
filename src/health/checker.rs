use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap},
    fmt,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures_util::{FutureExt as _, StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use prometheus_client::metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram};
use tokio::{sync::watch, time::Instant};

use super::{
    duty::Duty,
    machine::Machine,
    probe::{Ask, Network, Outcome, Prober},
    reach::{Judgement, Reach},
};
use crate::{
    catalog::{Changes, Reader, Snapshot},
    model::{Check, HealthReport, Incarnation, Instance, InstanceKey, ServerCheck, State, Verdict},
    rt,
    telemetry::Metrics,
};

/// Where verdicts go.
pub trait Sink: Send + Sync + fmt::Debug + 'static {
    /// Makes these verdicts known and durable. The error is for the log; all are reported again.
    fn report(&self, reports: Vec<HealthReport>) -> BoxFuture<'static, Result<(), String>>;
}

/// Settings of a checker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Checks under way at the same time.
    pub concurrency: usize,
    /// When so many percent of the machines are silent, silence condemns nobody.
    pub suspend_share: u8,
    /// Connections that are kept from one check to the next.
    pub connections: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self { concurrency: 512, suspend_share: 50, connections: 20_000 }
    }
}

/// What a checker is doing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Status {
    /// Instances that it checks.
    pub instances: usize,
    /// Machines that they are on.
    pub machines: usize,
    /// Machines of which nothing came back at last.
    pub silent: usize,
    /// Since when silence condemns nobody, because too many machines are silent.
    pub suspended: Option<SystemTime>,
}

/// Tells what a checker is doing. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Monitor(watch::Receiver<Status>);

/// That of a checker that does nothing.
impl Default for Monitor {
    fn default() -> Self {
        Self(watch::channel(Status::default()).1)
    }
}

impl Monitor {
    /// What it is doing now.
    pub fn status(&self) -> Status {
        self.0.borrow().clone()
    }
}

/// Shortest pause between a bad result and the next check, while the verdict is in doubt.
const PAUSE: Duration = Duration::from_millis(20);

/// Pause before verdicts that could not be reported are reported again.
const AGAIN: Duration = Duration::from_secs(1);

/// How often the log says that checks cannot be made.
const COMPLAIN: Duration = Duration::from_secs(30);

/// A connection is kept when it is used at least this often.
const KEEP: Duration = Duration::from_secs(60);

/// Makes what asks a target.
pub(super) type Open = Box<dyn Fn(&ServerCheck, SocketAddr) -> Box<dyn Ask> + Send>;

/// Checks the instances of the catalog that are this node's to check.
pub struct Checker {
    config: Config,
    catalog: Reader,
    duty: Duty,
    sink: Arc<dyn Sink>,
    open: Open,
    metrics: CheckMetrics,
    status: watch::Sender<Status>,

    targets: HashMap<u64, Target>,
    by_key: HashMap<InstanceKey, u64>,
    next_id: u64,
    /// When each target is due. An entry that does not say the same as its target is stale.
    queue: BinaryHeap<Reverse<(Instant, u64)>>,
    running: FuturesUnordered<BoxFuture<'static, Done>>,
    reach: Reach,
    /// Verdicts to be reported, and those that are under way.
    pending: HashMap<InstanceKey, HealthReport>,
    reporting: Option<BoxFuture<'static, (Vec<HealthReport>, bool)>>,
    /// Nothing is reported before.
    report_from: Instant,
    complained: Option<Instant>,
}

impl fmt::Debug for Checker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checker").field("config", &self.config).finish_non_exhaustive()
    }
}

struct Target {
    key: InstanceKey,
    incarnation: Incarnation,
    check: ServerCheck,
    address: SocketAddr,
    machine: Machine,
    reason: String,
    /// Away while a check is under way.
    ask: Option<Box<dyn Ask>>,
    due: Instant,
    /// When the first of the silent checks in a row began.
    silent_since: Option<Instant>,
}

struct Done {
    id: u64,
    ask: Box<dyn Ask>,
    began: Instant,
    outcome: Outcome,
}

#[derive(Debug)]
struct CheckMetrics {
    checks: Family<[(&'static str, &'static str); 1], Counter>,
    seconds: Histogram,
    changes: Family<[(&'static str, &'static str); 1], Counter>,
    suspended: Gauge,
    instances: Gauge,
}

impl CheckMetrics {
    fn new(metrics: &Metrics) -> Self {
        Self {
            checks: metrics.register("health_checks", "Health checks by result", Family::default()),
            seconds: metrics.seconds("health_check_seconds", "How long health checks took"),
            changes: metrics.register(
                "health_verdicts",
                "Changes of verdicts by what came of them",
                Family::default(),
            ),
            suspended: metrics.gauge(
                "health_suspended",
                "1 while so many machines are silent that silence makes no instance unhealthy",
            ),
            instances: metrics.gauge("health_instances", "Instances that this node checks"),
        }
    }
}

impl Checker {
    /// A checker that asks over the network. It does nothing before it [runs](Self::run).
    pub fn new(
        config: Config,
        catalog: Reader,
        duty: Duty,
        sink: Arc<dyn Sink>,
        metrics: &Metrics,
        tasks: &rt::Tasks,
    ) -> Self {
        let keeping = Network::new(tasks.clone(), config.connections);
        let fresh = Network::new(tasks.clone(), 0);
        let open = move |check: &ServerCheck, address| {
            let network = if check.interval <= KEEP { &keeping } else { &fresh };
            let prober = Prober::new(network.clone(), check.probe.clone(), address, check.timeout);
            Box::new(prober) as Box<dyn Ask>
        };
        Self::with(config, catalog, duty, sink, metrics, Box::new(open))
    }

    pub(super) fn with(
        config: Config,
        catalog: Reader,
        duty: Duty,
        sink: Arc<dyn Sink>,
        metrics: &Metrics,
        open: Open,
    ) -> Self {
        Self {
            reach: Reach::new(config.suspend_share),
            config,
            catalog,
            duty,
            sink,
            open,
            metrics: CheckMetrics::new(metrics),
            status: watch::Sender::default(),
            targets: HashMap::new(),
            by_key: HashMap::new(),
            next_id: 0,
            queue: BinaryHeap::new(),
            running: FuturesUnordered::new(),
            pending: HashMap::new(),
            reporting: None,
            report_from: Instant::now(),
            complained: None,
        }
    }

    /// Tells what it is doing.
    pub fn monitor(&self) -> Monitor {
        Monitor(self.status.subscribe())
    }

    /// Checks until the catalog is gone.
    pub async fn run(mut self) {
        let mut duty = self.duty.clone();
        let snapshot = self.catalog.latest();
        let mut seen = snapshot.revision();
        self.follow(&snapshot, &Changes::Resync);
        loop {
            self.start_due();
            self.start_report();
            self.show();
            let catalog = self.catalog.clone();
            let due = self.queue.peek().map(|Reverse((at, _))| *at);
            let room = self.running.len() < self.config.concurrency;
            tokio::select! {
                newer = catalog.newer_than(seen) => {
                    let Some((snapshot, changes)) = newer else { return };
                    seen = snapshot.revision();
                    self.follow(&snapshot, &changes);
                }
                () = duty.changed() => {
                    let snapshot = self.catalog.latest();
                    self.follow(&snapshot, &Changes::Resync);
                }
                Some(done) = self.running.next() => {
                    self.done(done);
                    while let Some(Some(done)) = self.running.next().now_or_never() {
                        self.done(done);
                    }
                }
                Some((reports, accepted)) = next(&mut self.reporting) => self.reported(reports, accepted),
                () = tokio::time::sleep_until(self.report_from), if self.is_held() => {}
                () = sleep_until(due), if room => {}
            }
        }
    }

    /// Takes in what changed in the catalog, or the whole of it.
    fn follow(&mut self, snapshot: &Snapshot, changes: &Changes) {
        match changes {
            Changes::Touched(touched) => {
                for (service, id) in touched {
                    match id {
                        Some(id) => {
                            let key = InstanceKey { service: service.clone(), id: id.clone() };
                            self.consider(&key, snapshot.instance(&key).map(AsRef::as_ref));
                        }
                        // Its instances go with it.
                        None if snapshot.service(service).is_none() => self.forget_missing(snapshot),
                        None => {}
                    }
                }
            }
            Changes::Resync => {
                self.forget_missing(snapshot);
                for instance in snapshot.services().flat_map(|service| service.instances()) {
                    self.consider(&instance.key, Some(instance));
                }
            }
        }
    }

    fn forget_missing(&mut self, snapshot: &Snapshot) {
        let gone: Vec<_> =
            self.by_key.keys().filter(|key| snapshot.instance(key).is_none()).cloned().collect();
        gone.iter().for_each(|key| self.forget(key));
    }

    /// Checks the instance from now on, goes on to, or stops.
    fn consider(&mut self, key: &InstanceKey, instance: Option<&Instance>) {
        // Who drains takes no calls any more, whatever the verdict.
        let wanted = instance
            .filter(|instance| instance.state == State::Serving && self.duty.mine(key))
            .and_then(|instance| match instance.check.as_deref() {
                Some(Check::Server(check)) => Some((instance, check)),
                Some(Check::Owner) | None => None,
            });
        let Some((instance, check)) = wanted else { return self.forget(key) };
        let address = SocketAddr::new(instance.address, check.port.unwrap_or(instance.port).into());
        if let Some(target) = self.by_key.get(key).and_then(|id| self.targets.get(id))
            && (target.incarnation, target.address, &target.check) == (instance.incarnation, address, check)
        {
            // Somebody who checked it before wrote late, say.
            let verdict = target.machine.verdict();
            if verdict != instance.health.verdict && verdict != Verdict::Unknown {
                let report = target.report();
                self.pending.entry(key.clone()).or_insert(report);
            }
            return;
        }
        self.forget(key);
        let id = self.next_id;
        self.next_id += 1;
        let health = &instance.health;
        let target = Target {
            key: key.clone(),
            incarnation: instance.incarnation,
            check: check.clone(),
            address,
            machine: Machine::new(
                check.healthy_threshold.get(),
                check.unhealthy_threshold.get(),
                check.interval,
                health.verdict,
                health.passed && health.verdict != Verdict::Unknown,
            ),
            reason: health.reason.to_string(),
            ask: Some((self.open)(check, address)),
            due: Instant::now(),
            silent_since: None,
        };
        self.reach.add(address.ip(), id);
        self.targets.insert(id, target);
        self.by_key.insert(key.clone(), id);
        // Proxies wait for the first result. Who has a verdict is checked in step with the others of its interval.
        let first = match instance.health.verdict {
            Verdict::Unknown => Duration::ZERO,
            _ => check.interval.mul_f64(fastrand::f64()),
        };
        self.schedule(id, Instant::now() + first);
    }

    fn forget(&mut self, key: &InstanceKey) {
        self.pending.remove(key);
        let Some(id) = self.by_key.remove(key) else { return };
        if let Some(target) = self.targets.remove(&id) {
            self.reach.remove(target.address.ip(), id);
        }
    }

    fn schedule(&mut self, id: u64, at: Instant) {
        if let Some(target) = self.targets.get_mut(&id) {
            target.due = at;
            self.queue.push(Reverse((at, id)));
        }
    }

    fn start_due(&mut self) {
        let now = Instant::now();
        while self.running.len() < self.config.concurrency
            && let Some(Reverse((at, id))) = self.queue.peek().copied()
            && at <= now
        {
            self.queue.pop();
            let Some(target) = self.targets.get_mut(&id).filter(|target| target.due == at) else { continue };
            let Some(mut ask) = target.ask.take() else { continue };
            self.running.push(Box::pin(async move {
                let began = Instant::now();
                let outcome = ask.ask().await;
                Done { id, ask, began, outcome }
            }));
        }
    }

    fn done(&mut self, Done { id, ask, began, outcome }: Done) {
        let now = Instant::now();
        self.metrics.seconds.observe((now - began).as_secs_f64());
        let name = match &outcome {
            Outcome::Passed => "passed",
            Outcome::Degraded(_) => "degraded",
            Outcome::Failed(_) => "failed",
            Outcome::Silent(_) => "silent",
            Outcome::NotAsked(_) => "not_asked",
        };
        self.metrics.checks.get_or_create(&[("result", name)]).inc();
        if let Outcome::NotAsked(reason) = &outcome
            && self.complained.is_none_or(|last| last.elapsed() >= COMPLAIN)
        {
            self.complained = Some(now);
            tracing::error!(%reason, "health checks cannot be made; verdicts stay as they are");
        }
        let Some(target) = self.targets.get_mut(&id) else { return };
        target.ask = Some(ask);
        let Some(seen) = outcome.verdict() else {
            let at = now + target.check.interval;
            return self.schedule(id, at);
        };

        let silent = matches!(outcome, Outcome::Silent(_));
        let host = target.address.ip();
        self.reach.note(host, began, silent);
        target.silent_since = if silent { target.silent_since.or(Some(began)) } else { None };
        let mut verdict = target.machine.observe(seen, now);
        let mut witnesses = Vec::new();
        if verdict == Some(Verdict::Unhealthy)
            && let Some(since) = target.silent_since
        {
            match self.reach.judge(host, since) {
                Judgement::Condemn => {}
                Judgement::Suspend => verdict = None,
                Judgement::Ask(targets) => (verdict, witnesses) = (None, targets),
            }
        }
        if let Some(verdict) = verdict {
            self.accept(id, verdict, outcome, now);
        }
        for witness in witnesses.into_iter().filter(|witness| *witness != id) {
            if self.targets.get(&witness).is_some_and(|target| target.ask.is_some()) {
                self.schedule(witness, now);
            }
        }
        let Some(target) = self.targets.get(&id) else { return };
        let next = match target.machine.doubts() && !self.reach.suspended() {
            true => now + confirm_after(&target.check),
            false => (began + next_after(&target.check)).max(now),
        };
        self.schedule(id, next);
    }

    fn accept(&mut self, id: u64, verdict: Verdict, outcome: Outcome, now: Instant) {
        let Some(target) = self.targets.get_mut(&id) else { return };
        let before = target.machine.verdict();
        let flapped = target.machine.flaps(now);
        target.machine.accept(verdict, now);
        let seen = match outcome {
            Outcome::Passed => format!("{} passed", target.check.probe),
            other => format!("{}: {}", target.check.probe, other.seen()),
        };
        target.reason = match flapped || target.machine.flaps(now) {
            true => format!("{seen} (it flaps: twice as many checks have to pass)"),
            false => seen,
        };
        tracing::info!(instance = %target.key, %before, %verdict, reason = %target.reason, "health changed");
        self.metrics.changes.get_or_create(&[("verdict", verdict.name())]).inc();
        self.pending.insert(target.key.clone(), target.report());
    }

    fn is_held(&self) -> bool {
        self.reporting.is_none() && !self.pending.is_empty()
    }

    fn start_report(&mut self) {
        if !self.is_held() || Instant::now() < self.report_from {
            return;
        }
        let reports: Vec<_> = self.pending.drain().map(|(_, report)| report).collect();
        let sink = Arc::clone(&self.sink);
        self.reporting = Some(Box::pin(async move {
            let accepted = sink.report(reports.clone()).await;
            if let Err(error) = &accepted {
                tracing::warn!(%error, verdicts = reports.len(), "verdicts could not be written; trying again");
            }
            (reports, accepted.is_ok())
        }));
    }

    fn reported(&mut self, reports: Vec<HealthReport>, accepted: bool) {
        if accepted {
            return;
        }
        self.report_from = Instant::now() + AGAIN;
        for report in reports {
            // What it is by now, and only while it is ours to say.
            if let Some(target) = self.by_key.get(&report.key).and_then(|id| self.targets.get(id)) {
                let report = target.report();
                self.pending.entry(report.key.clone()).or_insert(report);
            }
        }
    }

    fn show(&self) {
        let (silent, machines) = self.reach.counts();
        let suspended = self.reach.suspended();
        let (instances, share) = (self.targets.len(), self.config.suspend_share);
        self.status.send_if_modified(|status| {
            let before = status.clone();
            if suspended && before.suspended.is_none() {
                tracing::warn!(
                    silent,
                    machines,
                    "nothing comes back from {share} % of the machines or more: this node may be cut off, so silence makes no \
                     instance unhealthy until fewer are silent"
                );
            } else if !suspended && before.suspended.is_some() {
                tracing::warn!(silent, machines, "enough machines answer again: silence counts against instances again");
            }
            *status = Status {
                instances,
                machines,
                silent,
                suspended: suspended.then(|| before.suspended.unwrap_or_else(rt::now)),
            };
            *status != before
        });
        self.metrics.suspended.set(suspended.into());
        self.metrics.instances.set(i64::try_from(instances).unwrap_or(i64::MAX));
    }
}

impl Target {
    fn report(&self) -> HealthReport {
        HealthReport {
            key: self.key.clone(),
            incarnation: self.incarnation,
            verdict: self.machine.verdict(),
            reason: self.reason.clone(),
        }
    }
}

/// To the next check, if all is as expected: the interval, less the jitter.
fn next_after(check: &ServerCheck) -> Duration {
    check.interval.mul_f64(1.0 - f64::from(check.jitter) / 100.0 * fastrand::f64())
}

/// To the next check, if the last was bad: soon, so that an instance that refuses is condemned within its interval and its
/// time-out, whatever its threshold.
fn confirm_after(check: &ServerCheck) -> Duration {
    (check.timeout / check.unhealthy_threshold.get() / 2).clamp(PAUSE.min(check.interval), check.interval)
}

/// Cancel-safe: what is under way stays until it is done.
async fn next<T>(slot: &mut Option<BoxFuture<'static, T>>) -> Option<T> {
    let result = match slot {
        Some(running) => running.await,
        None => return None,
    };
    *slot = None;
    Some(result)
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
