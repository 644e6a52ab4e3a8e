//! How instances are printed.

use std::net::{IpAddr, SocketAddr};

use serde_json::Value;

use crate::{
    cli::{
        output::{Column, age, cell, clean, count, number, render},
        servers::unknown,
    },
    rt,
};

/// Columns of [`row`].
const COLUMNS: [Column; 17] = [
    Column::new("SERVICE"),
    Column::new("ID"),
    Column::whole("ADDRESS"),
    Column::whole("STATE"),
    Column::whole("HEALTH"),
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

/// Where the role comes in, if any of the instances has one: few services are replicated.
const ROLE_AT: usize = 3;

/// Instances as a table.
pub(in crate::cli) fn table<'a>(
    instances: impl Iterator<Item = &'a Value> + Clone,
    width: Option<usize>,
) -> String {
    let mut columns = COLUMNS.to_vec();
    let mut rows: Vec<_> = instances.clone().map(row).collect();
    if instances.clone().any(|instance| instance.get("role").is_some()) {
        columns.insert(ROLE_AT, Column::whole("ROLE"));
        rows.iter_mut()
            .zip(instances)
            .for_each(|(row, instance)| row.insert(ROLE_AT, cell(instance, "/role")));
    }
    render(&columns, &rows, width)
}

/// One instance as a row of a table.
fn row(instance: &Value) -> Vec<String> {
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
        match instance.get("stale") {
            Some(_) => cell(instance, "/stale/reason"),
            None => cell(instance, "/damped/reason"),
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

/// Its IP address and port.
pub(in crate::cli) fn endpoint(instance: &Value) -> String {
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

/// A list of instances.
pub(super) fn many(document: &Value, width: Option<usize>) -> String {
    let instances = document.get("instances").and_then(Value::as_array).into_iter().flatten();
    table(instances, width)
}

/// Everything about one instance.
pub(super) fn one(instance: &Value, _: Option<usize>) -> String {
    let field = |pointer: &str| cell(instance, pointer);
    let rows = [
        ("Service", field("/service")),
        ("Id", field("/id")),
        ("Incarnation", field("/incarnation")),
        ("Address", endpoint(instance)),
        ("State", field("/state")),
        ("Role", field("/role")),
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
    let rows = rows.iter().filter(|(name, value)| *name != "Role" || value != "-");
    rows.map(|(name, value)| format!("{name:<11}  {value}\n")).collect()
}

/// What an instance was at a time.
pub(super) fn past(document: &Value, _: Option<usize>) -> String {
    let field = |pointer: &str| cell(document, pointer);
    let known = match field("/state").as_str() {
        "registered" => "registered".to_owned(),
        "absent" => "not registered".to_owned(),
        _ => match field("/begins").as_str() {
            "-" => "not known: nothing is remembered of this service".to_owned(),
            begins => format!("not known: what is remembered of this service begins at {begins}"),
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
        text.push_str(&one(instance, None));
    }
    text
}

/// Who holds an instance, and who sees it.
pub(super) fn explained(document: &Value, width: Option<usize>) -> String {
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
    if instance.get("role").is_some() {
        text.push_str(&format!("{:<10}  {}\n", "Role", cell(instance, "/role")));
    }
    if let Some(stale) = stale {
        text.push_str(&format!("{:<10}  {stale}\n", "Stale"));
    }
    if let Some(damped) = damped(instance) {
        text.push_str(&format!("{:<10}  {damped}\n", "Damped"));
    }
    let columns = [
        Column::new("NODE"),
        Column::new("SEES IT"),
        Column::sentence("WHY"),
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
    for line in unknown(document) {
        text.push_str(&format!("{line}\n"));
    }
    text
}
