//! What a replicated service is called by: its leader, its followers, any of them. What the replicas say of themselves comes in over the
//! API, and is seen at the other end by real Envoys and a real gRPC client.

use std::{
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};

use crate::harness::{Client, Disco, Envoy, Greeter, Load, PATIENCE, eventually, free_port, request, scene};

/// The longest that a connection to an old leader may live.
const CUT: Duration = Duration::from_millis(2500);

/// How soon whoever calls nobody is to know.
const AT_ONCE: Duration = Duration::from_millis(100);

/// The peer set of a service: what the replicas say of themselves.
struct Replicas<'a> {
    disco: &'a Disco,
    service: &'a str,
    keys: [&'a str; 3],
    term: u64,
    leader: Option<&'a str>,
}

impl<'a> Replicas<'a> {
    fn found(disco: &'a Disco, service: &'a str, keys: [&'a str; 3]) -> anyhow::Result<Self> {
        let all = Self { disco, service, keys, term: 1, leader: None };
        all.send("PUT", "", &json!({"kind": "generic", "expect": 3}))?;
        for (n, key) in (1..).zip(keys) {
            let at = format!("10.0.0.{n}:1");
            all.send("PUT", &format!("/peers/{key}"), &json!({"disk": key, "raft": at, "client": at}))?;
        }
        for key in keys {
            all.report(key, "follower")?;
        }
        Ok(all)
    }

    /// This one has won an election, and the one before knows.
    fn elect(&mut self, leader: &'a str) -> anyhow::Result<()> {
        self.term += 1;
        self.report(leader, "leader")?;
        if let Some(before) = self.leader.replace(leader) {
            self.report(before, "follower")?;
        }
        Ok(())
    }

    /// The leader has stepped down, and nobody is elected.
    fn depose(&mut self) -> anyhow::Result<()> {
        self.leader.take().map_or(Ok(()), |leader| self.report(leader, "follower"))
    }

    fn report(&self, key: &str, role: &str) -> anyhow::Result<()> {
        self.send("POST", &format!("/peers/{key}/report"), &json!({"role": role, "term": self.term}))
    }

    fn send(&self, method: &str, path: &str, body: &Value) -> anyhow::Result<()> {
        let path = format!("/v1/peers/{}{path}", self.service);
        let answer = self.disco.request(method, &path, body.to_string().as_bytes())?;
        ensure!(answer.status == 200, "{method} {path}: {answer:?}");
        Ok(())
    }

    /// The roles of the instances, by id.
    fn shown(&self) -> anyhow::Result<Vec<String>> {
        let answer = self.disco.get(&format!("/v1/services/{}/instances", self.service))?;
        let instances = answer["instances"].as_array().context("no instances")?;
        let role = |instance: &Value| format!("{}:{}", instance["id"], instance["role"]).replace('"', "");
        Ok(instances.iter().map(role).collect())
    }

    fn followers(&self) -> Vec<&'a str> {
        self.keys.into_iter().filter(|key| self.leader != Some(*key)).collect()
    }
}

/// Answers each byte with the name.
fn serve_tcp(name: &'static str) -> anyhow::Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    thread::spawn(move || {
        for mut connection in listener.incoming().map_while(Result::ok) {
            thread::spawn(move || {
                let mut byte = [0];
                while connection.read_exact(&mut byte).is_ok()
                    && connection.write_all(name.as_bytes()).is_ok()
                {}
            });
        }
    });
    Ok(port)
}

/// A connection through Envoy, on which whoever has it says its name, of one letter.
struct Connection(TcpStream);

impl Connection {
    fn open(port: u16) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&SocketAddr::from(([127, 0, 0, 1], port)), PATIENCE)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self(stream))
    }

    /// Who has it; `None` when it is closed.
    fn ask(&mut self) -> Option<String> {
        let mut letter = [0];
        let answered = self.0.write_all(b"?").and_then(|()| self.0.read_exact(&mut letter));
        answered.ok().map(|()| String::from_utf8_lossy(&letter).into_owned())
    }
}

fn ask(port: u16) -> Option<String> {
    Connection::open(port).ok()?.ask()
}

fn tcp_connections_follow_the_leader(flags: &[&str]) {
    scene(|folder| {
        let disco = Disco::start(folder)?;
        for name in ["a", "b", "c"] {
            let body = json!({"address": "127.0.0.1", "port": serve_tcp(name)?, "ttl": "10m"}).to_string();
            let path = format!("/v1/services/db/instances/{name}");
            let answer = disco.request("PUT", &path, body.as_bytes())?;
            ensure!(answer.status == 200, "{answer:?}");
        }
        let mut db = Replicas::found(&disco, "db", ["a", "b", "c"])?;
        db.elect("a")?;
        let [leader, followers, all, nobody] = [free_port()?, free_port()?, free_port()?, free_port()?];
        let ports = [("db.leader", leader), ("db.followers", followers), ("db", all), ("later", nobody)];
        let ports: Vec<_> = ports.iter().map(|(name, port)| format!("--tcp={name}={port}")).collect();
        let flags: Vec<_> = flags.iter().copied().chain(ports.iter().map(String::as_str)).collect();
        let envoy = Envoy::start_with(&disco, free_port()?, &flags)?;
        eventually("the leader", PATIENCE, || (ask(leader)? == "a").then_some(()))?;
        eventually("followers", PATIENCE, || matches!(&*ask(followers)?, "b" | "c").then_some(()))?;
        ensure!(ask(nobody).is_none(), "somebody answers for a service that there is not");

        let mut kept = Connection::open(followers)?;
        let reads_from = kept.ask().context("no follower")?;
        let mut http = KeptAlive::open(envoy.proxy)?;
        ensure!(http.get("nobody")? == 503);
        for next in ["b", "c", "a"] {
            let mut old = Connection::open(leader)?;
            let before = old.ask().context("no leader")?;
            let mut idle = Connection::open(leader)?;
            idle.ask().context("no leader")?;
            let changed = Instant::now();
            db.elect(next)?;
            let mut there = false;
            while old.ask().is_some() {
                let now = ask(leader);
                there |= now.as_deref() == Some(next);
                // The endpoints change before the listener does: a connection that is opened in between is cut once.
                ensure!(
                    now.is_none()
                        || there && now.as_deref() == Some(next)
                        || !there && now.as_deref() == Some(&before),
                    "a new connection went to {now:?} on the way from {before} to {next}"
                );
                ensure!(changed.elapsed() < CUT, "{before} still has a connection though {next} leads");
            }
            ensure!(idle.0.read(&mut [0]).map_or(true, |read| read == 0), "a quiet one is cut, too");
            ensure!(changed.elapsed() < CUT, "{before} still had a connection");
            eventually("the new leader", PATIENCE, || (ask(leader)? == next).then_some(()))?;
        }

        // Who has none is told so at once, and it is not somebody else.
        let mut old = Connection::open(leader)?;
        old.ask().context("no leader")?;
        db.depose()?;
        let cut = eventually("cut connection", CUT, || old.ask().is_none().then_some(()));
        cut.context("a leader that is none has a connection")?;
        eventually("end of the leader", PATIENCE, || ask(leader).is_none().then_some(()))?;
        let refused = (0..5).map(|_| {
            let start = Instant::now();
            (ask(leader), start.elapsed())
        });
        let refused: Vec<_> = refused.collect();
        ensure!(refused.iter().all(|(who, _)| who.is_none()), "{refused:?}");
        // One of them, on a machine that is busy with other things.
        ensure!(refused.iter().any(|(_, took)| *took < AT_ONCE), "{refused:?}");

        // What had no part in it noticed nothing.
        ensure!(kept.ask() == Some(reads_from), "a connection to a follower was cut");
        ensure!(http.get("nobody")? == 503, "a connection for HTTP was cut");
        ensure!(ask(all).is_some());
        Ok(())
    });
}

#[test]
fn tcp_connections_follow_the_leader_by_delta() {
    tcp_connections_follow_the_leader(&[]);
}

#[test]
fn tcp_connections_follow_the_leader_by_sotw() {
    tcp_connections_follow_the_leader(&["--sotw"]);
}

#[test]
fn tcp_connections_follow_the_leader_on_demand() {
    tcp_connections_follow_the_leader(&["--on-demand", "--upstream", "db", "--upstream", "later"]);
}

/// An HTTP/1.1 connection that is used again.
struct KeptAlive(BufReader<TcpStream>);

impl KeptAlive {
    fn open(proxy: SocketAddr) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(proxy)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self(BufReader::new(stream)))
    }

    /// The status of an answer.
    fn get(&mut self, host: &str) -> anyhow::Result<u16> {
        self.0.get_mut().write_all(format!("GET / HTTP/1.1\r\nhost: {host}\r\n\r\n").as_bytes())?;
        let mut line = String::new();
        self.0.read_line(&mut line)?;
        let status = line.split(' ').nth(1).and_then(|status| status.parse().ok());
        let mut length = 0;
        while !line.trim().is_empty() {
            line.clear();
            self.0.read_line(&mut line)?;
            let value = line.to_ascii_lowercase().strip_prefix("content-length:").map(|it| it.trim().parse());
            length = value.transpose()?.unwrap_or(length);
        }
        self.0.read_exact(&mut vec![0; length])?;
        status.context("not an HTTP answer")
    }
}

#[test]
fn calls_through_envoy_go_to_the_leader_and_to_no_other() {
    scene(|folder| {
        let disco = Disco::start(folder)?;
        let keys = ["g1", "g2", "g3"];
        let _greeters = keys.map(|id| Greeter::start(&disco, id).unwrap());
        disco.wait_serving(&keys)?;
        let mut db = Replicas::found(&disco, "greeter", keys)?;
        db.elect("g1")?;
        // It is told of the leader only, and the other of everything.
        let scoped = Envoy::start_with(&disco, free_port()?, &["--upstream", "greeter.leader"])?;
        let envoy = Envoy::start_with(&disco, free_port()?, &["--on-demand"])?;
        let says = |envoy: &Envoy, name: &str| anyhow::Ok(envoy.call(name)?.ok());
        let by = |answer: &Option<String>| {
            answer.as_ref().and_then(|text| text.trim().rsplit(' ').next().map(str::to_owned))
        };
        for next in ["g2", "g3"] {
            db.elect(next)?;
            for envoy in [&envoy, &scoped] {
                eventually(&format!("calls to {next}"), PATIENCE, || {
                    (by(&says(envoy, "greeter.leader").ok()?).as_deref() == Some(next)).then_some(())
                })?;
                for _ in 0..5 {
                    let answer = says(envoy, "greeter.leader")?;
                    ensure!(by(&answer).as_deref() == Some(next), "{answer:?}");
                }
            }
            let followers = db.followers();
            for _ in 0..10 {
                let answer = by(&says(&envoy, "greeter.followers")?).context("no follower answers")?;
                ensure!(followers.contains(&answer.as_str()), "{answer} is none of {followers:?}");
            }
            ensure!(says(&envoy, "greeter.any")?.is_some() && says(&envoy, "greeter")?.is_some());
        }
        ensure!(db.shown()? == ["g1:follower", "g2:follower", "g3:leader"], "{:?}", db.shown());
        let clusters = scoped.clusters()?;
        ensure!(clusters.contains("greeter.leader") && !clusters.contains("greeter"), "{clusters:?}");
        ensure!(says(&scoped, "greeter")?.is_none(), "it is told of the leader only");

        // The leader is the leader while it drains.
        let drained = disco.command()?.args(["instance", "drain", "greeter/g3"]).output()?;
        ensure!(drained.status.success(), "{drained:?}");
        ensure!(by(&says(&scoped, "greeter.leader")?).as_deref() == Some("g3"));
        let explained = disco.command()?.args(["instance", "explain", "greeter/g3"]).output()?;
        let explained = String::from_utf8_lossy(&explained.stdout).into_owned();
        ensure!(explained.contains("as greeter.leader") && explained.contains("leader\n"), "{explained}");

        db.depose()?;
        eventually("end of the leader", PATIENCE, || {
            says(&scoped, "greeter.leader").ok()?.is_none().then_some(())
        })?;
        for envoy in [&scoped, &envoy] {
            let mut http = KeptAlive::open(envoy.proxy)?;
            http.get("greeter.leader")?;
            let took: Vec<_> = (0..5)
                .map(|_| {
                    let start = Instant::now();
                    ensure!(http.get("greeter.leader")? == 503);
                    Ok(start.elapsed())
                })
                .collect::<anyhow::Result<_>>()?;
            ensure!(took.iter().any(|took| *took < AT_ONCE), "{took:?}");
        }
        // Nobody else may take the name.
        let path = "/v1/services/greeter.leader/instances/x";
        let taken = disco.request("PUT", path, br#"{"address": "127.0.0.1", "port": 1}"#)?;
        ensure!(taken.status == 409 && taken.body.contains("replicated"), "{taken:?}");
        let shown = disco.command()?.args(["service", "show", "greeter"]).output()?;
        let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
        ensure!(shown.contains("none now, term 4") && shown.contains("ROLE"), "{shown}");
        Ok(())
    });
}

#[test]
fn a_change_of_roles_is_one_of_two_small_clusters() {
    scene(|folder| {
        let disco = Disco::start(folder)?;
        for name in ["a", "b", "c"] {
            let path = format!("/v1/services/db/instances/{name}");
            let body = json!({"address": "127.0.0.1", "port": serve_tcp(name)?, "ttl": "10m"}).to_string();
            ensure!(disco.request("PUT", &path, body.as_bytes())?.status == 200);
        }
        let mut db = Replicas::found(&disco, "db", ["a", "b", "c"])?;
        db.elect("a")?;
        let envoy = Envoy::start_with(&disco, free_port()?, &[])?;
        let hosts = |cluster: &str| envoy.hosts(cluster).map(|hosts| hosts.len()).unwrap_or_default();
        eventually("all hosts", PATIENCE, || {
            (hosts("db.leader") == 1 && hosts("db.followers") == 2).then_some(())
        })?;
        let before = envoy.updates()?;
        let leader = envoy.hosts("db.leader")?;
        db.elect("b")?;
        eventually("another leader", PATIENCE, || {
            let now = envoy.hosts("db.leader").ok()?;
            (now.len() == 1 && now != leader && hosts("db.followers") == 2).then_some(())
        })?;
        let after = envoy.updates()?;
        let changed = after.iter().filter(|(name, count)| before.get(*name) != Some(count));
        let changed: Vec<_> = changed.map(|(name, _)| name.as_str()).collect();
        ensure!(
            changed == ["cluster.db.followers.update_success", "cluster.db.leader.update_success"],
            "{changed:?}"
        );
        // Whoever is told of the leader counts as concerned, though nothing of `db` itself is new.
        let revision = disco.get("/v1/services/db")?["revision"].clone();
        let progress = disco.get(&format!("/v1/revisions/{revision}?wait=10s"))?;
        ensure!(progress["complete"] == true && progress["acknowledged"] == 1, "{progress}");
        // It belongs to the peer set now.
        let removed = disco.request("DELETE", "/v1/services/db", b"")?;
        ensure!(removed.status == 409 && removed.body.contains("peer set"), "{removed:?}");
        let stats = request(envoy.admin, "GET", "/stats?filter=listener_modified", b"")?.body;
        ensure!(stats.trim().ends_with(": 0"), "{stats}");
        Ok(())
    });
}

#[test]
fn a_grpc_client_follows_the_leader() {
    scene(|folder| {
        let disco = Disco::start(folder)?;
        let keys = ["g1", "g2", "g3"];
        let _greeters = keys.map(|id| Greeter::start(&disco, id).unwrap());
        disco.wait_serving(&keys)?;
        let mut db = Replicas::found(&disco, "greeter", keys)?;
        db.elect("g1")?;
        let load = Load::start_fail_fast(&disco, Client::Python, "greeter.leader")?;
        load.wait_until("calls to g1", |stats| stats.of("g1") > 20)?;
        ensure!(load.stats().of("g2") + load.stats().of("g3") == 0, "{:?}", load.stats());
        db.elect("g2")?;
        load.wait_until("calls to g2", |stats| stats.of("g2") > 20)?;
        let before = load.stats();
        load.wait_until("further calls to g2", |stats| stats.of("g2") > before.of("g2") + 50)?;
        let after = load.stats();
        // Those under way when it was counted.
        ensure!(after.of("g1") <= before.of("g1") + 8 && after.of("g3") == 0, "{before:?} {after:?}");

        db.depose()?;
        load.wait_until("failed calls", |stats| stats.failed > before.failed + 20)?;
        let (start, before) = (Instant::now(), load.stats());
        load.wait_until("further failed calls", |stats| stats.failed > before.failed + 100)?;
        // Eight callers, each with one call at a time.
        ensure!(start.elapsed() < AT_ONCE * 100 / 8 + Duration::from_secs(2), "{:?}", start.elapsed());
        let errors = load.stats().errors;
        ensure!(errors.keys().all(|error| error.starts_with("UNAVAILABLE")), "{errors:?}");
        db.elect("g3")?;
        load.wait_until("calls to g3", |stats| stats.of("g3") > 20)?;
        load.stop()?;
        Ok(())
    });
}
