//! `disco run --peer-set`: a replica of a database gets its number and its list before it is started.
//!
//! What it was told is kept on its own disk, so that it starts again when no server answers. A replica that was told nothing yet
//! does not start then: alone it would found another database.

use std::{
    collections::BTreeMap,
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use http::Method;
use ring::rand::{SecureRandom as _, SystemRandom};
use serde_json::{Value, json};
use tokio::{sync::mpsc, time::Instant};

use crate::{
    cli::{
        Failure,
        files::{Present, write_whole},
        peers::{Asked, ListFile, Text, Written, fetch, is_passing, on_change},
    },
    client::{Http, HttpError},
    model::{InstanceId, Problems, Registration, Revision, ServiceId, excerpt},
    peers::render::Format,
    rt::Backoff,
};

/// How long a question waits at the server.
const POLL: Duration = Duration::from_secs(5);

/// For how long servers are looked for before a replica starts from its files, and before one that has none gives up.
const LOOK: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(4));

/// Pauses while no server answers: the first, and the longest.
const PAUSE: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(1));

/// In the data directory: what the disk is marked with.
const MARK: &str = "disco-disk";

/// In the data directory: what the replica was told, in the format `env`.
const TOLD: &str = "disco-peers.env";

/// What the command is told of that.
const VARIABLES: [&str; 11] = [
    "DISCO_PEER_SET",
    "DISCO_CLUSTER_ID",
    "DISCO_CLUSTER_NUMBER",
    "DISCO_PEERS_DIGEST",
    "DISCO_NODE_ID",
    "DISCO_PEER_KEY",
    "DISCO_PEER_BIRTH",
    "DISCO_PEER_ORDINAL",
    "DISCO_PEER_ADDR",
    "DISCO_PEER_CLIENT_ADDR",
    "DISCO_PEERS",
];

/// For replicas of databases.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Replicas of databases")]
pub(super) struct ReplicaArgs {
    /// Run it as a replica of this peer set: it is started when its list is there
    #[arg(long, value_name = "SET", conflicts_with = "service", requires_all = ["raft_port", "data_dir"])]
    pub(super) peer_set: Option<String>,
    /// The port that the other replicas reach it at
    #[arg(long, value_name = "PORT", requires = "peer_set")]
    pub(super) raft_port: Option<u16>,
    /// A directory on the replica's disk, to be emptied with it: marks the disk and keeps what the replica was told
    #[arg(long, value_name = "DIR", requires = "peer_set")]
    data_dir: Option<PathBuf>,
    /// A further port of it, by what it is for; may be given several times
    #[arg(long, value_name = "NAME=PORT", value_parser = port, requires = "peer_set")]
    extra_port: Vec<(String, u16)>,
    /// How the list is written to DISCO_PEERS_FILE; `disco peers render --format help` lists the formats [default: json]
    #[arg(long, value_name = "FORMAT", requires = "peer_set")]
    peers_format: Option<Format>,
    /// Where the list is written to [default: disco-peers.list in the data directory]
    #[arg(long, value_name = "FILE", requires = "peer_set")]
    peers_file: Option<PathBuf>,
    /// The replicas speak TLS to each other, where that is part of an address
    #[arg(long, requires = "peer_set")]
    peers_tls: bool,
    /// Run by /bin/sh when the list has changed while the command runs
    #[arg(long, value_name = "COMMAND", requires = "peer_set")]
    on_peers_change: Option<String>,
}

fn port(text: &str) -> Result<(String, u16), String> {
    let pair = text.split_once('=').filter(|(name, _)| !name.is_empty());
    let pair = pair.and_then(|(name, port)| Some((name.to_owned(), port.parse().ok()?)));
    pair.ok_or_else(|| format!("{} is not NAME=PORT, such as election=3888", excerpt(text)))
}

/// A replica that is about to be started.
#[derive(Debug, Clone)]
pub(super) struct Replica {
    set: ServiceId,
    key: InstanceId,
    raft: SocketAddr,
    client: SocketAddr,
    ports: BTreeMap<String, SocketAddr>,
    zone: String,
    data: PathBuf,
    format: Format,
    tls: bool,
    told: ListFile,
    list: ListFile,
    on_change: Option<String>,
}

/// What it is started with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ready {
    /// For the command.
    pub(super) environment: Vec<(&'static str, String)>,
    digest: String,
}

/// Why it is not started yet.
#[derive(Debug)]
enum Trouble {
    /// There is no list yet.
    NotYet(String),
    /// No server answers.
    Silent(String),
    /// Nobody made the set, or it was lost.
    NoSet(Failure),
    Refused(Failure),
}

impl From<HttpError> for Trouble {
    fn from(error: HttpError) -> Self {
        match error {
            HttpError::Refused { status: 425, .. } => Self::NotYet(error.to_string()),
            HttpError::Refused { status: 404, .. } => Self::NoSet(error.into()),
            error if is_passing(&error) => Self::Silent(error.to_string()),
            error => Self::Refused(error.into()),
        }
    }
}

impl Replica {
    /// Of a command line that names a set.
    pub(super) fn new(
        args: ReplicaArgs,
        registration: &Registration,
        problems: &mut Problems,
    ) -> Option<Self> {
        let ReplicaArgs {
            peer_set: _,
            raft_port,
            data_dir,
            extra_port,
            peers_format,
            peers_file,
            peers_tls,
            on_peers_change,
        } = args;
        let format = peers_format.unwrap_or(Format::Json);
        if format == Format::HashicorpPeersJson {
            problems.add("peers-format", "hashicorp-peers-json is for one recovery, by hand");
        }
        // The command may go elsewhere before it reads them.
        let absolute = |path: PathBuf| std::path::absolute(&path).unwrap_or(path);
        let data = absolute(data_dir?);
        let at = |port: u16| SocketAddr::new(registration.address, port);
        Some(Self {
            set: registration.key.service.clone(),
            key: registration.key.id.clone(),
            raft: at(raft_port?),
            client: at(registration.port.into()),
            ports: extra_port.into_iter().map(|(name, port)| (name, at(port))).collect(),
            zone: registration.locality.zone.to_string(),
            format,
            tls: peers_tls,
            told: ListFile::new(data.join(TOLD), Some(Format::Env)),
            list: ListFile::new(
                peers_file.map_or_else(|| data.join("disco-peers.list"), absolute),
                Some(format),
            ),
            data,
            on_change: on_peers_change,
        })
    }

    /// Returns when it may be started.
    ///
    /// # Errors
    /// It may not: it belongs elsewhere, was removed, or was told nothing and no server answers (exit code 2).
    pub(super) async fn ready(&self, http: &Http, say: fn(&str)) -> Result<Ready, Failure> {
        let disk = mark(&self.data)?;
        let known = self.known()?;
        let mut backoff = Backoff::new(PAUSE.0, PAUSE.1);
        let (mut shown, mut silent) = (String::new(), None);
        loop {
            let trouble = match self.ask(http, &disk, known.as_ref()).await {
                Ok((told, list)) => return self.take(&told, &list),
                Err(trouble) => trouble,
            };
            let message = match (trouble, &known) {
                (Trouble::Refused(failure), _) | (Trouble::NoSet(failure), None) => return Err(failure),
                (Trouble::NotYet(message), None) => {
                    silent = None;
                    format!("not started yet: {message}")
                }
                (Trouble::Silent(message), None) => {
                    if silent.get_or_insert_with(Instant::now).elapsed() >= LOOK.1 {
                        return Err(Failure::not_yet(format!(
                            "{}/{} was never told its list, and cannot start without: it would found another database. {message}",
                            self.set, self.key
                        )));
                    }
                    message
                }
                (Trouble::NoSet(Failure { message, .. }), Some(known)) => {
                    return Ok(self.with_files(known, &message, say));
                }
                // Whatever has become of Disco, the database is the one that it was.
                (Trouble::Silent(message) | Trouble::NotYet(message), Some(known)) => {
                    if silent.get_or_insert_with(Instant::now).elapsed() >= LOOK.0 {
                        return Ok(self.with_files(known, &message, say));
                    }
                    message
                }
            };
            if message != shown {
                say(&message);
                shown = message;
            }
            tokio::time::sleep(backoff.next_wait()).await;
        }
    }

    fn with_files(&self, known: &Ready, why: &str, say: fn(&str)) -> Ready {
        say(&format!("starting with what is in {}: {why}", self.data.display()));
        known.clone()
    }

    /// Registers it and fetches what it is to know.
    async fn ask(&self, http: &Http, disk: &str, known: Option<&Ready>) -> Result<(Text, Text), Trouble> {
        if let Some(known) = known {
            // Before it takes a place among the founders of another database.
            self.is_same(http, known).await?;
        }
        let cluster = self.register(http, disk).await?;
        let (_, told) = fetch(http, &self.asked(Format::Env), Revision::default(), POLL).await?;
        if value(&told.text, "DISCO_CLUSTER_ID") != Some(&cluster) {
            return Err(Trouble::NotYet("this server has not read the newest founding".to_owned()));
        }
        let (_, list) = fetch(http, &self.asked(self.format), Revision::default(), Duration::ZERO).await?;
        if list.digest != told.digest {
            return Err(Trouble::NotYet("the set is founded anew right now".to_owned()));
        }
        Ok((told, list))
    }

    /// Whether the set is still of the cluster that it belongs to.
    async fn is_same(&self, http: &Http, known: &Ready) -> Result<(), Trouble> {
        let sets = http.get("/v1/peers", Duration::ZERO).await?;
        let mut all = sets.get("sets").and_then(Value::as_array).into_iter().flatten();
        let name = |set: &&Value| set.get("name").and_then(Value::as_str) == Some(self.set.as_str());
        let cluster = all.find(name).and_then(|set| set.get("cluster_id")).and_then(Value::as_str);
        let own = known.get("DISCO_CLUSTER_ID");
        match cluster {
            Some(cluster) if cluster != own => Err(Trouble::Refused(Failure::failed(format!(
                "{} holds a replica of cluster {own}, and {} is cluster {cluster} now: the database that it belongs to was given up. \
                 Empty its disk, with this directory, to start it as another replica",
                self.data.display(),
                self.set
            )))),
            Some(_) | None => Ok(()),
        }
    }

    /// Returns the id of the cluster.
    async fn register(&self, http: &Http, disk: &str) -> Result<String, Trouble> {
        let text = |at: &SocketAddr| at.to_string();
        let ports: BTreeMap<_, _> = self.ports.iter().map(|(name, at)| (name, text(at))).collect();
        let body = json!({
            "disk": disk, "raft": text(&self.raft), "client": text(&self.client), "ports": ports, "zone": self.zone,
        });
        let path = format!("/v1/peers/{}/peers/{}", self.set, self.key);
        let answer = http.send(Method::PUT, &path, Some(&body), Duration::ZERO).await?;
        let cluster = answer.get("cluster_id").and_then(Value::as_str);
        cluster
            .map(str::to_owned)
            .ok_or_else(|| Trouble::Silent(format!("{} answered without a cluster id", http.address())))
    }

    fn asked(&self, format: Format) -> Asked<'_> {
        Asked { set: &self.set, format, peer: Some(&self.key), tls: self.tls, recovering: false }
    }

    /// Writes down what came, for the command and for the next start.
    fn take(&self, told: &Text, list: &Text) -> Result<Ready, Failure> {
        self.told.write(told)?;
        self.list.write(list)?;
        self.read(&told.text)
    }

    /// What it was told at an earlier start, if it was.
    fn known(&self) -> Result<Option<Ready>, Failure> {
        let text = match fs::read_to_string(self.told.path()) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(unreadable(self.told.path(), &error)),
        };
        let ready = self.read(&text)?;
        let (set, key) = (ready.get("DISCO_PEER_SET"), ready.get("DISCO_PEER_KEY"));
        if (set, key) != (self.set.as_str(), self.key.as_str()) {
            return Err(Failure::usage(format!(
                "{} belongs to {set}/{key}: give {}/{} a directory of its own",
                self.data.display(),
                self.set,
                self.key
            )));
        }
        // Without the list that the command reads there is nothing to start it with.
        Ok(self.list.path().exists().then_some(ready))
    }

    fn read(&self, text: &str) -> Result<Ready, Failure> {
        let mut environment = Vec::with_capacity(VARIABLES.len() + 1);
        for name in VARIABLES {
            let value = value(text, name).ok_or_else(|| {
                Failure::bad_data(format!(
                    "{} has no {name}: it is not what Disco wrote; remove it if a Disco server runs",
                    self.told.path().display()
                ))
            })?;
            environment.push((name, value.to_owned()));
        }
        environment.push(("DISCO_PEERS_FILE", self.list.path().display().to_string()));
        let digest = value(text, "DISCO_PEERS_DIGEST").unwrap_or_default().to_owned();
        Ok(Ready { environment, digest })
    }

    /// Keeps the files up to date while the command runs, and asks for its end when another database was founded in its place
    /// (rule N2).
    pub(super) async fn keep(self, http: Http, ready: Ready, stop: mpsc::Sender<()>, say: fn(&str)) {
        let mut backoff = Backoff::new(PAUSE.0, PAUSE.1);
        let (mut after, mut newest, mut shown) = (Revision::default(), 0, String::new());
        loop {
            let message = match self.news(&http, after).await {
                Ok((_, told, list)) if told.digest != ready.digest || list.digest != ready.digest => {
                    say(&format!(
                        "{} was founded anew (digest {}), and this replica belongs to the database before that (digest {}): \
                         stopping it",
                        self.set, told.digest, ready.digest
                    ));
                    return stop_twice(stop).await;
                }
                // It was founded, so it is given up, or a backup from before its founding was put back.
                Err(HttpError::Refused { status: 425, .. }) => match self.is_same(&http, &ready).await {
                    Err(Trouble::Refused(failure)) => {
                        say(&format!("stopping the command: {failure}"));
                        return stop_twice(stop).await;
                    }
                    Ok(()) | Err(_) => String::new(),
                },
                // Another server, which has not read the store to its end.
                Ok((_, told, _)) if told.set_revision < newest => String::new(),
                Ok((revision, told, list)) => {
                    (after, newest) = (revision, told.set_revision);
                    backoff.reset();
                    match self.update(&told, &list).await {
                        Ok(()) => {
                            shown.clear();
                            continue;
                        }
                        Err(message) => message,
                    }
                }
                // What it knows is good enough, and the command needs no more.
                Err(HttpError::Refused { status: 404, message, .. }) => {
                    format!("{message}; if it was removed from the database for good, stop it")
                }
                Err(error) if is_passing(&error) => String::new(),
                Err(error) => error.to_string(),
            };
            if !message.is_empty() && message != shown {
                say(&message);
                shown = message;
            }
            tokio::time::sleep(backoff.next_wait()).await;
        }
    }

    async fn news(&self, http: &Http, after: Revision) -> Result<(Revision, Text, Text), HttpError> {
        let (revision, told) = fetch(http, &self.asked(Format::Env), after, POLL).await?;
        let (_, list) = fetch(http, &self.asked(self.format), Revision::default(), Duration::ZERO).await?;
        Ok((revision, told, list))
    }

    async fn update(&self, told: &Text, list: &Text) -> Result<(), String> {
        self.told.write(told).map_err(|failure| failure.message)?;
        let written = self.list.write(list).map_err(|failure| failure.message)?;
        match &self.on_change {
            Some(command) if written == Written::Changed => on_change(command, &self.list).await,
            Some(_) | None => Ok(()),
        }
    }
}

/// The second request has it wait for no proxies.
async fn stop_twice(stop: mpsc::Sender<()>) {
    let _ = stop.send(()).await;
    let _ = stop.send(()).await;
}

impl Ready {
    fn get(&self, name: &str) -> &str {
        let found = self.environment.iter().find(|(known, _)| *known == name);
        found.map_or("", |(_, value)| value)
    }
}

/// Of a variable in a file of variables.
fn value<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let mut values = text.lines().filter_map(|line| line.split_once('='));
    values.find(|(known, _)| *known == name).map(|(_, value)| value)
}

/// What the disk is marked with; it is marked when it is not.
fn mark(data: &Path) -> Result<String, Failure> {
    let file = data.join(MARK);
    let failed = |error: &dyn std::fmt::Display| {
        Failure::failed(format!("cannot mark the disk with {}: {error}", file.display()))
    };
    fs::create_dir_all(data).map_err(|error| failed(&error))?;
    if !file.exists() {
        let mut random = [0; 16];
        SystemRandom::new().fill(&mut random).map_err(|_| failed(&"the system gives no random numbers"))?;
        let new = format!("{:032x}\n", u128::from_be_bytes(random));
        match write_whole(&file, new.as_bytes(), 0o644, Present::Keep) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(failed(&error)),
        }
    }
    let mark = fs::read_to_string(&file).map_err(|error| unreadable(&file, &error))?;
    match mark.trim() {
        "" => Err(failed(&"it is empty; if this disk never was a replica's, remove it")),
        mark => Ok(mark.to_owned()),
    }
}

fn unreadable(file: &Path, error: &io::Error) -> Failure {
    Failure::bad_data(format!("cannot read {}: {error}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_keeps_its_mark() {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("new/data");
        let first = mark(&data).unwrap();
        assert_eq!(first.len(), 32);
        assert_eq!(mark(&data).unwrap(), first);
        assert_ne!(mark(&folder.path().join("other")).unwrap(), first);
        fs::write(data.join(MARK), "\n").unwrap();
        assert!(mark(&data).unwrap_err().message.contains("is empty"));
    }

    #[test]
    fn ports() {
        assert_eq!(port("election=3888"), Ok(("election".to_owned(), 3888)));
        for wrong in ["3888", "=3888", "election=", "election=70000"] {
            assert!(port(wrong).unwrap_err().contains("NAME=PORT"), "{wrong}");
        }
    }
}
