use std::{collections::BTreeMap, time::Duration};

use clap::{Args, Subcommand};
use http::Method;
use jiff::Timestamp;
use serde_json::{Value, json};

use super::{
    Failure, Global,
    instance::{endpoint, table},
    output::{
        Column, ListOptions, Refresh, ShowOptions, View, age, cell, clean, count, list, number, print,
        render, some_of,
    },
    parse,
    servers::{pending, rollout},
};
use crate::{client::Http, model::ServiceId, rt};

/// Verbs of `disco service`.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// List services
    #[command(visible_alias = "ls", after_help = "Example:\n  disco service list -o json")]
    List(ListOptions),
    /// Show one service: its instances, their zones, and which proxies have its newest state
    #[command(after_help = "Example:\n  disco service show greeter")]
    Show(Show),
    /// Show the calls to a service, by locality, as its clients report them
    #[command(
        long_about = "Show the calls to a service, by locality, as its clients report them.\n\nSidecars and gRPC clients count \
                      their calls and report them every `xds.load_report_interval` (10s by default) to the server that they \
                      are connected to: these are the sums of what this server was told last. IN PROGRESS are calls under \
                      way at that time, the others are calls a second, each retry as one. A call that found no connection counts \
                      among the errors only.",
        after_help = "Example:\n  disco service load greeter"
    )]
    Load(Show),
    /// Show what changed in a service, when, by whom and why
    #[command(
        long_about = "Show what changed in a service, when, by whom and why, oldest first.\n\nIt is kept as long as \
                      `history.keep` says (a week by default), up to `history.entries` and `history.per_service`.",
        after_help = "Example:\n  disco service history greeter --since 1h"
    )]
    History {
        /// Its name
        service: ServiceId,
        /// Only what changed since then: a time, e.g. 2026-01-31T12:00:00Z, or how long ago, e.g. 10m
        #[arg(long, value_name = "TIME", value_parser = parse::when)]
        since: Option<Timestamp>,
        #[command(flatten)]
        options: ShowOptions,
    },
    /// Remove the stale instances of a service, and show proxies those that are damped
    #[command(
        long_about = "Remove the stale instances of a service, and show proxies those that are damped.\n\nAn instance whose lease is \
                      over and that accepts connections is held, as is one that answers nothing when more are silent than can be \
                      believed: it goes on taking calls, and is shown as stale. This removes it, whatever it answers; one whose \
                      owner is alive comes back with its next registration.\n\nAn instance that comes and goes is damped: \
                      proxies are not told of it until it has lasted for a while. This has them told now.",
        after_help = "Example:\n  disco service release greeter"
    )]
    Release {
        /// Its name
        service: ServiceId,
    },
    /// Show what the instances of a service say of themselves many times a second
    #[command(
        long_about = "Show what the instances of a service say of themselves many times a second, with `disco instance publish` or \
                      over the API. It is never sent to proxies. Programs watch it over gRPC: \
                      disco.v1.Registry/WatchLive.",
        after_help = "Example:\n  disco service live chain --watch"
    )]
    Live {
        /// Its name
        service: ServiceId,
        #[command(flatten)]
        options: ListOptions,
    },
    /// Forget a service that has no instances
    #[command(after_help = "Example:\n  disco service remove greeter")]
    Remove {
        /// Its name
        service: ServiceId,
    },
}

/// Arguments of `disco service show` and `load`.
#[derive(Debug, Args)]
pub(super) struct Show {
    /// Its name
    service: ServiceId,
    #[command(flatten)]
    options: ShowOptions,
}

pub(super) async fn run(command: Command, global: &Global) -> Result<(), Failure> {
    let http = global.client()?;
    match command {
        Command::List(options) => list(&options, async |_| services(&http).await).await,
        Command::Show(Show { service, options }) => show(&http, &service).await?.print(options.output),
        Command::Load(Show { service, options }) => {
            let document = http.get(&format!("/v1/services/{service}/load"), Duration::ZERO).await?;
            View { document, items: None, table: load_table, empty: "" }.print(options.output)
        }
        Command::History { service, since, options } => {
            let query = since.map(|since| format!("?since={since}")).unwrap_or_default();
            let document =
                http.get(&format!("/v1/services/{service}/history{query}"), Duration::ZERO).await?;
            let empty = "nothing is remembered of it in that time; `disco service list` shows what there is";
            View { document, items: Some("entries"), table: history_table, empty }.print(options.output)
        }
        Command::Release { service } => {
            let path = format!("/v1/services/{service}/release");
            let answer = http.send(Method::POST, &path, None, Duration::ZERO).await?;
            let (removed, published) = (number(&answer, "/removed"), number(&answer, "/published"));
            print(&match (removed, published) {
                (0, 0) => format!("{service} has no stale and no damped instances\n"),
                _ => format!(
                    "{service}: {} removed, {} published at revision {}\n",
                    count(removed, "stale instance"),
                    count(published, "damped instance"),
                    number(&answer, "/revision")
                ),
            })
        }
        Command::Live { service, options } => {
            list(&options, async |refresh| live(&http, &service, refresh).await).await
        }
        Command::Remove { service } => {
            let answer =
                http.send(Method::DELETE, &format!("/v1/services/{service}"), None, Duration::ZERO).await?;
            print(&format!("{service} removed at revision {}\n", number(&answer, "/revision")))
        }
    }
}

async fn services(http: &Http) -> Result<View, Failure> {
    Ok(View {
        document: http.get("/v1/services", Duration::ZERO).await?,
        items: Some("services"),
        table: services_table,
        empty: "no services yet; register one with `disco run --service NAME --port PORT -- COMMAND`",
    })
}

async fn live(http: &Http, service: &ServiceId, refresh: Refresh) -> Result<View, Failure> {
    let document = refresh.get(http, &format!("/v1/services/{service}/live")).await?;
    let empty = "no instance says anything; `disco instance publish SERVICE/ID KEY=VALUE` does";
    Ok(View { document, items: Some("instances"), table: live_tables, empty })
}

fn live_tables(document: &Value, width: Option<usize>) -> String {
    let instances = document.get("instances").and_then(Value::as_array).into_iter().flatten();
    let rows: Vec<_> = instances
        .map(|instance| {
            let said = instance.get("live").and_then(Value::as_object).into_iter().flatten();
            let said: Vec<String> = said
                .map(|(key, value)| clean(&format!("{key}={}", value.as_str().unwrap_or_default())))
                .collect();
            vec![cell(instance, "/id"), said.join(" "), age(instance, "/published_at", rt::now())]
        })
        .collect();
    render(&["ID", "SAYS", "AGE"].map(Column::new), &rows, width)
}

fn services_table(document: &Value, width: Option<usize>) -> String {
    let services = document.get("services").and_then(Value::as_array).into_iter().flatten();
    let fields = ["/name", "/serving", "/draining", "/unhealthy", "/held", "/revision"];
    let rows: Vec<_> = services.map(|service| fields.map(|field| cell(service, field)).to_vec()).collect();
    render(&["NAME", "SERVING", "DRAINING", "UNHEALTHY", "STALE", "REVISION"].map(Column::new), &rows, width)
}

async fn show(http: &Http, service: &ServiceId) -> Result<View, Failure> {
    let mut answer = http.get(&format!("/v1/services/{service}/instances"), Duration::ZERO).await?;
    let revision = number(&answer, "/revision");
    let delivery = rollout(http, revision, Some(service), Duration::ZERO, None).await?;

    let instances = answer.get_mut("instances").map(Value::take).unwrap_or_default();
    let each = || instances.as_array().into_iter().flatten();
    let (mut serving, mut draining, mut unhealthy) = (0, 0, 0);
    for instance in each() {
        match (cell(instance, "/state").as_str(), cell(instance, "/health/verdict").as_str()) {
            ("draining", _) => draining += 1,
            (_, "unhealthy") => unhealthy += 1,
            _ => serving += 1,
        }
    }
    let mut zones = BTreeMap::<&str, usize>::new();
    for instance in each() {
        let zone = instance.pointer("/locality/zone").and_then(Value::as_str).unwrap_or_default();
        *zones.entry(zone).or_default() += 1;
    }
    let document = json!({
        "name": service.as_str(),
        "revision": revision,
        "serving": serving,
        "draining": draining,
        "unhealthy": unhealthy,
        "held": each().filter(|instance| instance.get("stale").is_some()).count(),
        "damped": each().filter(|instance| instance.get("damped").is_some()).count(),
        "zones": zones,
        "proxies": {"acknowledged": delivery.get("acknowledged"), "pending": delivery.get("pending")},
        "instances": instances,
        "roles": answer.get("roles"),
        "stale": answer.get("stale"),
    });
    Ok(View { document, items: None, table: service_table, empty: "" })
}

fn service_table(document: &Value, width: Option<usize>) -> String {
    let zones = document.get("zones").and_then(Value::as_object).into_iter().flatten();
    let zones: Vec<String> = zones
        .map(|(zone, count)| {
            let zone = if zone.is_empty() { "(none)".to_owned() } else { clean(zone) };
            format!("{zone} {count}")
        })
        .collect();
    let field = |name: &str| cell(document, name);
    let mut text = format!(
        "Service    {}\nRevision   {}\nInstances  {} serving, {} draining, {} unhealthy\n",
        field("/name"),
        field("/revision"),
        field("/serving"),
        field("/draining"),
        field("/unhealthy")
    );
    if number(document, "/held") > 0 {
        text.push_str(&format!(
            "Stale      {}: their leases are over; they stay unless they refuse connections\n",
            number(document, "/held")
        ));
    }
    if number(document, "/damped") > 0 {
        text.push_str(&format!(
            "Damped     {}: they come and go; proxies are told of them when they last\n",
            number(document, "/damped")
        ));
    }
    if let Some(roles) = document.get("roles").filter(|roles| !roles.is_null()) {
        let leader = match cell(roles, "/leader").as_str() {
            "-" => "none now".to_owned(),
            leader => leader.to_owned(),
        };
        text.push_str(&format!("Leader     {leader}, term {}\n", number(roles, "/term")));
        let groups = roles.get("names").and_then(Value::as_array).into_iter().flatten();
        let groups = groups.filter_map(Value::as_str).map(clean);
        let names: Vec<_> = std::iter::once(field("/name")).chain(groups).collect();
        text.push_str(&format!("Called     {}\n", names.join(", ")));
    }
    if !zones.is_empty() {
        text.push_str(&format!("Zones      {}\n", some_of(&zones)));
    }
    let pending = pending(document.get("proxies").unwrap_or(&Value::Null));
    text.push_str(&format!("Proxies    {} up to date", number(document, "/proxies/acknowledged")));
    if !pending.is_empty() {
        text.push_str(&format!("; not yet: {}", some_of(&pending)));
    }
    text.push('\n');
    let instances = document.get("instances").and_then(Value::as_array).into_iter().flatten();
    if instances.clone().next().is_some() {
        text.push('\n');
        text.push_str(&table(instances, width));
    }
    text
}

fn history_table(document: &Value, width: Option<usize>) -> String {
    let entries = document.get("entries").and_then(Value::as_array).into_iter().flatten();
    let columns = [
        Column::whole("AT"),
        Column::new("ID"),
        Column::new("WHAT"),
        Column::new("BY"),
        Column::sentence("WHY"),
        Column::wide("INCARNATION"),
        Column::wide("REVISION"),
        Column::wide("ADDRESS"),
        Column::wide("STATE"),
        Column::wide("WEIGHT"),
    ];
    let fields = ["/at", "/id", "/what", "/by", "/why", "/incarnation", "/revision"];
    let rows: Vec<_> = entries
        .map(|entry| {
            let mut row = fields.map(|field| cell(entry, field)).to_vec();
            let instance = entry.get("instance").filter(|instance| !instance.is_null());
            row.push(instance.map_or_else(|| "-".to_owned(), endpoint));
            row.extend(["/instance/state", "/instance/weight"].map(|field| cell(entry, field)));
            row
        })
        .collect();
    render(&columns, &rows, width)
}

fn load_table(document: &Value, width: Option<usize>) -> String {
    let each = document.get("localities").and_then(Value::as_array).into_iter().flatten();
    let fields =
        ["/region", "/zone", "/sub_zone", "/reporters", "/rps", "/errors_per_second", "/in_progress"];
    let rows: Vec<_> = each.map(|locality| fields.map(|field| cell(locality, field)).to_vec()).collect();
    let drops: Vec<String> = document
        .get("drops")
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
        .map(|(category, rate)| format!("{} {rate}", clean(category)))
        .collect();
    let mut text = if rows.is_empty() {
        format!(
            "no client has reported calls to {} yet; they report every {}\n",
            cell(document, "/service"),
            cell(document, "/interval")
        )
    } else {
        let columns = ["REGION", "ZONE", "SUB-ZONE", "REPORTERS", "CALLS/S", "ERRORS/S", "IN PROGRESS"]
            .map(Column::new);
        render(&columns, &rows, width)
    };
    if !drops.is_empty() {
        text.push_str(&format!("\nDropped by clients, calls a second: {}\n", some_of(&drops)));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads() {
        let text = |document: Value| load_table(&document, Some(80));
        let none = json!({"service": "greeter", "interval": "10s", "localities": [], "drops": {}});
        assert_eq!(text(none), "no client has reported calls to greeter yet; they report every 10s\n");
        let text = text(json!({
            "service": "greeter", "interval": "10s", "drops": {"other": 0.5},
            "localities": [{"region": "r", "zone": "z\u{1b}", "sub_zone": "", "reporters": 2, "rps": 12.345,
                            "errors_per_second": 0.0, "in_progress": 3}],
        }));
        let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(rows[1], ["r", "z\\u{1b}", "-", "2", "12.345", "0.0", "3"], "{text}");
        assert!(text.ends_with("\nDropped by clients, calls a second: other 0.5\n"), "{text}");
    }

    #[test]
    fn who_leads() {
        let instance = |id: &str, role: &str| {
            json!({"service": "db", "id": id, "address": "127.0.0.1", "port": 1, "state": "serving", "role": role,
                   "weight": 1, "locality": {"zone": ""}, "registered_at": "2000-01-01T00:00:00Z"})
        };
        let document = |leader: Value| {
            json!({"name": "db", "revision": 7, "zones": {}, "proxies": {"acknowledged": 0, "pending": []},
                   "roles": {"term": 3, "leader": leader, "names": ["db.any", "db.leader"]},
                   "instances": [instance("a", "leader"), instance("b", "follower")]})
        };
        let text = service_table(&document(json!("a")), Some(100));
        assert!(text.contains("\nLeader     a, term 3\nCalled     db, db.any, db.leader\n"), "{text}");
        let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        let rows = &rows[rows.len() - 3..];
        assert_eq!(
            rows.iter().map(|row| row[3]).collect::<Vec<_>>(),
            ["ROLE", "leader", "follower"],
            "{text}"
        );
        let text = service_table(&document(Value::Null), Some(100));
        assert!(text.contains("\nLeader     none now, term 3\n"), "{text}");
    }

    #[test]
    fn a_service_in_80_columns() {
        let instance = |id: &str, state: &str| {
            json!({"service": "greeter", "id": id, "address": "127.0.0.1", "port": 50051, "state": state,
                   "weight": 1, "locality": {"zone": "z1"}, "registered_at": "2000-01-01T00:00:00Z"})
        };
        let document = json!({
            "name": "greeter", "revision": 7, "serving": 1, "draining": 1, "unhealthy": 0, "zones": {"": 1, "z1": 1},
            "proxies": {"acknowledged": 2, "pending": ["edge-\u{1b}1"]},
            "instances": [instance("a", "serving"), instance(&"b".repeat(128), "draining")],
        });
        let text = service_table(&document, Some(80));
        assert!(text.starts_with(
            "Service    greeter\nRevision   7\nInstances  1 serving, 1 draining, 0 unhealthy\nZones      (none) 1, z1 1\n\
             Proxies    2 up to date; not yet: edge-\\u{1b}1\n\nSERVICE "
        ));
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        assert!(text.contains(" 127.0.0.1:50051 "), "{text}");
    }
}
