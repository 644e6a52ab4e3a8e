//! Peer sets with the real databases: who founds, who leads, what happens when a leader dies, freezes or returns.

mod etcd;
mod nats;
mod postgres;
mod redis;
mod takeover;

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{bail, ensure};
use serde_json::{Value, json};

use crate::harness::{Disco, PATIENCE, eventually, free_port, request_within};

/// A peer set that Disco keeps.
#[derive(Debug, Clone)]
pub(crate) struct Set {
    name: &'static str,
    http: SocketAddr,
}

impl Set {
    pub(crate) fn create(disco: &Disco, name: &'static str, spec: &Value) -> anyhow::Result<Self> {
        let set = Self { name, http: disco.http };
        set.send("PUT", "", spec)?;
        Ok(set)
    }

    fn send(&self, method: &str, path: &str, body: &Value) -> anyhow::Result<Value> {
        let path = format!("/v1/peers/{}{path}", self.name);
        let answer = request_within(PATIENCE, self.http, method, &path, body.to_string().as_bytes())?;
        ensure!(answer.status == 200, "{method} {path}: {} {}", answer.status, answer.body);
        answer.json()
    }

    /// Registers a replica, and as an instance, as `disco run` would.
    pub(crate) fn add(
        &self,
        key: &str,
        raft: SocketAddr,
        client: SocketAddr,
        ports: Value,
    ) -> anyhow::Result<Value> {
        let body = json!({"disk": format!("disk of {key}"), "raft": raft.to_string(), "client": client.to_string(), "ports": ports});
        let registered = self.send("PUT", &format!("/peers/{key}"), &body)?;
        self.lease(key, client, "10m")?;
        Ok(registered)
    }

    pub(crate) fn lease(&self, key: &str, client: SocketAddr, ttl: &str) -> anyhow::Result<()> {
        let body = json!({"address": client.ip().to_string(), "port": client.port(), "ttl": ttl});
        let path = format!("/v1/services/{}/instances/{key}", self.name);
        let answer = request_within(PATIENCE, self.http, "PUT", &path, body.to_string().as_bytes())?;
        ensure!(answer.status == 200, "{path}: {} {}", answer.status, answer.body);
        Ok(())
    }

    /// What Disco knows of it, once it is founded.
    pub(crate) fn view(&self) -> anyhow::Result<Value> {
        let path = format!("/v1/peers/{}?wait=30s", self.name);
        let answer = request_within(PATIENCE * 2, self.http, "GET", &path, b"")?;
        ensure!(answer.status == 200, "{path}: {} {}", answer.status, answer.body);
        answer.json()
    }

    pub(crate) fn leader(&self) -> Option<String> {
        self.view().ok()?["leader"].as_str().map(str::to_owned)
    }

    /// Waits for a leader of which that is true.
    pub(crate) fn wait_leader(
        &self,
        what: &str,
        is: impl Fn(Option<&str>) -> bool,
    ) -> anyhow::Result<Option<String>> {
        eventually(what, PATIENCE, || {
            let view = self.view().ok()?;
            let leader = view["leader"].as_str();
            is(leader).then(|| leader.map(str::to_owned))
        })
        .map_err(|error| {
            error.context(self.view().map_or_else(|error| error.to_string(), |view| view.to_string()))
        })
    }

    /// What it says of a replica.
    pub(crate) fn peer(&self, key: &str) -> anyhow::Result<Value> {
        let view = self.view()?;
        let peers = view["peers"].as_array().into_iter().flatten();
        let Some(peer) = peers.into_iter().find(|peer| peer["key"] == key) else { bail!("no {key}: {view}") };
        Ok(peer.clone())
    }

    /// Waits until a replica has the role.
    pub(crate) fn wait_role(&self, key: &str, role: &str) -> anyhow::Result<()> {
        eventually(&format!("role {role} of {key}"), PATIENCE, || {
            (self.peer(key).ok()?["role"] == role).then_some(())
        })
        .map_err(|error| {
            error.context(self.view().map_or_else(|error| error.to_string(), |view| view.to_string()))
        })
    }

    /// Writes down who leads, whenever that changes, until told to stop.
    pub(crate) fn record(&self) -> Record {
        let (stop, seen) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::<Reign>::new())));
        let (set, stopped, reigns) = (self.clone(), Arc::clone(&stop), Arc::clone(&seen));
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_millis(2));
                let Ok(view) = set.view() else { continue };
                let (leader, term) = (view["leader"].as_str().map(str::to_owned), view["term"].as_u64());
                let mut reigns = reigns.lock().unwrap_or_else(PoisonError::into_inner);
                if reigns.last().is_none_or(|last| last.leader != leader) {
                    reigns.push(Reign { leader, term: term.unwrap_or(0), at: Instant::now() });
                }
            }
        });
        Record { stop, seen, thread: Some(thread) }
    }
}

/// Who led, from a moment on.
#[derive(Debug, Clone)]
pub(crate) struct Reign {
    pub(crate) leader: Option<String>,
    pub(crate) term: u64,
    pub(crate) at: Instant,
}

/// Writes down who leads.
#[derive(Debug)]
pub(crate) struct Record {
    stop: Arc<AtomicBool>,
    seen: Arc<Mutex<Vec<Reign>>>,
    thread: Option<JoinHandle<()>>,
}

impl Record {
    pub(crate) fn reigns(&self) -> Vec<Reign> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Checks that terms never fell (rule N7).
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        let reigns = self.reigns();
        ensure!(reigns.windows(2).all(|pair| pair[0].term <= pair[1].term), "a term fell: {reigns:?}");
        Ok(())
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

pub(crate) fn loopback() -> anyhow::Result<SocketAddr> {
    Ok(([127, 0, 0, 1], free_port()?).into())
}

/// Tries until it works, every few milliseconds; when it did.
pub(crate) fn first_success(bound: Duration, mut attempt: impl FnMut() -> bool) -> anyhow::Result<Instant> {
    let end = Instant::now() + bound;
    while Instant::now() < end {
        if attempt() {
            return Ok(Instant::now());
        }
        thread::sleep(Duration::from_millis(2));
    }
    bail!("nothing worked within {bound:?}")
}
