use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use clap::{Args, Subcommand};
use http::Method;
use jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::{
    Failure, Global,
    output::{
        Column, ListOptions, Refresh, ShowOptions, View, age, cell, clean, count, list, note, number,
        parse_when, print, render, some_of,
    },
    servers::{Elsewhere, ask_all, pending, unknown},
};
use crate::{
    client::{Http, HttpError},
    model::{InstanceKey, Probe, ServiceId, format_duration, parse_duration},
    rt,
};

/// How long one question for acknowledgements may wait at the server.
const ASK: Duration = Duration::from_secs(20);

/// Shortest time between two questions, should the server not wait as asked.
const PAUSE: Duration = Duration::from_millis(100);

/// How long a watch of one service waits at the server.
pub(super) const POLL: Duration = Duration::from_secs(30);

/// Verbs of `disco instance`.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// List the instances of a service, or of all
    #[command(
        visible_alias = "ls",
        after_help = "Examples:\n  disco instance list greeter --watch\n  disco instance list -o jsonl"
    )]
    List {
        /// Only those of this service
        service: Option<ServiceId>,
        #[command(flatten)]
        options: ListOptions,
    },
    /// Show everything about one instance
    #[command(after_help = "Example:\n  disco instance show greeter/a")]
    Show {
        /// Which instance, e.g. greeter/a
        #[arg(value_name = KEY, value_parser = parse_key)]
        instance: InstanceKey,
        #[command(flatten)]
        options: ShowOptions,
    },
    /// Tell who holds an instance, and which proxies see it or why not
    #[command(
        after_help = "Examples:\n  disco instance explain greeter/a\n  disco instance explain greeter/a --at 10m"
    )]
    Explain {
        /// Which instance, e.g. greeter/a
        #[arg(value_name = KEY, value_parser = parse_key)]
        instance: InstanceKey,
        /// Tell what it was then: a time, e.g. 2026-01-31T12:00:00Z, or how long ago, e.g. 10m
        #[arg(long, value_name = "TIME", value_parser = parse_when)]
        at: Option<Timestamp>,
        #[command(flatten)]
        options: ShowOptions,
    },
    /// Register an instance, or renew and update it
    #[command(
        long_about = "Register an instance, or renew and update it.\n\nIt is forgotten after its TTL unless it is registered \
                      again by then; `disco run` does that for the command it wraps.",
        after_help = "Example:\n  disco instance register greeter/a --address 10.0.0.7 --port 50051 --zone eu-1a --ttl 5m\n  disco instance register db/a --address 10.0.0.8 --port 5432 --health http:/ready --health-port 8008"
    )]
    Register(Box<Register>),
    /// Say what changes many times a second, to those who watch the service; proxies are not told
    #[command(
        long_about = "Say what changes many times a second, such as the range of blocks that an instance has, to those who watch \
                      the service. It replaces what was said before, and proxies are not told.",
        after_help = "Example:\n  disco instance publish chain/a first=17 last=4711"
    )]
    Publish {
        /// Which instance, e.g. chain/a
        #[arg(value_name = KEY, value_parser = parse_key)]
        instance: InstanceKey,
        /// Everything that there is to say
        #[arg(value_name = "KEY=VALUE", value_parser = parse_pair)]
        entries: Vec<(String, String)>,
    },
    /// Stop new calls to an instance and wait until every proxy knows
    #[command(
        long_about = "Stop new calls to an instance and wait until every proxy knows.\n\nEnds with 2 when some proxies have \
                      not acknowledged in time, and names them.",
        after_help = "Example:\n  disco instance drain greeter/a --wait 30s"
    )]
    Drain(Drain),
    /// Forget an instance now
    #[command(after_help = "Example:\n  disco instance deregister greeter/a")]
    Deregister {
        #[command(flatten)]
        which: Which,
    },
}

const KEY: &str = "SERVICE/ID";

/// Arguments that name one run of one instance.
#[derive(Debug, Args)]
pub(super) struct Which {
    /// Which instance, e.g. greeter/a
    #[arg(value_name = KEY, value_parser = parse_key)]
    instance: InstanceKey,
    /// Only if it is this run of it
    #[arg(long, value_name = "N")]
    incarnation: Option<u64>,
}

/// Arguments of `disco instance drain`.
#[derive(Debug, Args)]
pub(super) struct Drain {
    #[command(flatten)]
    which: Which,
    /// How long to wait for the proxies; 0s does not wait
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_duration)]
    wait: Duration,
}

/// Arguments of `disco instance register`.
#[derive(Debug, Args)]
pub(super) struct Register {
    /// Which instance, e.g. greeter/a
    #[arg(value_name = KEY, value_parser = parse_key)]
    instance: InstanceKey,
    /// Where it listens; an IP address, never a host name
    #[arg(long, value_name = "IP")]
    address: String,
    /// The port that takes its calls
    #[arg(long)]
    port: u64,
    /// Where it runs, widest: e.g. eu-west
    #[arg(long)]
    region: Option<String>,
    /// Where it runs: e.g. eu-west-1a
    #[arg(long)]
    zone: Option<String>,
    /// Share of the calls relative to the service's other instances
    #[arg(long)]
    weight: Option<u64>,
    /// What to say of it; may be given several times
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse_pair)]
    metadata: Vec<(String, String)>,
    /// Forget it after this time without renewal
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    ttl: Option<Duration>,
    /// Which run of the id this is; a later run has a greater number
    #[arg(long, value_name = "N")]
    incarnation: Option<u64>,
    /// How the server is to check it: `tcp`, `http[:/PATH]`, `grpc[:SERVICE]` or `none` [default: none]
    #[arg(long, value_name = "CHECK", value_parser = parse_check)]
    health: Option<Checked>,
    /// The port to check, if it is another one
    #[arg(long, value_name = "PORT", requires = "health")]
    health_port: Option<u64>,
    /// Time between two checks
    #[arg(long, value_name = "TIME", requires = "health", value_parser = parse_duration)]
    health_interval: Option<Duration>,
    /// How long an answer may take
    #[arg(long, value_name = "TIME", requires = "health", value_parser = parse_duration)]
    health_timeout: Option<Duration>,
}

/// `none` is no kind.
fn parse_check(text: &str) -> Result<Checked, String> {
    if text == "none" {
        return Ok(Checked(None));
    }
    text.parse().map(|probe| Checked(Some(probe))).map_err(|error: String| format!("{error}; or none"))
}

/// How the server is to check an instance, if at all.
#[derive(Debug, Clone)]
struct Checked(Option<Probe>);

fn parse_key(text: &str) -> Result<InstanceKey, String> {
    let (service, id) = text
        .split_once('/')
        .ok_or_else(|| "want SERVICE/ID, e.g. greeter/a; `disco instance list` shows them".to_owned())?;
    Ok(InstanceKey { service: service.parse()?, id: id.parse()? })
}

fn parse_pair(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or_else(|| "want KEY=VALUE, e.g. build=7".to_owned())?;
    Ok((key.to_owned(), value.to_owned()))
}

pub(super) async fn run(command: Command, global: &Global) -> Result<(), Failure> {
    let http = global.client()?;
    match command {
        Command::List { service: Some(service), options } => {
            list(&options, async |refresh| instances_of(&http, &service, refresh).await).await
        }
        Command::List { service: None, options } => {
            list(&options, async |_| all_instances(&http).await).await
        }
        Command::Show { instance, options } => {
            let document = http.get(&path(&instance, "", None), Duration::ZERO).await?;
            View { document, items: None, table: instance_table, empty: "" }.print(options.output)
        }
        Command::Explain { instance, at: Some(at), options } => {
            let path = format!("{}?at={at}", path(&instance, "/explain", None));
            let document = http.get(&path, Duration::ZERO).await?;
            View { document, items: None, table: past_table, empty: "" }.print(options.output)
        }
        Command::Explain { instance, at: None, options } => {
            let document = http.get(&path(&instance, "/explain", None), Duration::ZERO).await?;
            View { document, items: None, table: explain_table, empty: "" }.print(options.output)
        }
        Command::Register(register) => register_one(&http, &register).await,
        Command::Publish { instance, entries } => {
            let entries: Map<String, Value> =
                entries.into_iter().map(|(key, value)| (key, Value::String(value))).collect();
            let body = json!({ "live": entries });
            http.send(Method::PUT, &path(&instance, "/live", None), Some(&body), Duration::ZERO).await?;
            Ok(())
        }
        Command::Drain(arguments) => drain(&http, &arguments).await,
        Command::Deregister { which } => {
            let path = path(&which.instance, "", which.incarnation);
            let answer = http.send(Method::DELETE, &path, None, Duration::ZERO).await?;
            print(&format!("{} deregistered at revision {}\n", which.instance, number(&answer, "/revision")))
        }
    }
}

/// Names are checked, so none of their characters needs escaping in a path.
fn path(key: &InstanceKey, verb: &str, incarnation: Option<u64>) -> String {
    let query = incarnation.map(|incarnation| format!("?incarnation={incarnation}")).unwrap_or_default();
    format!("/v1/services/{}/instances/{}{verb}{query}", key.service, key.id)
}

const NO_INSTANCES: &str = "no instances; register one with `disco run --service NAME --port PORT -- COMMAND` or `disco instance register`";

fn instances_view(document: Value) -> View {
    View { document, items: Some("instances"), table: instances_table, empty: NO_INSTANCES }
}

async fn instances_of(http: &Http, service: &ServiceId, refresh: Refresh) -> Result<View, Failure> {
    let path = format!("/v1/services/{service}/instances");
    let document = match refresh {
        Refresh::Now => http.get(&path, Duration::ZERO).await?,
        Refresh::After(revision) => {
            http.get(&format!("{path}?index={revision}&wait={}", format_duration(POLL)), POLL).await?
        }
    };
    Ok(instances_view(document))
}

async fn all_instances(http: &Http) -> Result<View, Failure> {
    let services = http.get("/v1/services", Duration::ZERO).await?;
    let mut instances = Vec::new();
    for service in services.get("services").and_then(Value::as_array).into_iter().flatten() {
        let name = service.get("name").and_then(Value::as_str).unwrap_or_default();
        let Ok(name) = name.parse::<ServiceId>() else { continue };
        match http.get(&format!("/v1/services/{name}/instances"), Duration::ZERO).await {
            Ok(mut answer) => {
                if let Some(Value::Array(some)) = answer.get_mut("instances").map(Value::take) {
                    instances.extend(some);
                }
            }
            // Removed since it was listed.
            Err(HttpError::Refused { status: 404, .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(instances_view(json!({"revision": services.get("revision"), "instances": instances})))
}

/// Columns of [`instance_row`].
pub(super) const INSTANCE_COLUMNS: [Column; 17] = [
    Column::new("SERVICE"),
    Column::new("ID"),
    Column::new("ADDRESS"),
    Column::new("STATE"),
    Column::new("HEALTH"),
    Column::new("ZONE"),
    Column::new("WEIGHT"),
    Column::new("AGE"),
    Column::wide("REGION"),
    Column::wide("SUB-ZONE"),
    Column::wide("INCARNATION"),
    Column::wide("LEASE"),
    Column::wide("REVISION"),
    Column::wide("REGISTERED"),
    Column::wide("REASON"),
    Column::wide("METADATA"),
    Column::wide("STALE"),
];

/// One instance as a row of a table.
pub(super) fn instance_row(instance: &Value) -> Vec<String> {
    vec![
        cell(instance, "/service"),
        cell(instance, "/id"),
        endpoint(instance),
        state(instance),
        verdict(instance),
        cell(instance, "/locality/zone"),
        cell(instance, "/weight"),
        age(instance, "/registered_at", rt::now()),
        cell(instance, "/locality/region"),
        cell(instance, "/locality/sub_zone"),
        cell(instance, "/incarnation"),
        lease(instance),
        cell(instance, "/revision"),
        cell(instance, "/registered_at"),
        cell(instance, "/health/reason"),
        metadata(instance, ","),
        match cell(instance, "/stale/reason") {
            reason if reason.is_empty() => cell(instance, "/damped/reason"),
            reason => reason,
        },
    ]
}

fn state(instance: &Value) -> String {
    let marks = ["stale", "damped"].into_iter().filter(|mark| instance.get(mark).is_some());
    marks.fold(cell(instance, "/state"), |state, mark| format!("{state}, {mark}"))
}

/// `None` for an instance that is not stale.
fn stale(instance: &Value) -> Option<String> {
    instance.get("stale")?;
    let age = age(instance, "/stale/since", rt::now());
    Some(format!("for {age}: {}", cell(instance, "/stale/reason")))
}

/// `None` for an instance that proxies are told of, as far as that goes.
fn damped(instance: &Value) -> Option<String> {
    instance.get("damped")?;
    Some(format!("until {}: {}", cell(instance, "/damped/until"), cell(instance, "/damped/reason")))
}

pub(super) fn endpoint(instance: &Value) -> String {
    let (address, port) = (cell(instance, "/address"), cell(instance, "/port"));
    match (address.parse::<IpAddr>(), port.parse()) {
        (Ok(ip), Ok(port)) => SocketAddr::new(ip, port).to_string(),
        _ => format!("{address}:{port}"),
    }
}

/// The verdict; nothing for an instance that nobody checks.
fn verdict(instance: &Value) -> String {
    if instance.get("check").is_some() { cell(instance, "/health/verdict") } else { "-".to_owned() }
}

/// The verdict, since when, and why.
fn health(instance: &Value) -> String {
    if instance.get("check").is_none() {
        return "nobody checks it".to_owned();
    }
    let age = age(instance, "/health/since", rt::now());
    let published = instance.pointer("/health/passed").and_then(Value::as_bool).unwrap_or(true);
    let note = if published { "" } else { "; proxies are not told of it before it passes once" };
    let (verdict, reason) = (cell(instance, "/health/verdict"), cell(instance, "/health/reason"));
    format!("{verdict} for {age}: {reason}{note}")
}

/// Who checks it and how.
fn check(instance: &Value) -> String {
    let Some(check) = instance.get("check") else { return "-".to_owned() };
    let kind = cell(check, "/kind");
    if kind == "owner" {
        return "by its owner".to_owned();
    }
    let detail = ["/path", "/service", "/port"].map(|field| cell(check, field));
    let detail: Vec<_> = detail.into_iter().filter(|detail| detail != "-").collect();
    let (interval, timeout) = (cell(check, "/interval"), cell(check, "/timeout"));
    let (bad, good) = (number(check, "/unhealthy_threshold"), number(check, "/healthy_threshold"));
    format!(
        "{} every {interval}, {timeout} to answer; {bad} bad or {good} good in a row count",
        [vec![kind], detail].concat().join(" ")
    )
}

fn lease(instance: &Value) -> String {
    match instance.pointer("/lease/ttl") {
        Some(_) => cell(instance, "/lease/ttl"),
        None if instance.pointer("/lease/session").is_some() => "session".to_owned(),
        None => "-".to_owned(),
    }
}

fn metadata(instance: &Value, separator: &str) -> String {
    let entries = instance.get("metadata").and_then(Value::as_object).into_iter().flatten();
    let pairs: Vec<String> = entries
        .map(|(key, value)| format!("{}={}", clean(key), clean(value.as_str().unwrap_or_default())))
        .collect();
    if pairs.is_empty() { "-".to_owned() } else { pairs.join(separator) }
}

fn instances_table(document: &Value, width: Option<usize>) -> String {
    let instances = document.get("instances").and_then(Value::as_array).into_iter().flatten();
    let rows: Vec<_> = instances.map(instance_row).collect();
    render(&INSTANCE_COLUMNS, &rows, width)
}

fn instance_table(instance: &Value, _: Option<usize>) -> String {
    let field = |pointer: &str| cell(instance, pointer);
    let rows = [
        ("Service", field("/service")),
        ("Id", field("/id")),
        ("Incarnation", field("/incarnation")),
        ("Address", endpoint(instance)),
        ("State", field("/state")),
        ("Stale", stale(instance).unwrap_or_else(|| "no".to_owned())),
        ("Damped", damped(instance).unwrap_or_else(|| "no".to_owned())),
        ("Health", health(instance)),
        ("Check", check(instance)),
        ("Weight", field("/weight")),
        ("Region", field("/locality/region")),
        ("Zone", field("/locality/zone")),
        ("Sub-zone", field("/locality/sub_zone")),
        ("Lease", lease(instance)),
        (
            "Registered",
            format!("{} ({} ago)", field("/registered_at"), age(instance, "/registered_at", rt::now())),
        ),
        ("Revision", field("/revision")),
        ("Metadata", metadata(instance, "\n             ")),
    ];
    rows.iter().map(|(name, value)| format!("{name:<11}  {value}\n")).collect()
}

/// What an instance was at a time.
fn past_table(document: &Value, _: Option<usize>) -> String {
    let field = |pointer: &str| cell(document, pointer);
    let known = match field("/state").as_str() {
        "registered" => "registered".to_owned(),
        "absent" => "not registered".to_owned(),
        _ => match field("/begins").as_str() {
            "-" => "not known: nothing is remembered of this service".to_owned(),
            begins => format!("not known any more: what is remembered of this service begins at {begins}"),
        },
    };
    let mut text = format!("{:<10}  {}/{}\n", "Instance", field("/service"), field("/id"));
    text.push_str(&format!("{:<10}  {}: {known}\n", "At", field("/at")));
    if document.get("entry").is_some_and(|entry| !entry.is_null()) {
        let why = match field("/entry/why").as_str() {
            "-" => String::new(),
            why => format!(": {why}"),
        };
        text.push_str(&format!(
            "{:<10}  {} at {} by {}, revision {}{why}\n",
            "Since",
            field("/entry/what"),
            field("/entry/at"),
            field("/entry/by"),
            field("/entry/revision")
        ));
    }
    if let Some(instance) = document.get("instance").filter(|instance| !instance.is_null()) {
        text.push('\n');
        text.push_str(&instance_table(instance, None));
    }
    text
}

fn explain_table(document: &Value, width: Option<usize>) -> String {
    let empty = Value::Null;
    let instance = document.get("instance").unwrap_or(&empty);
    let abandoned = document.get("abandoned").and_then(Value::as_bool).unwrap_or_default();
    let ttl = instance.pointer("/lease/ttl").is_some();
    let stale = stale(instance);
    let held = match (ttl, abandoned) {
        _ if stale.is_some() => format!(
            "by nobody any more; it stays until it refuses connections, its owner comes back, or `disco service release {}`",
            cell(instance, "/service")
        ),
        (true, _) => format!("by renewals, at least every {}", lease(instance)),
        (false, false) => "by the open session of its owner, such as `disco run`".to_owned(),
        (false, true) => {
            "by nobody: its owner's session is lost, and it is removed unless the owner comes back".to_owned()
        }
    };
    let state = match cell(instance, "/state").as_str() {
        "draining" => "draining: no new calls".to_owned(),
        other => other.to_owned(),
    };
    let list = |name: &str| document.get(name).and_then(Value::as_array).cloned().unwrap_or_default();
    let (views, proxies) = (list("views"), list("proxies"));
    let total = |field: &str| views.iter().map(|view| number(view, field)).sum::<u64>();
    let each = views
        .iter()
        .map(|view| {
            format!("{} of {} {}", number(view, "/see"), number(view, "/proxies"), cell(view, "/client"))
        })
        .collect::<Vec<_>>();
    let seen = match views.as_slice() {
        [] => "no proxy is connected".to_owned(),
        _ => format!(
            "{} of {}; by view: {}",
            total("/see"),
            count(total("/proxies"), "proxy"),
            each.join(", ")
        ),
    };
    let age = age(instance, "/registered_at", rt::now());
    let rows = [
        (
            "Instance",
            format!("{}/{} at {}", cell(instance, "/service"), cell(instance, "/id"), endpoint(instance)),
        ),
        ("Registered", format!("{age} ago, incarnation {}", cell(instance, "/incarnation"))),
        ("Held", held),
        ("State", state),
        ("Health", health(instance)),
        ("Changed", format!("at revision {}", cell(instance, "/revision"))),
        ("Seen by", seen),
    ];
    let mut text: String = rows.iter().map(|(name, value)| format!("{name:<10}  {value}\n")).collect();
    if let Some(stale) = stale {
        text.push_str(&format!("{:<10}  {stale}\n", "Stale"));
    }
    if let Some(damped) = damped(instance) {
        text.push_str(&format!("{:<10}  {damped}\n", "Damped"));
    }
    let columns = [
        Column::new("NODE"),
        Column::new("SEES IT"),
        Column::new("WHY"),
        Column::wide("PEER"),
        Column::wide("PROTOCOL"),
    ];
    let rows: Vec<_> = proxies
        .iter()
        .map(|proxy| {
            ["/node_id", "/sees", "/why", "/peer", "/protocol"].map(|field| cell(proxy, field)).to_vec()
        })
        .collect();
    if !rows.is_empty() {
        text.push('\n');
        text.push_str(&render(&columns, &rows, width));
    }
    text
}

async fn register_one(http: &Http, register: &Register) -> Result<(), Failure> {
    let answer = http
        .send(Method::PUT, &path(&register.instance, "", None), Some(&body(register)), Duration::ZERO)
        .await?;
    let ttl = cell(&answer, "/lease/ttl");
    print(&format!("{} registered at revision {}\n", register.instance, number(&answer, "/revision")))?;
    note(&format!("it is forgotten in {ttl} unless it is registered again by then"));
    Ok(())
}

/// Absent options are left out: the server has the defaults, and checks every value.
fn body(register: &Register) -> Value {
    let mut body = Map::new();
    body.insert("address".into(), json!(register.address));
    body.insert("port".into(), json!(register.port));
    let locality: Map<String, Value> = [("region", &register.region), ("zone", &register.zone)]
        .into_iter()
        .filter_map(|(name, part)| Some((name.to_owned(), json!(part.as_ref()?))))
        .collect();
    if !locality.is_empty() {
        body.insert("locality".into(), Value::Object(locality));
    }
    if !register.metadata.is_empty() {
        let metadata = register.metadata.iter().map(|(key, value)| (key.clone(), json!(value))).collect();
        body.insert("metadata".into(), Value::Object(metadata));
    }
    let optional = [
        ("weight", register.weight.map(Value::from)),
        ("ttl", register.ttl.map(|ttl| Value::from(format_duration(ttl)))),
        ("incarnation", register.incarnation.map(Value::from)),
    ];
    body.extend(optional.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))));
    if let Some(Checked(Some(probe))) = &register.health {
        let kind = match probe {
            Probe::Tcp => json!({"kind": "tcp"}),
            Probe::Http { path, .. } => json!({"kind": "http", "path": path}),
            Probe::Grpc { service } => json!({"kind": "grpc", "service": service}),
        };
        let time = |time: Option<Duration>| time.map(|time| Value::from(format_duration(time)));
        let settings = [
            ("port", register.health_port.map(Value::from)),
            ("interval", time(register.health_interval)),
            ("timeout", time(register.health_timeout)),
        ];
        let mut check = kind.as_object().cloned().unwrap_or_default();
        check.extend(settings.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))));
        body.insert("health".into(), Value::Object(check));
    }
    Value::Object(body)
}

async fn drain(http: &Http, drain: &Drain) -> Result<(), Failure> {
    let Which { instance, incarnation } = &drain.which;
    let answer =
        http.send(Method::POST, &path(instance, "/drain", *incarnation), None, Duration::ZERO).await?;
    let revision = number(&answer, "/revision");
    if drain.wait.is_zero() {
        return print(&format!("{instance} drains from revision {revision}\n"));
    }
    let started = tokio::time::Instant::now();
    loop {
        let asked = tokio::time::Instant::now();
        let left = drain.wait.saturating_sub(started.elapsed());
        let wait = left.min(ASK);
        let path =
            format!("/v1/revisions/{revision}?service={}&wait={}ms", instance.service, wait.as_millis());
        let delivery = ask_all(http, &path, wait, Elsewhere::No).await?;
        let acknowledged = number(&delivery, "/acknowledged");
        if delivery.get("complete").and_then(Value::as_bool).unwrap_or_default() {
            let took = started.elapsed().as_millis();
            let by = match acknowledged {
                0 => "no proxy holds it".to_owned(),
                _ => format!("{} acknowledged it in {took} ms", count(acknowledged, "proxy")),
            };
            return print(&format!("{instance} takes no new calls from revision {revision}: {by}\n"));
        }
        if left.is_zero() || started.elapsed() >= drain.wait {
            return Err(Failure::not_yet(format!(
                "{instance} drains from revision {revision}, but not all proxies acknowledged it within {}: {} did; \
                 not yet: {}\n  `disco rollout status {revision} --service {}` shows since when and why",
                format_duration(drain.wait),
                acknowledged,
                some_of(&pending(&delivery).into_iter().chain(unknown(&delivery)).collect::<Vec<_>>()),
                instance.service
            )));
        }
        tokio::time::sleep_until(asked + PAUSE.min(left)).await;
    }
}
