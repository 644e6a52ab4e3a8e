use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use crate::{
    model::{Problems, excerpt},
    peers::Observe,
};

/// Shortest time between two questions to one replica, also while there is no leader.
pub(super) const FAST: Duration = Duration::from_millis(20);

/// Longest time between two questions to one replica.
const SLOWEST: Duration = Duration::from_secs(60);

/// Most sentinels.
const MOST_SENTINELS: usize = 15;

/// The language that the replicas of a set are asked in. Everything is asked without TLS and without credentials.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Adapter {
    /// etcd's HTTP gateway, at the client address: `/v3/maintenance/status`, and once a second `/v3/cluster/member/list`.
    Etcd,
    /// `ROLE` of each instance, and what a majority of the sentinels says of the master called `master`: its address and its
    /// configuration epoch, which is the term. Without a majority nobody leads.
    Redis {
        /// The name that the sentinels monitor it by.
        master: String,
        /// Where they are; when empty, one beside each replica, at its address called `sentinel`.
        sentinels: Vec<SocketAddr>,
    },
    /// Patroni's `GET /cluster`; the timeline is the term.
    Patroni,
    /// `GET /raftz` of a NATS server (from 2.10.23 on) about the meta group of JetStream. Servers are called as the replicas.
    Nats,
    /// openraft's metrics as JSON, at a path.
    OpenRaft {
        /// Such as `/metrics`.
        path: String,
    },
    /// `GET` of a path: status 200 means leader, any other follower. A JSON object with a `role` says more: `term`, `leader`
    /// (a node number), `applied`, `config_index`, `digest`.
    Http {
        /// Such as `/leader`.
        path: String,
    },
    /// `grpc.health.v1`: a service that is serving means leader.
    Grpc {
        /// Such as `leader`.
        service: String,
    },
}

const NAMES: &str = "etcd, redis, patroni, nats, openraft, http or grpc";

impl Adapter {
    /// Which one is meant, with its options.
    ///
    /// # Errors
    /// All that is wrong.
    pub fn of(observe: &Observe) -> Result<Self, Problems> {
        let mut problems = Problems::default();
        let mut options = Options { left: observe.options.clone(), problems: &mut problems };
        let adapter = match observe.adapter.as_str() {
            "etcd" => Some(Self::Etcd),
            "patroni" => Some(Self::Patroni),
            "nats" => Some(Self::Nats),
            "redis" => Some(options.redis()),
            "openraft" => Some(Self::OpenRaft { path: options.path("/metrics") }),
            "http" => Some(Self::Http { path: options.path("/leader") }),
            "grpc" => Some(Self::Grpc { service: options.text("service", "leader") }),
            other => {
                let message = format!("{} is not a way to ask: want {NAMES}", excerpt(other));
                options.problems.add("observe.adapter", message);
                options.left.clear();
                None
            }
        };
        for name in options.left.keys() {
            let message = format!("{} is no option of {}", excerpt(name), observe.adapter);
            options.problems.add("observe.options", message);
        }
        if !(FAST..=SLOWEST).contains(&observe.every) {
            problems.add("observe.every", "want 20ms to 60s");
        }
        match adapter {
            Some(adapter) if problems.is_empty() => Ok(adapter),
            _ => Err(problems),
        }
    }
}

impl Observe {
    /// Notes all that is wrong with it.
    pub fn check(&self, problems: &mut Problems) {
        if let Err(found) = Adapter::of(self) {
            problems.0.extend(found.0);
        }
    }

    /// How long one question may take.
    pub(super) fn limit(&self) -> Duration {
        self.every.clamp(Duration::from_millis(300), SLOWEST)
    }
}

struct Options<'a> {
    left: BTreeMap<String, String>,
    problems: &'a mut Problems,
}

impl Options<'_> {
    fn text(&mut self, name: &str, default: &str) -> String {
        let text = self.left.remove(name).unwrap_or_else(|| default.to_owned());
        if text.len() > 256 || !text.bytes().all(|b| b.is_ascii_graphic()) {
            self.problems.add(
                format!("observe.options.{name}"),
                "want at most 256 visible ASCII characters without spaces",
            );
        }
        text
    }

    fn path(&mut self, default: &str) -> String {
        let path = self.text("path", default);
        if !path.starts_with('/') || path.parse::<::http::uri::PathAndQuery>().is_err() {
            self.problems
                .add("observe.options.path", format!("{} is no path: want /something", excerpt(&path)));
        }
        path
    }

    fn redis(&mut self) -> Adapter {
        let master = self.text("master", "");
        if master.is_empty() {
            self.problems.add(
                "observe.options.master",
                "is missing: want the name that the sentinels monitor it by (sentinel monitor NAME …)",
            );
        }
        let given = self.left.remove("sentinels").unwrap_or_default();
        let mut sentinels: Vec<SocketAddr> = Vec::new();
        for text in given.split(',').map(str::trim).filter(|text| !text.is_empty()) {
            match text.parse() {
                Ok(at) if !sentinels.contains(&at) => sentinels.push(at),
                Ok(at) => self.problems.add("observe.options.sentinels", format!("{at} is there twice")),
                Err(_) => {
                    self.problems.add("observe.options.sentinels", format!("{} is no IP:PORT", excerpt(text)))
                }
            }
        }
        if sentinels.len() > MOST_SENTINELS {
            self.problems.add(
                "observe.options.sentinels",
                format!("{} are too many: want at most 15", sentinels.len()),
            );
        }
        Adapter::Redis { master, sentinels }
    }
}
