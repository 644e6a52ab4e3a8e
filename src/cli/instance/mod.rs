//! `disco instance`: the running copies of services.

mod register;
mod show;

use std::time::Duration;

use clap::{Args, Subcommand};
use http::Method;
use jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::{
    Failure, Global,
    output::{ListOptions, Refresh, ShowOptions, View, count, list, number, print, some_of},
    parse::{self, KEY},
    servers::{Elsewhere, ask_all, is_complete, pending, rollout, unknown},
};
use crate::{
    client::{Http, HttpError},
    model::{InstanceKey, ServiceId, format_duration, parse_duration},
};
use register::Register;
pub(super) use show::{endpoint, table};

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
        #[arg(value_name = KEY, value_parser = parse::instance_key)]
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
        #[arg(value_name = KEY, value_parser = parse::instance_key)]
        instance: InstanceKey,
        /// Tell what it was then: a time, e.g. 2026-01-31T12:00:00Z, or how long ago, e.g. 10m
        #[arg(long, value_name = "TIME", value_parser = parse::when)]
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
        #[arg(value_name = KEY, value_parser = parse::instance_key)]
        instance: InstanceKey,
        /// Everything that there is to say
        #[arg(value_name = "KEY=VALUE", value_parser = parse::pair)]
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

/// Arguments that name one run of one instance.
#[derive(Debug, Args)]
pub(super) struct Which {
    /// Which instance, e.g. greeter/a
    #[arg(value_name = KEY, value_parser = parse::instance_key)]
    instance: InstanceKey,
    /// Only if it is this run of it
    #[arg(long, value_name = "N", value_parser = parse::whole)]
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
            View { document, items: None, table: show::one, empty: "" }.print(options.output)
        }
        Command::Explain { instance, at: Some(at), options } => {
            let path = format!("{}?at={at}", path(&instance, "/explain", None));
            let document = http.get(&path, Duration::ZERO).await?;
            View { document, items: None, table: show::past, empty: "" }.print(options.output)
        }
        Command::Explain { instance, at: None, options } => {
            let path = path(&instance, "/explain", None);
            let document = ask_all(&http, &path, Duration::ZERO, Elsewhere::No).await?;
            View { document, items: None, table: show::explained, empty: "" }.print(options.output)
        }
        Command::Register(arguments) => register::run(&http, &arguments).await,
        Command::Publish { instance, entries } => {
            let entries: Map<String, Value> =
                entries.into_iter().map(|(key, value)| (key, Value::String(value))).collect();
            let said = count(entries.len() as u64, "entry");
            let body = json!({ "live": entries });
            http.send(Method::PUT, &path(&instance, "/live", None), Some(&body), Duration::ZERO).await?;
            print(&format!("{instance} published {said}\n"))
        }
        Command::Drain(arguments) => drain(&http, &arguments).await,
        Command::Deregister { which } => {
            let path = path(&which.instance, "", which.incarnation);
            let answer = http.send(Method::DELETE, &path, None, Duration::ZERO).await?;
            print(&format!(
                "{} is not registered any more, as of revision {}\n",
                which.instance,
                number(&answer, "/revision")
            ))
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
    View { document, items: Some("instances"), table: show::many, empty: NO_INSTANCES }
}

async fn instances_of(http: &Http, service: &ServiceId, refresh: Refresh) -> Result<View, Failure> {
    Ok(instances_view(refresh.get(http, &format!("/v1/services/{service}/instances")).await?))
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

async fn drain(http: &Http, drain: &Drain) -> Result<(), Failure> {
    let Which { instance, incarnation } = &drain.which;
    let answer =
        http.send(Method::POST, &path(instance, "/drain", *incarnation), None, Duration::ZERO).await?;
    let revision = number(&answer, "/revision");
    if drain.wait.is_zero() {
        return print(&format!("{instance} drains from revision {revision}\n"));
    }
    let started = tokio::time::Instant::now();
    let delivery = rollout(http, revision, Some(&instance.service), drain.wait, None).await?;
    let acknowledged = number(&delivery, "/acknowledged");
    if is_complete(&delivery) {
        let took = started.elapsed().as_millis();
        let by = match acknowledged {
            0 => "no proxy holds it".to_owned(),
            _ => format!("{} acknowledged it in {took} ms", count(acknowledged, "proxy")),
        };
        return print(&format!("{instance} takes no new calls from revision {revision}: {by}\n"));
    }
    Err(Failure::not_yet(format!(
        "{instance} drains from revision {revision}, but not all proxies acknowledged it within {}: {acknowledged} did; not \
         yet: {}\n  `disco rollout status {revision} --service {}` shows since when and why",
        format_duration(drain.wait),
        some_of(&pending(&delivery).into_iter().chain(unknown(&delivery)).collect::<Vec<_>>()),
        instance.service
    )))
}
