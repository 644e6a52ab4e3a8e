use std::time::Duration;

use clap::Subcommand;
use serde_json::{Value, json};

use super::{
    Failure, Global,
    output::{Column, ListOptions, ShowOptions, View, age, cell, list, number, render},
};
use crate::{client::Http, model::nearest, rt};

/// Verbs of `disco proxy`.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// List connected proxies: what they are, and whether they have everything
    #[command(visible_alias = "ls", after_help = "Example:\n  disco proxy list --watch")]
    List(ListOptions),
    /// Show what one proxy was sent, has acknowledged and has rejected
    #[command(after_help = "Example:\n  disco proxy show greeter-sidecar -o yaml")]
    Show {
        /// Its node id
        node: String,
        #[command(flatten)]
        options: ShowOptions,
    },
}

pub(super) async fn run(command: Command, global: &Global) -> Result<(), Failure> {
    let http = global.client()?;
    match command {
        Command::List(options) => list(&options, async |_| proxies(&http).await).await,
        Command::Show { node, options } => show(&http, &node).await?.print(options.output),
    }
}

async fn proxies(http: &Http) -> Result<View, Failure> {
    Ok(View {
        document: http.get("/v1/proxies", Duration::ZERO).await?,
        items: Some("proxies"),
        table: proxies_table,
        empty: "no proxies are connected; start one with `disco envoy run`",
    })
}

fn each(document: &Value) -> impl Iterator<Item = &Value> {
    document.get("proxies").and_then(Value::as_array).into_iter().flatten()
}

async fn show(http: &Http, node: &str) -> Result<View, Failure> {
    let all = http.get("/v1/proxies", Duration::ZERO).await?;
    let id = |proxy: &Value| proxy.get("node_id").and_then(Value::as_str).unwrap_or_default().to_owned();
    let streams: Vec<&Value> = each(&all).filter(|proxy| id(proxy) == node).collect();
    if streams.is_empty() {
        let ids: Vec<String> = each(&all).map(id).collect();
        let hint = match nearest(node, ids.iter().map(String::as_str)) {
            Some(near) => format!("did you mean `{near}`?"),
            None => "`disco proxy list` shows those that are".to_owned(),
        };
        return Err(Failure::failed(format!("no proxy with node id `{node}` is connected; {hint}")));
    }
    Ok(View { document: json!({"proxies": streams}), items: Some("proxies"), table: proxy_tables, empty: "" })
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
    render(&columns, &rows, width)
}

fn types(proxy: &Value) -> impl Iterator<Item = &Value> {
    proxy.get("types").and_then(Value::as_array).into_iter().flatten()
}

/// The types of a proxy; in a table by their initials as in LDS, RDS, CDS and EDS.
fn type_names(proxy: &Value, short: bool) -> String {
    let names: Vec<String> = types(proxy)
        .map(|kind| {
            let name = cell(kind, "/type");
            match name.as_str() {
                "listener" if short => "L".to_owned(),
                "route" if short => "R".to_owned(),
                "cluster" if short => "C".to_owned(),
                "endpoints" if short => "E".to_owned(),
                _ => name,
            }
        })
        .collect();
    if names.is_empty() { "-".to_owned() } else { names.join(",") }
}

fn proxy_tables(document: &Value, width: Option<usize>) -> String {
    each(document).map(|proxy| proxy_table(proxy, width)).collect::<Vec<_>>().join("\n")
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
    text
}

#[cfg(test)]
mod tests {
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
