//! `disco peers`: the replicas of databases.

mod file;
mod render;
mod table;

pub(super) use file::{ListFile, Text, Written};
pub(super) use render::{Asked, fetch, is_passing, on_change};

use std::time::Duration;

use clap::{Args, Subcommand};
use http::Method;
use serde_json::{Map, Value, json};

use super::{
    Failure, Global,
    output::{ListOptions, Refresh, ShowOptions, View, cell, list, note, number, print},
};
use crate::{
    client::Http,
    model::{InstanceId, Role, ServiceId, format_duration, parse_duration},
    peers::{ClusterId, Kind},
};

/// How long a question waits at the server, at most.
const POLL: Duration = Duration::from_secs(30);

/// Verbs of `disco peers`.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Make a peer set: how many founders, of which database
    #[command(
        after_help = "Examples:\n  disco peers create db --expect 3 --kind etcd --observe etcd\n  disco peers create queue --expect 5 \
                      --kind nats --per-zone 2 --spread-required"
    )]
    Create(Create),
    /// List the peer sets
    #[command(visible_alias = "ls", after_help = "Example:\n  disco peers list --watch")]
    List(ListOptions),
    /// Show the replicas of a set: role, state, term, lag, zone; ends with 2 while founders are missing
    #[command(after_help = "Example:\n  disco peers show db")]
    Show {
        /// The set
        set: ServiceId,
        #[command(flatten)]
        options: ListOptions,
    },
    /// Wait until a set is founded, and more; ends with 2 when the time is up
    #[command(
        after_help = "Examples:\n  disco peers wait db\n  disco peers wait db --up 2 --leader --timeout 1m\n  disco peers wait db \
                            --added n4"
    )]
    Wait(Wait),
    /// Write the list in a database's own format; ends with 2, and writes nothing, while there is none
    #[command(
        long_about = "Write the list of a set in a database's own format.\n\nA founder is given the list that it was founded with, for \
                      ever; one that joins is given the members of today, once its add was seen. Until there is a list nothing is \
                      written, and this ends with 2. A file is replaced whole, keeps the last list while no server answers, and is not \
                      replaced by the list of another founding. `--format help` lists the formats.",
        after_help = "Examples:\n  disco peers render db --format etcd-env --peer n1 --out /etc/etcd/peers.env\n  disco peers render queue \
                      --format nats-routes --out routes.conf --watch --on-change 'kill -HUP $(cat nats.pid)'\n  disco peers render db \
                      --template peers.j2"
    )]
    Render(render::Render),
    /// Compare the set with what the database itself says; ends with 79 when they differ
    #[command(after_help = "Example:\n  disco peers verify db && echo fine")]
    Verify {
        /// The set
        set: ServiceId,
        #[command(flatten)]
        options: ShowOptions,
    },
    /// Say the next safe step towards a change of members; ends with 2 when something has to happen first
    #[command(
        long_about = "Say the next safe step towards a change of members.\n\nA change goes one step at a time: what this prints is to be \
                      done in the database, and is over when the database says so. Then ask again for the next step. While a step is \
                      under way no other one is begun.",
        after_help = "Examples:\n  disco peers propose db --add n4\n  disco peers propose db --replace n2 n4\n  disco peers propose db \
                      --remove n2"
    )]
    Propose(Propose),
    /// Say that the step under way was made, where the database does not tell; or, with --cancel, that it will not be
    #[command(after_help = "Examples:\n  disco peers finish db\n  disco peers finish db --cancel")]
    Finish {
        /// The set
        set: ServiceId,
        /// It was not made and will not be
        #[arg(long)]
        cancel: bool,
    },
    /// Register a replica, for what is not run by `disco run --peer-set`
    #[command(
        after_help = "Example:\n  disco peers register db n1 --disk $(cat /data/disk-id) --raft 10.0.0.1:2380 --client 10.0.0.1:2379"
    )]
    Register(Register),
    /// Forget a replica that was not handed a list: one that never came in, or a founder before the set is founded
    #[command(after_help = "Example:\n  disco peers withdraw db n1")]
    Withdraw {
        /// The set
        set: ServiceId,
        /// The replica
        peer: InstanceId,
    },
    /// Say what a replica does, for what is not observed; to be said again every 3 s
    #[command(after_help = "Example:\n  disco peers report db n1 --role leader --term 7")]
    Report(Report),
    /// Give a database up and found another one in its place
    #[command(
        long_about = "Give a database up and found another one in its place.\n\nThe set collects founders again and gets a new cluster id. \
                      Whatever is left of the old database does not belong to it: every replica has to come with an empty disk.",
        after_help = "Example:\n  disco peers refound db --give-up 7b437fa8-4291-0d9e-f882-753575eca955 --expect 3"
    )]
    Refound {
        /// The set
        set: ServiceId,
        /// The id of the cluster that is given up, as `disco peers show` has it
        #[arg(long, value_name = "CLUSTER")]
        give_up: ClusterId,
        /// How many founders the new one has
        #[arg(long, value_name = "N")]
        expect: u32,
    },
}

/// Arguments of `disco peers create`.
#[derive(Debug, Args)]
pub(super) struct Create {
    /// Its name: one label. It is also the service that the replicas are instances of
    set: ServiceId,
    /// How many founders
    #[arg(long, value_name = "N")]
    expect: u32,
    /// Which database: etcd, nats, redis, postgres, openraft, …; what is not known is `generic`
    #[arg(long, default_value = "generic")]
    kind: Kind,
    /// Find out by this adapter what each replica does: etcd, redis, patroni, nats, http, grpc
    #[arg(long, value_name = "ADAPTER")]
    observe: Option<String>,
    /// Ask at this one of the replicas' further ports, not where clients go
    #[arg(long, value_name = "NAME", requires = "observe")]
    observe_port: Option<String>,
    /// How often each replica is asked
    #[arg(long, value_name = "TIME", value_parser = parse_duration, requires = "observe")]
    observe_every: Option<Duration>,
    /// What else the adapter needs, such as path=/leader
    #[arg(long, value_name = "NAME=VALUE", value_parser = pair, requires = "observe")]
    observe_option: Vec<(String, String)>,
    /// Most founders in one zone
    #[arg(long, value_name = "N")]
    per_zone: Option<u32>,
    /// Refuse a founder that comes too many in its zone, rather than warn
    #[arg(long, requires = "per_zone")]
    spread_required: bool,
}

/// Arguments of `disco peers wait`.
#[derive(Debug, Args)]
pub(super) struct Wait {
    /// The set
    set: ServiceId,
    /// So many replicas run
    #[arg(long, value_name = "N", default_value_t = 0)]
    up: u32,
    /// There is a leader
    #[arg(long)]
    leader: bool,
    /// This replica is in the database
    #[arg(long, value_name = "PEER")]
    added: Option<InstanceId>,
    /// How long
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_duration)]
    timeout: Duration,
    #[command(flatten)]
    options: ShowOptions,
}

/// Arguments of `disco peers propose`.
#[derive(Debug, Args)]
#[group(id = "change", required = true, multiple = false, args = ["add", "remove", "replace", "demote"])]
pub(super) struct Propose {
    /// The set
    set: ServiceId,
    /// This replica is to vote
    #[arg(long, value_name = "PEER")]
    add: Option<InstanceId>,
    /// This replica is to go
    #[arg(long, value_name = "PEER")]
    remove: Option<InstanceId>,
    /// The second is to vote in the place of the first
    #[arg(long, num_args = 2, value_names = ["OLD", "NEW"])]
    replace: Option<Vec<InstanceId>>,
    /// This replica is to copy only
    #[arg(long, value_name = "PEER")]
    demote: Option<InstanceId>,
    /// Only if the set is at this revision still (`set_revision`); without it, as it is now
    #[arg(long, value_name = "REVISION")]
    from: Option<u64>,
    #[command(flatten)]
    options: ShowOptions,
}

/// Arguments of `disco peers register`.
#[derive(Debug, Args)]
pub(super) struct Register {
    /// The set
    set: ServiceId,
    /// The replica's name, which is also its instance id
    peer: InstanceId,
    /// What marks its disk: made anew whenever the disk is empty
    #[arg(long, value_name = "ID")]
    disk: String,
    /// Where the other replicas find it
    #[arg(long, value_name = "IP:PORT")]
    raft: String,
    /// Where clients find it
    #[arg(long, value_name = "IP:PORT")]
    client: String,
    /// Further addresses, by what they are for
    #[arg(long, value_name = "NAME=IP:PORT", value_parser = pair)]
    port: Vec<(String, String)>,
    /// Where it stands
    #[arg(long, default_value = "")]
    zone: String,
    /// Of its software
    #[arg(long, default_value = "", value_name = "VERSION")]
    software: String,
}

/// Arguments of `disco peers report`.
#[derive(Debug, Args)]
pub(super) struct Report {
    /// The set
    set: ServiceId,
    /// The replica
    peer: InstanceId,
    /// leader, follower, candidate, learner or unknown
    #[arg(long)]
    role: Role,
    /// Its term, epoch or configuration number
    #[arg(long, value_name = "N", default_value_t = 0)]
    term: u64,
    /// Whom it takes for the leader, by node id
    #[arg(long, value_name = "NODE", default_value_t = 0)]
    leader: u64,
    /// How far it has come
    #[arg(long, value_name = "N", default_value_t = 0)]
    applied: u64,
}

fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("want NAME=VALUE".to_owned()),
    }
}

pub(super) async fn run(command: Command, global: &Global) -> Result<(), Failure> {
    let http = &global.client()?;
    match command {
        Command::Create(arguments) => create(http, arguments).await,
        Command::List(options) => list(&options, async |refresh| sets(http, refresh).await).await,
        Command::Show { set, options } => {
            list(&options, async |refresh| show(http, &set, refresh).await).await
        }
        Command::Wait(arguments) => wait(http, &arguments).await,
        Command::Render(arguments) => Box::pin(render::run(arguments, global)).await,
        Command::Verify { set, options } => verify(http, &set, &options).await,
        Command::Propose(arguments) => propose(http, &arguments).await,
        Command::Finish { set, cancel } => finish(http, &set, cancel).await,
        Command::Register(arguments) => register(http, arguments).await,
        Command::Withdraw { set, peer } => {
            let path = format!("{}/peers/{peer}", path(&set));
            let answer = http.send(Method::DELETE, &path, None, Duration::ZERO).await?;
            print(&format!("{peer} withdrawn from {set} at revision {}\n", number(&answer, "/revision")))
        }
        Command::Report(arguments) => report(http, &arguments).await,
        Command::Refound { set, give_up, expect } => {
            let body = json!({"cluster_id": give_up.to_string(), "expect": expect});
            let answer = post(http, &set, "refound", &body).await?;
            print(&format!(
                "{set} collects {expect} founders again, for cluster {}; start each with an empty disk\n",
                cell(&answer, "/cluster_id")
            ))
        }
    }
}

fn path(set: &ServiceId) -> String {
    format!("/v1/peers/{set}")
}

async fn post(http: &Http, set: &ServiceId, verb: &str, body: &Value) -> Result<Value, Failure> {
    let path = format!("{}/{verb}", path(set));
    Ok(http.send(Method::POST, &path, Some(body), Duration::ZERO).await?)
}

async fn create(http: &Http, arguments: Create) -> Result<(), Failure> {
    let Create {
        set,
        expect,
        kind,
        observe,
        observe_port,
        observe_every,
        observe_option,
        per_zone,
        spread_required,
    } = arguments;
    let mut body = json!({"expect": expect, "kind": kind.as_str()});
    if let Some(body) = body.as_object_mut() {
        if let Some(most_per_zone) = per_zone {
            let spread = json!({"most_per_zone": most_per_zone, "required": spread_required});
            body.insert("spread".into(), spread);
        }
        if let Some(adapter) = observe {
            let options: Map<_, _> =
                observe_option.into_iter().map(|(name, value)| (name, Value::String(value))).collect();
            let mut observe = json!({"adapter": adapter, "options": options});
            if let Some(observe) = observe.as_object_mut() {
                observe.extend(observe_port.map(|port| ("port".into(), json!(port))));
                observe.extend(observe_every.map(|every| ("every".into(), json!(format_duration(every)))));
            }
            body.insert("observe".into(), observe);
        }
    }
    let answer = http.send(Method::PUT, &path(&set), Some(&body), Duration::ZERO).await?;
    print(&format!(
        "peer set {set} expects {expect} founders; cluster {}\nstart each with: disco run --peer-set {set} …\n",
        cell(&answer, "/cluster_id")
    ))
}

async fn sets(http: &Http, refresh: Refresh) -> Result<View, Failure> {
    let (query, wait) = poll(refresh, "");
    Ok(View {
        document: http.get(&format!("/v1/peers{query}"), wait).await?,
        items: Some("sets"),
        table: table::sets,
        empty: "there is no peer set; make one with `disco peers create SET --expect N`",
    })
}

fn poll(refresh: Refresh, more: &str) -> (String, Duration) {
    match refresh {
        Refresh::Now => (format!("?{more}"), Duration::ZERO),
        Refresh::After(revision) => (format!("?index={revision}&wait={}s&{more}", POLL.as_secs()), POLL),
    }
}

async fn show(http: &Http, set: &ServiceId, refresh: Refresh) -> Result<View, Failure> {
    let (query, wait) = poll(refresh, "");
    let document = http.get(&format!("{}{query}", path(set)), wait).await?;
    Ok(View { document, items: None, table: table::set, empty: "" })
}

async fn wait(http: &Http, arguments: &Wait) -> Result<(), Failure> {
    let Wait { set, up, leader, added, timeout, options } = arguments;
    let started = tokio::time::Instant::now();
    let added = added.as_ref().map(|added| format!("&added={added}")).unwrap_or_default();
    loop {
        let turn = timeout.saturating_sub(started.elapsed()).min(POLL);
        let query = format!("?up={up}&leader={leader}{added}&wait={}ms", turn.as_millis());
        match http.get(&format!("{}{query}", path(set)), turn).await.map_err(Failure::from) {
            Ok(document) => {
                return View { document, items: None, table: table::set, empty: "" }.print(options.output);
            }
            Err(failure) if failure.code != super::failure::NOT_YET => return Err(failure),
            Err(failure) if started.elapsed() >= *timeout => {
                let within = format_duration(*timeout);
                return Err(Failure::not_yet(format!("{failure} (waited {within})")));
            }
            Err(_) => {}
        }
    }
}

async fn verify(http: &Http, set: &ServiceId, options: &ShowOptions) -> Result<(), Failure> {
    let document = http.get(&path(set), Duration::ZERO).await?;
    let texts = |name: &str| {
        let texts = document.pointer(name).and_then(Value::as_array).into_iter().flatten();
        texts.map(|text| cell(text, "")).collect::<Vec<_>>()
    };
    let peers = document.get("peers").and_then(Value::as_array).into_iter().flatten();
    let silent: Vec<_> = peers
        .filter(|peer| peer.get("term").is_none_or(Value::is_null))
        .map(|peer| cell(peer, "/key"))
        .collect();
    let drift = texts("/drift");
    View { document: document.clone(), items: None, table: table::set, empty: "" }.print(options.output)?;
    for warning in texts("/founding/warnings") {
        note(&format!("warning: {warning}"));
    }
    if !silent.is_empty() {
        note(&format!("nothing is heard of {}: nothing is known of what it says", silent.join(", ")));
    }
    if drift.is_empty() {
        return Ok(());
    }
    Err(Failure::findings(format!("{set} and the database differ:\n  {}", drift.join("\n  "))))
}

async fn propose(http: &Http, arguments: &Propose) -> Result<(), Failure> {
    let Propose { set, add, remove, replace, demote, from, options } = arguments;
    let from = match from {
        Some(from) => *from,
        None => number(&http.get(&path(set), Duration::ZERO).await?, "/set_revision"),
    };
    let mut body = json!({"from_revision": from});
    if let Some(body) = body.as_object_mut() {
        let named = [("add", add), ("remove", remove), ("demote", demote)];
        for (name, peer) in named {
            body.extend(peer.as_ref().map(|peer| (name.to_owned(), json!(peer.as_str()))));
        }
        if let Some([old, new]) = replace.as_deref() {
            body.insert("replace".into(), json!({"old": old.as_str(), "new": new.as_str()}));
        }
    }
    let document = post(http, set, "propose", &body).await?;
    let waits = document.get("wait").and_then(Value::as_str).map(str::to_owned);
    View { document, items: None, table: table::step, empty: "" }.print(options.output)?;
    waits.map_or(Ok(()), |reason| Err(Failure::not_yet(reason)))
}

async fn finish(http: &Http, set: &ServiceId, cancel: bool) -> Result<(), Failure> {
    let document = http.get(&path(set), Duration::ZERO).await?;
    let body = json!({"from_revision": number(&document, "/set_revision"), "cancel": cancel});
    post(http, set, "finish", &body).await?;
    let (change, peer) = (cell(&document, "/pending/change"), cell(&document, "/pending/key"));
    let became = if cancel { "was cancelled" } else { "is done" };
    print(&format!("{change} of {peer} {became}\n"))
}

async fn register(http: &Http, arguments: Register) -> Result<(), Failure> {
    let Register { set, peer, disk, raft, client, port, zone, software } = arguments;
    let ports: Map<_, _> = port.into_iter().map(|(name, at)| (name, Value::String(at))).collect();
    let body = json!({
        "disk": disk, "raft": raft, "client": client, "ports": ports, "zone": zone, "version": software,
    });
    let path = format!("{}/peers/{peer}", path(&set));
    let answer = http.send(Method::PUT, &path, Some(&body), Duration::ZERO).await?;
    let (node, birth) = (number(&answer, "/node_id"), cell(&answer, "/birth"));
    let founded = answer.get("founded").and_then(Value::as_bool).unwrap_or_default();
    print(&format!(
        "{peer} is node {node} of {set}, a {birth}\n{}",
        match (birth.as_str(), founded) {
            ("joiner", _) => format!("next: disco peers propose {set} --add {peer}\n"),
            (_, true) => format!("next: disco peers show {set}\n"),
            (_, false) => format!("next: disco peers wait {set}\n"),
        }
    ))
}

async fn report(http: &Http, arguments: &Report) -> Result<(), Failure> {
    let Report { set, peer, role, term, leader, applied } = arguments;
    let body = json!({"role": role.as_str(), "term": term, "leader": leader, "applied": applied});
    let answer = post(http, set, &format!("peers/{peer}/report"), &body).await?;
    print(&format!("heard; say it again within {}\n", cell(&answer, "/within")))
}
