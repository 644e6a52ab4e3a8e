use std::time::Duration;

use clap::{Subcommand, ValueEnum};
use serde_json::Value;

use super::{
    Failure, Global,
    output::{
        Column, Format, ListOptions, ShowOptions, View, age, cell, clean, count, list, number, print, render,
    },
    servers::{Elsewhere, ask_all, unknown},
};
use crate::{client::Http, rt};

/// Verbs of `disco proxy`.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// List connected proxies: what they are, and whether they have everything
    #[command(visible_alias = "ls", after_help = "Example:\n  disco proxy list --watch")]
    List(ListOptions),
    /// Show what one proxy was sent, has acknowledged and has rejected
    #[command(visible_alias = "show", after_help = "Example:\n  disco proxy status greeter-sidecar -o yaml")]
    Status {
        /// Its node id
        node: String,
        #[command(flatten)]
        options: ShowOptions,
    },
    /// Show the resources of one proxy: each with its version and whether the proxy has it
    #[command(
        long_about = "Show the resources of one proxy: each with its version and whether the proxy has it.\n\nIn the formats \
                      for programs with their content.",
        after_help = "Examples:\n  disco proxy resources greeter-sidecar\n  disco proxy resources greeter-sidecar cluster -o yaml"
    )]
    Resources {
        /// Its node id
        node: String,
        /// Only this type
        #[arg(value_name = "TYPE")]
        kind: Option<Kind>,
        #[command(flatten)]
        options: ShowOptions,
    },
    /// Compare what one proxy holds with what it is to hold; ends with 79 when they differ
    #[command(after_help = "Example:\n  disco proxy diff greeter-sidecar && echo in sync")]
    Diff {
        /// Its node id
        node: String,
        #[command(flatten)]
        options: ShowOptions,
    },
}

/// The types of resource that Disco has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Kind {
    /// CDS
    #[value(aliases = ["clusters", "cds"])]
    Cluster,
    /// EDS
    #[value(aliases = ["endpoint", "eds"])]
    Endpoints,
    /// LDS
    #[value(aliases = ["listeners", "lds"])]
    Listener,
    /// RDS
    #[value(aliases = ["routes", "rds"])]
    Route,
    /// VHDS
    #[value(name = "virtual_host", aliases = ["virtual-host", "virtual_hosts", "vhds"])]
    VirtualHost,
}

pub(super) async fn run(command: Command, global: &Global) -> Result<(), Failure> {
    let http = global.client()?;
    match command {
        Command::List(options) => list(&options, async |_| proxies(&http).await).await,
        Command::Status { node, options } => {
            let document = ask_all(&http, &path(&node, ""), Duration::ZERO, Elsewhere::Maybe).await?;
            View { document, items: Some("proxies"), table: proxy_tables, empty: "" }.print(options.output)
        }
        Command::Resources { node, kind, options } => {
            let body = !matches!(options.output, Format::Table | Format::Wide);
            let only = match kind {
                None => "",
                Some(Kind::Cluster) => "&type=cluster",
                Some(Kind::Endpoints) => "&type=endpoints",
                Some(Kind::Listener) => "&type=listener",
                Some(Kind::Route) => "&type=route",
                Some(Kind::VirtualHost) => "&type=virtual_host",
            };
            let path = path(&node, &format!("/resources?body={body}{only}"));
            let document = ask_all(&http, &path, Duration::ZERO, Elsewhere::Maybe).await?;
            View { document, items: Some("streams"), table: resource_tables, empty: "" }.print(options.output)
        }
        Command::Diff { node, options } => diff(&http, &node, options.output).await,
    }
}

/// A node id may have any characters.
fn path(node: &str, rest: &str) -> String {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~".contains(byte);
    let escape = |byte: u8| if plain(&byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") };
    format!("/v1/proxies/{}{rest}", node.bytes().map(escape).collect::<String>())
}

async fn diff(http: &Http, node: &str, format: Format) -> Result<(), Failure> {
    let mut document = ask_all(http, &path(node, "/resources"), Duration::ZERO, Elsewhere::Maybe).await?;
    let mut differences = 0u64;
    for stream in document.get_mut("streams").and_then(Value::as_array_mut).into_iter().flatten() {
        if let Some(resources) = stream.get_mut("resources").and_then(Value::as_array_mut) {
            // What does not exist is held by nobody.
            resources
                .retain(|resource| !matches!(cell(resource, "/state").as_str(), "acknowledged" | "absent"));
            differences += u64::try_from(resources.len()).unwrap_or(u64::MAX);
        }
    }
    if differences == 0 && matches!(format, Format::Table | Format::Wide) {
        return print(&with_unknown(&document, format!("{} holds what it is to hold\n", clean(node))));
    }
    View { document, items: Some("streams"), table: diff_tables, empty: "" }.print(format)?;
    match differences {
        0 => Ok(()),
        _ => Err(Failure::findings(format!("{} found", count(differences, "difference")))),
    }
}

fn resource_tables(document: &Value, width: Option<usize>) -> String {
    let columns = [
        Column::new("TYPE"),
        Column::new("NAME"),
        Column::new("VERSION"),
        Column::new("REVISION"),
        Column::new("STATE"),
        Column::wide("ERROR"),
    ];
    stream_tables(document, &columns, width, |resource| {
        let state = match (cell(resource, "/removed").as_str(), cell(resource, "/state")) {
            ("yes", state) => format!("removal {state}"),
            (_, state) => state,
        };
        let field = |name| cell(resource, name);
        vec![field("/type"), field("/name"), field("/version"), field("/revision"), state, field("/error")]
    })
}

fn diff_tables(document: &Value, width: Option<usize>) -> String {
    let columns = [
        Column::new("TYPE"),
        Column::new("NAME"),
        Column::new("IS TO HOLD"),
        Column::new("HOLDS"),
        Column::new("WHY"),
        Column::new("ERROR"),
    ];
    stream_tables(document, &columns, width, |resource| {
        let field = |name| cell(resource, name);
        let removed = field("/removed") == "yes";
        let wanted = match removed {
            true => format!("nothing@{}", field("/revision")),
            false => format!("{}@{}", field("/version"), field("/revision")),
        };
        let holds = match (removed, field("/earlier") == "yes") {
            (true, _) => field("/version"),
            (false, true) => "older".to_owned(),
            (false, false) => "nothing".to_owned(),
        };
        let why = match field("/state").as_str() {
            "sent" => "sent, not answered".to_owned(),
            "pending" => "not sent yet".to_owned(),
            other => other.to_owned(),
        };
        vec![field("/type"), field("/name"), wanted, holds, why, field("/error")]
    })
}

/// A table of the resources of each stream.
fn stream_tables(
    document: &Value,
    columns: &[Column],
    width: Option<usize>,
    row: impl Fn(&Value) -> Vec<String>,
) -> String {
    let streams = document.get("streams").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let tables = streams.iter().map(|stream| {
        let resources = stream.get("resources").and_then(Value::as_array).into_iter().flatten();
        let table = render(columns, &resources.map(&row).collect::<Vec<_>>(), width);
        match streams {
            [_] => table,
            _ => format!("Stream from {}\n{table}", cell(stream, "/peer")),
        }
    });
    with_unknown(document, tables.collect::<Vec<_>>().join("\n"))
}

/// The text, and after it which servers' proxies it does not tell of.
fn with_unknown(document: &Value, mut text: String) -> String {
    for line in unknown(document) {
        text.push_str(&line);
        text.push('\n');
    }
    text
}

async fn proxies(http: &Http) -> Result<View, Failure> {
    Ok(View {
        document: ask_all(http, "/v1/proxies", Duration::ZERO, Elsewhere::No).await?,
        items: Some("proxies"),
        table: proxies_table,
        empty: "no proxies are connected; start one with `disco envoy run`",
    })
}

fn each(document: &Value) -> impl Iterator<Item = &Value> {
    document.get("proxies").and_then(Value::as_array).into_iter().flatten()
}

fn proxies_table(document: &Value, width: Option<usize>) -> String {
    let columns = [
        Column::new("NODE"),
        Column::new("VERSION"),
        Column::new("PROTOCOL"),
        Column::new("TYPES"),
        Column::new("SYNCED"),
        Column::new("AGE"),
        Column::new("LAST ERROR"),
        Column::wide("CLUSTER"),
        Column::wide("PEER"),
        Column::wide("ACKNOWLEDGED"),
        Column::wide("RESPONSES"),
        Column::wide("REJECTED"),
    ];
    let rows: Vec<_> = each(document)
        .map(|proxy| {
            let total = |field| types(proxy).map(|kind| number(kind, field)).sum::<u64>();
            vec![
                cell(proxy, "/node_id"),
                cell(proxy, "/user_agent"),
                cell(proxy, "/protocol"),
                type_names(proxy, width.is_some()),
                cell(proxy, "/synced"),
                age(proxy, "/connected_at", rt::now()),
                cell(proxy, "/last_error"),
                cell(proxy, "/cluster"),
                cell(proxy, "/peer"),
                types(proxy).map(|kind| number(kind, "/acknowledged")).min().unwrap_or_default().to_string(),
                total("/responses").to_string(),
                total("/rejected").to_string(),
            ]
        })
        .collect();
    let table = if rows.is_empty() { String::new() } else { render(&columns, &rows, width) };
    with_unknown(document, table)
}

fn types(proxy: &Value) -> impl Iterator<Item = &Value> {
    proxy.get("types").and_then(Value::as_array).into_iter().flatten()
}

/// The types of a proxy; in a table by their initials as in LDS, RDS, CDS, EDS and LEDS.
fn type_names(proxy: &Value, short: bool) -> String {
    let names: Vec<String> = types(proxy)
        .map(|kind| {
            let name = cell(kind, "/type");
            match name.as_str() {
                "listener" if short => "L".to_owned(),
                "route" if short => "R".to_owned(),
                "cluster" if short => "C".to_owned(),
                "endpoints" if short => "E".to_owned(),
                "lb-endpoint" if short => "LE".to_owned(),
                _ => name,
            }
        })
        .collect();
    if names.is_empty() { "-".to_owned() } else { names.join(",") }
}

fn proxy_tables(document: &Value, width: Option<usize>) -> String {
    with_unknown(
        document,
        each(document).map(|proxy| proxy_table(proxy, width)).collect::<Vec<_>>().join("\n"),
    )
}

fn proxy_table(proxy: &Value, width: Option<usize>) -> String {
    let rows = [
        ("Node", cell(proxy, "/node_id")),
        ("Cluster", cell(proxy, "/cluster")),
        ("Version", cell(proxy, "/user_agent")),
        ("Protocol", cell(proxy, "/protocol")),
        ("Peer", cell(proxy, "/peer")),
        ("Connected", format!("{} ago", age(proxy, "/connected_at", rt::now()))),
        ("Synced", cell(proxy, "/synced")),
        ("Last error", cell(proxy, "/last_error")),
    ];
    let mut text: String = rows.iter().map(|(name, value)| format!("{name:<10}  {value}\n")).collect();
    let columns = [
        Column::new("TYPE"),
        Column::new("NAMES"),
        Column::new("SENT"),
        Column::new("ACKNOWLEDGED"),
        Column::new("SYNCED"),
        Column::new("RESPONSES"),
        Column::new("REJECTED"),
        Column::wide("TYPE URL"),
        Column::wide("LAST ERROR"),
    ];
    let rows: Vec<_> = types(proxy)
        .map(|kind| {
            let wildcard = kind.get("wildcard").and_then(Value::as_bool).unwrap_or_default();
            let names = match (wildcard, number(kind, "/names")) {
                (true, 0) => "all".to_owned(),
                (true, names) => format!("all + {names}"),
                (false, names) => names.to_string(),
            };
            let field = |name| cell(kind, name);
            vec![
                field("/type"),
                names,
                field("/sent"),
                field("/acknowledged"),
                field("/synced"),
                field("/responses"),
                field("/rejected"),
                field("/type_url"),
                field("/last_error"),
            ]
        })
        .collect();
    if !rows.is_empty() {
        text.push('\n');
        text.push_str(&render(&columns, &rows, width));
    }
    text.push_str(&rejections(proxy, width));
    text
}

fn rejections(proxy: &Value, width: Option<usize>) -> String {
    let columns =
        [Column::new("REJECTED"), Column::new("REVISION"), Column::new("AGO"), Column::sentence("REASON")];
    let rows: Vec<_> = types(proxy)
        .flat_map(|kind| {
            let each = kind.get("rejections").and_then(Value::as_array).into_iter().flatten();
            each.map(|rejection| {
                let ago = age(rejection, "/at", rt::now());
                vec![cell(kind, "/type"), cell(rejection, "/revision"), ago, cell(rejection, "/reason")]
            })
        })
        .collect();
    if rows.is_empty() { String::new() } else { format!("\n{}", render(&columns, &rows, width)) }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn document(error: &str) -> Value {
        let kind = |name: &str| {
            json!({"type": name, "type_url": format!("type.googleapis.com/{name}"), "wildcard": name == "cluster",
                   "names": 3, "sent": 12, "acknowledged": 11, "synced": false, "responses": 4, "rejected": 1})
        };
        let kinds = ["cluster", "endpoints", "listener", "route"].map(kind);
        json!({"proxies": [{
            "node_id": "greeter-sidecar-0123456789-abcdef", "cluster": "greeter", "user_agent": "envoy 1.40.0",
            "protocol": "delta", "peer": "127.0.0.1:33112", "connected_at": "2000-01-01T00:00:00Z", "synced": false,
            "last_error": error, "types": kinds,
        }]})
    }

    #[test]
    fn the_list_fits_80_columns_and_keeps_what_matters() {
        let text = proxies_table(&document(&"cluster greeter: no such \u{1b}[1mthing; ".repeat(9)), Some(80));
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        for want in ["NODE ", "envoy 1.40.0", "delta", "C,E,L,R", " no "] {
            assert!(text.contains(want), "{want} is not in\n{text}");
        }
        let wide = proxies_table(&document("why"), None);
        assert!(
            wide.contains("cluster,endpoints,listener,route") && wide.contains("127.0.0.1:33112"),
            "{wide}"
        );
    }

    #[test]
    fn one_proxy_in_80_columns() {
        let text = proxy_tables(&document("why"), Some(80));
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        assert!(text.contains("Last error  why\n"), "{text}");
        assert!(text.contains("cluster    all + 3  12    11            no      4          1\n"), "{text}");
    }
}
