//! Three Discos, three etcds, ten instances of the greeter, a proxy with callers, and somebody who registers all the time.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use rustix::process::Signal;
use serde_json::json;

use super::{INSTANCES, table::Row};
use crate::harness::{
    Client, Envoy, Greeter, Load, Network, Nodes, PATIENCE, Place, Process, eventually, free_port,
    request_within, sibling,
};

/// How an instance is kept registered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// By `disco run`; the process dies alone.
    Session,
    /// By `disco run`; both die.
    Orphan,
    /// By renewals.
    Ttl,
    /// By renewals with a long TTL, and checks by the server.
    Checked,
}

/// An instance that is not under `disco run`.
struct Plain {
    id: String,
    kind: Kind,
    port: u16,
    _process: Process,
}

/// How many are registered beside it, in so many services.
const REGISTRATIONS: usize = 10_000;
const SERVICES: usize = 100;
const QUICK: Duration = Duration::from_secs(2);

pub(super) struct World {
    folder: PathBuf,
    pub(super) nodes: Nodes,
    pub(super) network: Network,
    place: Place,
    runs: BTreeMap<String, Greeter>,
    plain: Vec<Plain>,
    next: usize,
    envoy: Envoy,
    load: Load,
    renewer: Renewer,
    writer: Writer,
}

impl World {
    pub(super) fn new(folder: &Path, network: Network) -> anyhow::Result<Self> {
        let nodes = Nodes::start_in(folder, "ha3", "", |name| {
            network.place(name).cloned().unwrap_or_else(|_| Place::here())
        })?;
        let place = network.place(INSTANCES)?.clone();
        let servers: Vec<_> = nodes.all.iter().map(|disco| disco.http).collect();
        let renewer = Renewer::start(servers.clone(), place.ip.to_string());
        let envoy = Envoy::start_with(&nodes.all[0], free_port()?, &["--upstream", "greeter"])?;
        let load = Load::start(&nodes.all[0], Client::Envoy(envoy.proxy))?;
        let mut world = Self {
            folder: folder.to_owned(),
            nodes,
            network,
            place,
            runs: BTreeMap::new(),
            plain: Vec::new(),
            next: 0,
            envoy,
            load,
            renewer,
            writer: Writer::start(servers),
        };
        world.replenish()?;
        world.load.wait_more(300)?;
        Ok(world)
    }

    /// Starts what is missing of six instances under `disco run`, two with a TTL, and two that are checked.
    fn replenish(&mut self) -> anyhow::Result<()> {
        while self.runs.len() < 6 {
            self.next += 1;
            let id = format!("s{}", self.next);
            let disco = &self.nodes.all[self.next % self.nodes.all.len()];
            self.runs.insert(id.clone(), Greeter::start_at(disco, &id, "", &self.place)?);
        }
        for kind in [Kind::Ttl, Kind::Checked] {
            while self.plain.iter().filter(|plain| plain.kind == kind).count() < 2 {
                self.next += 1;
                let (id, port) = (format!("p{}", self.next), free_port()?);
                let mut command = self.place.command(sibling("examples/greeter-server")?);
                command.args(["--address", &self.place.ip.to_string(), "--port", &port.to_string()]);
                command.env("DISCO_INSTANCE", &id);
                let process = Process::start(&id, &self.folder, &mut command)?;
                let address = SocketAddr::new(self.place.ip, port);
                eventually("a greeter", PATIENCE, || std::net::TcpStream::connect(address).ok())?;
                self.renewer.keep(&format!("greeter/instances/{id}"), port, kind);
                self.plain.push(Plain { id, kind, port, _process: process });
            }
        }
        self.wait_whole()
    }

    fn expected(&self) -> BTreeSet<String> {
        self.runs.keys().cloned().chain(self.plain.iter().map(|plain| plain.id.clone())).collect()
    }

    /// Waits until every node shows exactly the instances that there are, none of them stale, and the proxy calls all.
    fn wait_whole(&self) -> anyhow::Result<()> {
        self.nodes.etcd.wait_well()?;
        let wanted = self.expected();
        let mut seen = String::new();
        let whole = eventually("all that lives, at every node and in the proxy", 2 * PATIENCE, || {
            for disco in &self.nodes.all {
                let answer = disco.get("/v1/services/greeter/instances");
                seen = format!("{}: {answer:?}", disco.name());
                let answer = answer.ok()?;
                let instances = answer["instances"].as_array()?;
                let ids: BTreeSet<_> =
                    instances.iter().filter_map(|it| it["id"].as_str().map(str::to_owned)).collect();
                let held = instances.iter().any(|it| it.get("stale").is_some());
                if ids != wanted || held || !answer["stale"].is_null() {
                    return None;
                }
            }
            let hosts = self.envoy.hosts("greeter");
            seen = format!("the proxy: {hosts:?}");
            (hosts.ok()?.len() == wanted.len()).then_some(())
        });
        whole.with_context(|| format!("wanted {wanted:?}; {seen}"))?;
        self.nodes.wait_ready()?;
        eventually("a proxy that has everything", PATIENCE, || {
            self.nodes.all.iter().find_map(|disco| {
                let proxies = disco.get("/v1/proxies").ok()?;
                proxies["proxies"].as_array()?.iter().find(|proxy| proxy["synced"] == true).map(|_| ())
            })
        })
    }

    /// Does something to it that kills no instance, and waits until everything is as it was.
    pub(super) fn fault(&mut self, what: &str, act: impl FnOnce(&mut Self) -> anyhow::Result<()>) -> Row {
        self.measure(what, |world, row| {
            act(world)?;
            let end = Instant::now();
            world.wait_whole()?;
            row.seconds = end.elapsed().as_secs_f64();
            Ok(())
        })
    }

    fn measure(&mut self, what: &str, act: impl FnOnce(&mut Self, &mut Row) -> anyhow::Result<()>) -> Row {
        let mut row = Row { fault: what.to_owned(), ..Row::default() };
        row.skipped = std::env::var("DISCO_CHAOS").is_ok_and(|wanted| !what.contains(&wanted));
        if row.skipped {
            return row;
        }
        let result = self.measured(&mut row, act);
        row.problem = result.err().map(|error| format!("{error:#}"));
        row
    }

    fn measured(
        &mut self,
        row: &mut Row,
        act: impl FnOnce(&mut Self, &mut Row) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let (calls, updates, removals) = (self.load.stats(), self.updates()?, self.removals()?);
        let living = self.expected();
        let result = act(self, row);
        let end = self.load.wait_more(100);
        let stats = self.load.stats();
        row.calls = stats.ok + stats.failed - calls.ok - calls.failed;
        (row.failed, row.resumed) = (stats.failed - calls.failed, stats.resumed - calls.resumed);
        if row.failed > 0 {
            row.note = format!("{:?}", stats.errors);
        }
        row.responses = self.updates()? - updates;
        row.lost = self.writer.lost(self.nodes.all[0].http)?;
        let still = self.expected();
        for (id, lines) in self.removals()? {
            let before = removals.get(&id).map_or(0, Vec::len);
            if living.contains(&id) && still.contains(&id) && lines.len() > before {
                row.removed += 1;
                row.evidence.extend(lines.into_iter().skip(before));
            }
        }
        result.and(end)
    }

    fn updates(&self) -> anyhow::Result<u64> {
        Ok(self.envoy.updates()?.values().sum())
    }

    /// What the history says of each removal that nobody asked for.
    fn removals(&self) -> anyhow::Result<BTreeMap<String, Vec<String>>> {
        let output =
            self.nodes.all[0].command()?.args(["service", "history", "greeter", "-o", "jsonl"]).output()?;
        let mut removals: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for line in String::from_utf8(output.stdout)?.lines() {
            let entry: serde_json::Value = serde_json::from_str(line)?;
            let what = entry["what"].as_str().unwrap_or_default();
            if let Some(id) = entry["id"].as_str()
                && ["expired", "hung up", "session closed"].contains(&what)
            {
                removals
                    .entry(id.to_owned())
                    .or_default()
                    .push(format!("{}: {id} {what}: {}", entry["at"], entry["why"]));
            }
        }
        Ok(removals)
    }

    /// Kills one instance of each kind at once, sees how long calls still go there, and starts others.
    pub(super) fn deaths(&mut self, what: &str, kinds: &[Kind]) -> Row {
        self.measure(what, |world, row| {
            let hosts = world.addresses()?;
            let mut dying: Vec<(String, Dying)> = Vec::new();
            for kind in kinds {
                match kind {
                    Kind::Session | Kind::Orphan => {
                        let (id, greeter) = world.runs.pop_first().context("no instance")?;
                        dying.push((id, Dying::Run(greeter, *kind)));
                    }
                    Kind::Ttl | Kind::Checked => {
                        let found = world.plain.iter().position(|plain| plain.kind == *kind);
                        let plain = world.plain.remove(found.context("no instance")?);
                        dying.push((plain.id.clone(), Dying::Plain(plain)));
                    }
                }
            }
            let victims: BTreeSet<_> = dying.iter().filter_map(|(id, _)| hosts.get(id).cloned()).collect();
            let start = Instant::now();
            let mut dead = Vec::new();
            for (id, dying) in dying {
                match dying {
                    Dying::Run(greeter, Kind::Session) => {
                        greeter.crash()?;
                        dead.push(greeter);
                    }
                    Dying::Run(greeter, _) => drop(greeter),
                    Dying::Plain(plain) => {
                        if plain.kind == Kind::Ttl {
                            world.renewer.forget(&format!("greeter/instances/{id}"));
                        }
                        drop(plain);
                    }
                }
            }
            let ids: BTreeSet<_> = hosts.keys().filter(|id| !world.expected().contains(*id)).collect();
            eventually("the end of the dead, for Disco and for the proxy", PATIENCE, || {
                if row.left.is_none() && world.envoy.hosts("greeter").ok()?.is_disjoint(&victims) {
                    row.left = Some(start.elapsed().as_secs_f64());
                }
                if row.known.is_none() && !world.counted(&ids).ok()? {
                    row.known = Some(start.elapsed().as_secs_f64());
                }
                row.left.and(row.known)
            })?;
            row.seconds = start.elapsed().as_secs_f64();
            // One that is checked stays registered as unhealthy, until somebody removes it.
            for id in hosts.keys().filter(|id| !world.expected().contains(*id)) {
                let path = format!("greeter/instances/{id}");
                world.renewer.forget(&path);
                let _ = world.nodes.all[0].request("DELETE", &format!("/v1/services/{path}"), b"");
            }
            world.replenish()
        })
    }

    /// Whether Disco counts one of them as alive.
    fn counted(&self, ids: &BTreeSet<&String>) -> anyhow::Result<bool> {
        let read = self.nodes.all[0].get("/v1/services/greeter/instances")?;
        let instances = read["instances"].as_array().context("no instances")?;
        let alive = instances.iter().filter(|it| it["health"]["verdict"] != "unhealthy");
        Ok(alive.filter_map(|it| it["id"].as_str()).any(|id| ids.iter().any(|gone| *gone == id)))
    }

    /// The address of each instance.
    fn addresses(&self) -> anyhow::Result<BTreeMap<String, String>> {
        let read = self.nodes.all[0].get("/v1/services/greeter/instances")?;
        let instances = read["instances"].as_array().context("no instances")?;
        let pair = |it: &serde_json::Value| {
            Some((it["id"].as_str()?.to_owned(), format!("{}:{}", it["address"].as_str()?, it["port"])))
        };
        Ok(instances.iter().filter_map(pair).collect())
    }

    /// Stops or continues all renewals and every `disco run`; the processes themselves go on.
    pub(super) fn freeze_owners(&self, silent: bool) -> anyhow::Result<()> {
        self.renewer.paused.store(silent, Ordering::Relaxed);
        let signal = if silent { Signal::STOP } else { Signal::CONT };
        self.runs.values().try_for_each(|greeter| greeter.signal(signal))
    }

    /// Twelve instances of another service with a TTL of 3 s: their renewals stop, they themselves do not.
    pub(super) fn unrenewed(&mut self) -> Row {
        let mut row = self.fault("all renewals of a service stop for 15 s, its processes live", |world| {
            let port = world.plain.first().context("no instance")?.port;
            let paths: Vec<_> = (0..12).map(|n| format!("payments/instances/t{n}")).collect();
            paths.iter().for_each(|path| world.renewer.keep(path, port, Kind::Ttl));
            world.wait_payments(12, 0)?;
            world.renewer.paused.store(true, Ordering::Relaxed);
            let held = world.wait_payments(12, 12);
            thread::sleep(super::FAULT);
            let still = world.wait_payments(12, 12);
            world.renewer.paused.store(false, Ordering::Relaxed);
            held.and(still)?;
            world.wait_payments(12, 0)?;
            paths.iter().for_each(|path| world.renewer.forget(path));
            Ok(())
        });
        if row.problem.is_none() {
            row.note = "12 of 12 held".to_owned();
        }
        row
    }

    fn wait_payments(&self, all: usize, held: usize) -> anyhow::Result<()> {
        let mut seen = String::new();
        let done = eventually(&format!("{all} instances, {held} of them held"), PATIENCE, || {
            let read = self.nodes.all[0].get("/v1/services/payments/instances").ok()?;
            seen = read.to_string();
            let instances = read["instances"].as_array()?;
            let stale = instances.iter().filter(|it| it.get("stale").is_some()).count();
            (instances.len() == all && stale == held).then_some(())
        });
        done.context(seen)
    }

    /// Waits for the last registration, looks for all of them, and ends. Returns how many there were.
    pub(super) fn finish(self) -> anyhow::Result<usize> {
        eventually("the last registration", 4 * PATIENCE, || {
            self.writer.hurry.store(true, Ordering::Relaxed);
            (self.writer.accepted().len() >= REGISTRATIONS).then_some(())
        })?;
        for disco in &self.nodes.all {
            let lost = self.writer.lost(disco.http)?;
            anyhow::ensure!(lost == 0, "{} has lost {lost} registrations", disco.name());
        }
        Ok(self.writer.accepted().len())
    }
}

enum Dying {
    Run(Greeter, Kind),
    Plain(Plain),
}

/// Renews leases, at whichever node answers.
struct Renewer {
    kept: Arc<Mutex<BTreeMap<String, (u16, Kind)>>>,
    paused: Arc<AtomicBool>,
    ended: Arc<AtomicBool>,
}

impl Renewer {
    fn start(servers: Vec<SocketAddr>, address: String) -> Self {
        let kept = Arc::new(Mutex::new(BTreeMap::<String, (u16, Kind)>::new()));
        let (paused, ended) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let (of_thread, pause, end) = (Arc::clone(&kept), Arc::clone(&paused), Arc::clone(&ended));
        thread::spawn(move || {
            let mut first = 0;
            while !end.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_millis(500));
                if pause.load(Ordering::Relaxed) {
                    continue;
                }
                let all = of_thread.lock().unwrap_or_else(PoisonError::into_inner).clone();
                for (path, (port, kind)) in all {
                    let body = match kind {
                        Kind::Checked => json!({"address": address, "port": port, "ttl": "1h",
                                                "health": {"kind": "grpc", "interval": "1s", "timeout": "500ms"}}),
                        _ => json!({"address": address, "port": port, "ttl": "3s"}),
                    };
                    let path = format!("/v1/services/{path}");
                    // The same server as long as it answers: a lease is counted there.
                    for _ in 0..servers.len() {
                        let body = body.to_string();
                        let answer = request_within(
                            QUICK / 2,
                            servers[first % servers.len()],
                            "PUT",
                            &path,
                            body.as_bytes(),
                        );
                        if answer.is_ok_and(|answer| answer.status == 200) {
                            break;
                        }
                        first += 1;
                    }
                }
            }
        });
        Self { kept, paused, ended }
    }

    /// `path` is that of the instance under `/v1/services/`.
    fn keep(&self, path: &str, port: u16, kind: Kind) {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).insert(path.to_owned(), (port, kind));
    }

    fn forget(&self, path: &str) {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).remove(path);
    }
}

impl Drop for Renewer {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
    }
}

/// Registers instances of many services, one after the other, and remembers which were accepted.
struct Writer {
    accepted: Arc<Mutex<Vec<usize>>>,
    hurry: Arc<AtomicBool>,
    ended: Arc<AtomicBool>,
}

impl Writer {
    fn start(servers: Vec<SocketAddr>) -> Self {
        let accepted = Arc::new(Mutex::new(Vec::new()));
        let (hurry, ended) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let (of_thread, fast, end) = (Arc::clone(&accepted), Arc::clone(&hurry), Arc::clone(&ended));
        thread::spawn(move || {
            let body = br#"{"address": "10.77.0.200", "port": 9, "ttl": "1h"}"#;
            let mut n = 0;
            while !end.load(Ordering::Relaxed) {
                if of_thread.lock().unwrap_or_else(PoisonError::into_inner).len() >= REGISTRATIONS {
                    return;
                }
                let pause = if fast.load(Ordering::Relaxed) { 0 } else { 25 };
                thread::sleep(Duration::from_millis(pause));
                let path = format!("/v1/services/load-{}/instances/i{n}", n % SERVICES);
                let server = servers[n % servers.len()];
                let answer = request_within(QUICK, server, "PUT", &path, body);
                if answer.is_ok_and(|answer| answer.status == 200) {
                    of_thread.lock().unwrap_or_else(PoisonError::into_inner).push(n);
                }
                n += 1;
            }
        });
        Self { accepted, hurry, ended }
    }

    fn accepted(&self) -> Vec<usize> {
        self.accepted.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How many that were accepted until now are not there.
    fn lost(&self, server: SocketAddr) -> anyhow::Result<usize> {
        let accepted = self.accepted();
        let mut there = BTreeSet::new();
        for service in 0..SERVICES {
            let path = format!("/v1/services/load-{service}/instances");
            let answer = request_within(PATIENCE, server, "GET", &path, b"")?;
            if answer.status == 200 {
                let read = answer.json()?;
                let ids = read["instances"].as_array().context("no instances")?;
                there.extend(
                    ids.iter().filter_map(|it| it["id"].as_str()?.strip_prefix('i')?.parse::<usize>().ok()),
                );
            }
        }
        Ok(accepted.iter().filter(|n| !there.contains(n)).count())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
    }
}
