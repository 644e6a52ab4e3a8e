use std::time::Duration;

use clap::Args;
use http::Method;
use serde_json::{Map, Value, json};

use super::path;
use crate::{
    cli::{
        Failure,
        output::{cell, note, number, print},
        parse::{self, KEY},
    },
    client::Http,
    model::{InstanceKey, Probe, format_duration, parse_duration},
};

/// Arguments of `disco instance register`.
#[derive(Debug, Args)]
pub(in crate::cli) struct Register {
    /// Which instance, e.g. greeter/a
    #[arg(value_name = KEY, value_parser = parse::instance_key)]
    instance: InstanceKey,
    /// Where it listens; an IP address, never a host name
    #[arg(long, value_name = "IP")]
    address: String,
    /// The port that takes its calls
    #[arg(long, value_parser = parse::whole)]
    port: u64,
    /// Where it runs, widest: e.g. eu-west
    #[arg(long)]
    region: Option<String>,
    /// Where it runs: e.g. eu-west-1a
    #[arg(long)]
    zone: Option<String>,
    /// Share of the calls relative to the service's other instances
    #[arg(long, value_name = "N", value_parser = parse::whole)]
    weight: Option<u64>,
    /// What to say of it; may be given several times
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse::pair)]
    metadata: Vec<(String, String)>,
    /// Forget it after this time without renewal
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    ttl: Option<Duration>,
    /// Which run of the id this is; a later run has a greater number
    #[arg(long, value_name = "N", value_parser = parse::whole)]
    incarnation: Option<u64>,
    /// How the server is to check it: `tcp`, `http[:/PATH]`, `grpc[:SERVICE]` or `none` [default: none]
    #[arg(long, value_name = "CHECK", value_parser = parse_check)]
    health: Option<Checked>,
    /// The port to check, if it is another one
    #[arg(long, value_name = "PORT", requires = "health", value_parser = parse::whole)]
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

pub(super) async fn run(http: &Http, register: &Register) -> Result<(), Failure> {
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
