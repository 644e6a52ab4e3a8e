use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use futures_util::future::BoxFuture;
use tokio::{sync::watch, time::Instant};

use super::*;
use crate::{
    catalog::{Change, Reader, Writer, catalog},
    model::{
        Check, Health, HealthReport, Incarnation, Instance, InstanceKey, Lease, Limits, Locality, Members,
        Problems, RawCheck, Revision, State, Verdict,
    },
    rt::{Shutdown, Tasks},
    telemetry::Metrics,
};

/// Instances by number: number `n` is on machine `n % machines`.
struct World {
    answers: Mutex<HashMap<usize, Outcome>>,
    asked: Mutex<Vec<(Instant, usize)>>,
    catalog: Mutex<Writer>,
    reader: Reader,
    reports: Mutex<Vec<(Duration, usize, Verdict)>>,
    /// Whether reports are taken.
    open: watch::Sender<bool>,
    start: Instant,
    machines: usize,
}

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("World")
    }
}

struct Scripted {
    world: Arc<World>,
    number: usize,
    limit: Duration,
}

impl Ask for Scripted {
    fn ask(&mut self) -> BoxFuture<'_, Outcome> {
        Box::pin(async {
            self.world.asked.lock().unwrap().push((Instant::now(), self.number));
            let answer = self.world.answers.lock().unwrap().get(&self.number).cloned();
            let answer = answer.unwrap_or(Outcome::Passed);
            if matches!(answer, Outcome::Silent(_)) {
                tokio::time::sleep(self.limit).await;
            }
            answer
        })
    }
}

#[derive(Debug)]
struct Scribe(Arc<World>);

impl Sink for Scribe {
    fn report(&self, reports: Vec<HealthReport>) -> BoxFuture<'static, Result<(), String>> {
        let world = Arc::clone(&self.0);
        Box::pin(async move {
            if !*world.open.borrow() {
                return Err("closed".to_owned());
            }
            for HealthReport { key, incarnation, verdict, .. } in reports {
                let number = key.id.as_str()[1..].parse().unwrap();
                world.reports.lock().unwrap().push((world.start.elapsed(), number, verdict));
                let passed = verdict.works() || world.health(number).passed;
                let unchecked = Health::unchecked(SystemTime::UNIX_EPOCH);
                world.apply(Change::PutHealth(key, incarnation, Health { verdict, passed, ..unchecked }));
            }
            Ok(())
        })
    }
}

fn key(number: usize) -> InstanceKey {
    InstanceKey { service: "s".parse().unwrap(), id: format!("i{number}").parse().unwrap() }
}

impl World {
    fn new(machines: usize) -> Arc<Self> {
        let (writer, reader) = catalog();
        Arc::new(Self {
            answers: Mutex::default(),
            asked: Mutex::default(),
            catalog: Mutex::new(writer),
            reader,
            reports: Mutex::default(),
            open: watch::Sender::new(true),
            start: Instant::now(),
            machines,
        })
    }

    fn apply(&self, change: Change) {
        let mut writer = self.catalog.lock().unwrap();
        let next = Revision(self.reader.latest().revision().0 + 1);
        writer.apply(next, vec![change]);
    }

    fn health(&self, number: usize) -> Health {
        self.reader.latest().instance(&key(number)).unwrap().health.clone()
    }

    /// Registers an instance whose last verdict is known.
    fn put(&self, number: usize, incarnation: u64, verdict: Verdict) {
        let raw = RawCheck { jitter: Some(0), ..RawCheck::default() };
        let check = Check::check_into(raw, &Limits::default(), &mut Problems::default());
        let unchecked = Health::unchecked(SystemTime::UNIX_EPOCH);
        self.apply(Change::PutInstance(Instance {
            owner: None,
            stale: None,
            damped: None,
            key: key(number),
            incarnation: Incarnation(incarnation),
            address: [10, 0, 0, u8::try_from(number % self.machines).unwrap()].into(),
            port: u16::try_from(number + 1).unwrap().try_into().unwrap(),
            locality: Locality::default(),
            weight: 1.try_into().unwrap(),
            metadata: BTreeMap::new(),
            state: State::Serving,
            check: check.map(Arc::new),
            health: Health { verdict, passed: verdict != Verdict::Unknown, ..unchecked },
            lease: Lease::Session,
            revision: Revision(1),
            registered_at: SystemTime::UNIX_EPOCH,
        }));
    }

    fn answer(&self, numbers: std::ops::Range<usize>, outcome: &Outcome) {
        let mut answers = self.answers.lock().unwrap();
        answers.extend(numbers.map(|number| (number, outcome.clone())));
    }

    fn checker(self: &Arc<Self>, tasks: &Tasks, duty: Duty) -> Monitor {
        let world = Arc::clone(self);
        let open = move |check: &crate::model::ServerCheck, address: SocketAddr| {
            let number = usize::from(address.port()) - 1;
            Box::new(Scripted { world: Arc::clone(&world), number, limit: check.timeout }) as Box<dyn Ask>
        };
        let sink = Arc::new(Scribe(Arc::clone(self)));
        let reader = self.reader.clone();
        let checker =
            Checker::with(Config::default(), reader, duty, sink, &Metrics::default(), Box::new(open));
        let monitor = checker.monitor();
        tasks.spawn_until_shutdown("checker", checker.run());
        monitor
    }

    /// The reports since the last look, by number, with the time of the last.
    fn news(&self) -> (BTreeMap<usize, Verdict>, Duration) {
        let reports = std::mem::take(&mut *self.reports.lock().unwrap());
        let last = reports.iter().map(|(at, ..)| *at).max().unwrap_or_default();
        (reports.into_iter().map(|(_, number, verdict)| (number, verdict)).collect(), last)
    }

    /// How often each was asked since the last look.
    fn asked(&self) -> BTreeMap<usize, usize> {
        let mut counts = BTreeMap::new();
        for (_, number) in std::mem::take(&mut *self.asked.lock().unwrap()) {
            *counts.entry(number).or_default() += 1;
        }
        counts
    }
}

fn refused() -> Outcome {
    Outcome::Failed("refused".to_owned())
}

fn silent() -> Outcome {
    Outcome::Silent("no answer".to_owned())
}

fn all(numbers: std::ops::Range<usize>, verdict: Verdict) -> BTreeMap<usize, Verdict> {
    numbers.map(|number| (number, verdict)).collect()
}

async fn seconds(n: f64) {
    tokio::time::sleep(Duration::from_secs_f64(n)).await;
}

#[tokio::test(start_paused = true)]
async fn first_results_come_at_once_and_changes_within_interval_and_timeout() {
    let (world, tasks) = (World::new(1), Tasks::new(Shutdown::default()));
    world.checker(&tasks, Duty::alone());
    for number in 0..100 {
        world.put(number, 1, Verdict::Unknown);
    }
    seconds(0.1).await;
    assert_eq!(world.news().0, all(0..100, Verdict::Healthy));

    let down = world.start.elapsed();
    world.answer(10..30, &refused());
    seconds(6.0).await;
    let (changed, last) = world.news();
    assert_eq!(changed, all(10..30, Verdict::Unhealthy));
    assert!(last - down <= Duration::from_secs(6), "{:?}", last - down);

    world.answer(10..30, &Outcome::Passed);
    seconds(11.0).await;
    assert_eq!(world.news().0, all(10..30, Verdict::Healthy));
    // Nothing is written while nothing changes.
    seconds(60.0).await;
    assert_eq!(world.news().0, BTreeMap::new());
    tasks.shutdown().start();
}

#[tokio::test(start_paused = true)]
async fn checks_come_at_their_pace_whatever_the_verdict() {
    let (world, tasks) = (World::new(1), Tasks::new(Shutdown::default()));
    world.put(0, 1, Verdict::Healthy);
    world.put(1, 1, Verdict::Unhealthy);
    world.answer(1..2, &refused());
    world.checker(&tasks, Duty::alone());
    seconds(100.0).await;
    let asked = world.asked();
    assert!(asked.values().all(|n| (19..=21).contains(n)), "{asked:?}");
    // What is removed, drains or is not checked any more is left alone, and a new run starts anew.
    world.apply(Change::RemoveInstance(key(0)));
    let instance = world.reader.latest().instance(&key(1)).unwrap().clone();
    world.apply(Change::PutInstance(Instance { state: State::Draining, ..(*instance).clone() }));
    seconds(1.0).await;
    world.asked();
    seconds(20.0).await;
    assert_eq!(world.asked(), BTreeMap::new());
    world.answer(1..2, &Outcome::Passed);
    world.put(1, 2, Verdict::Unknown);
    seconds(0.1).await;
    assert_eq!(world.news().0, all(1..2, Verdict::Healthy));
    tasks.shutdown().start();
}

#[tokio::test(start_paused = true)]
async fn a_checker_that_is_cut_off_condemns_nobody() {
    let (world, tasks) = (World::new(20), Tasks::new(Shutdown::default()));
    for number in 0..200 {
        world.put(number, 1, Verdict::Healthy);
    }
    let monitor = world.checker(&tasks, Duty::alone());
    seconds(10.0).await;
    world.answer(0..200, &silent());
    seconds(300.0).await;
    assert_eq!(world.news().0, BTreeMap::new());
    let status = monitor.status();
    assert!(status.suspended.is_some());
    assert_eq!((status.instances, status.machines, status.silent), (200, 20, 20));
    // What answers wrongly is seen: it is condemned all the same.
    world.answer(0..1, &refused());
    seconds(20.0).await;
    assert_eq!(world.news().0, all(0..1, Verdict::Unhealthy));

    // It is connected again; one machine stays silent, with its ten instances.
    world.answer(0..200, &Outcome::Passed);
    for number in (7..200).step_by(20) {
        world.answer(number..number + 1, &silent());
    }
    seconds(30.0).await;
    assert!(monitor.status().suspended.is_none());
    let mut want: BTreeMap<_, _> = (7..200).step_by(20).map(|number| (number, Verdict::Unhealthy)).collect();
    want.insert(0, Verdict::Healthy);
    assert_eq!(world.news().0, want);
    tasks.shutdown().start();
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_falls_silent_is_condemned_in_small_and_large_sets() {
    for machines in [1, 2, 3, 4, 50] {
        let (world, tasks) = (World::new(machines), Tasks::new(Shutdown::default()));
        for number in 0..machines {
            world.put(number, 1, Verdict::Healthy);
        }
        world.checker(&tasks, Duty::alone());
        seconds(10.0).await;
        let down = world.start.elapsed();
        world.answer(0..1, &silent());
        // Its time-out comes once for each check.
        seconds(5.0 + 3.0 * 1.0 + 1.0).await;
        let (changed, last) = world.news();
        assert_eq!(changed, all(0..1, Verdict::Unhealthy), "{machines} machines");
        assert!(last > down);
        tasks.shutdown().start();
    }
}

#[tokio::test(start_paused = true)]
async fn verdicts_wait_for_a_store_that_does_not_take_them() {
    let (world, tasks) = (World::new(1), Tasks::new(Shutdown::default()));
    world.put(0, 1, Verdict::Healthy);
    world.put(1, 1, Verdict::Healthy);
    world.checker(&tasks, Duty::alone());
    world.open.send_replace(false);
    world.answer(0..2, &refused());
    seconds(20.0).await;
    // One recovers meanwhile: only the other is news.
    world.answer(0..1, &Outcome::Passed);
    seconds(20.0).await;
    world.open.send_replace(true);
    seconds(2.0).await;
    assert_eq!(world.health(1).verdict, Verdict::Unhealthy);
    assert_eq!(world.health(0).verdict, Verdict::Healthy);
    tasks.shutdown().start();
}

#[tokio::test(start_paused = true)]
async fn each_instance_is_checked_by_one_node_and_moves_when_that_dies() {
    let (world, tasks) = (World::new(5), Tasks::new(Shutdown::default()));
    for number in 0..100 {
        world.put(number, 1, Verdict::Healthy);
    }
    let nodes = |own: &str, live: &[&str]| Members {
        own: own.parse().unwrap(),
        live: live.iter().map(|id| id.parse().unwrap()).collect(),
    };
    let (of_a, of_b) =
        (watch::Sender::new(nodes("a", &["a", "b"])), watch::Sender::new(nodes("b", &["a", "b"])));
    let dying = Tasks::new(Shutdown::default());
    let a = world.checker(&tasks, Duty::new(of_a.subscribe()));
    let b = world.checker(&dying, Duty::new(of_b.subscribe()));
    seconds(50.0).await;
    let asked = world.asked();
    assert_eq!(asked.len(), 100);
    assert!(asked.values().all(|n| (9..=11).contains(n)), "{asked:?}");
    let shares = (a.status().instances, b.status().instances);
    assert!(shares.0 + shares.1 == 100 && shares.0 > 30 && shares.1 > 30, "{shares:?}");

    dying.shutdown().start();
    world.answer(0..100, &refused());
    of_a.send_replace(nodes("a", &["a"]));
    // Those of the dead node, too, within an interval and a time-out.
    seconds(6.0).await;
    assert_eq!(world.news().0, all(0..100, Verdict::Unhealthy));
    assert_eq!(a.status().instances, 100);
    tasks.shutdown().start();
}
