use std::{io::IsTerminal as _, time::Duration};

use clap::{Args, Subcommand};
use serde_json::Value;

use super::{
    Failure, Global,
    output::{Column, ShowOptions, View, age, cell, count, number, render, some_of, status_line},
    parse,
    servers::{is_complete, pending, rollout, unknown},
};
use crate::{
    client::Http,
    model::{ServiceId, format_duration, parse_duration},
    rt,
};

/// Verbs of `disco rollout`.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Show which proxies have not acknowledged a change, since when and why
    #[command(
        long_about = "Show which proxies have not acknowledged a change, since when and why.\n\nEnds with 0 when all that it \
                      concerns have, with 2 when some have not.",
        after_help = "Examples:\n  disco rollout status 42\n  disco rollout status 42 --service greeter --wait --timeout 1m"
    )]
    Status(Status),
}

/// Arguments of `disco rollout status`.
#[derive(Debug, Args)]
pub(super) struct Status {
    /// The revision that the change was answered with
    #[arg(value_name = "REVISION", value_parser = parse::whole)]
    revision: u64,
    /// Only proxies that are sent this service's endpoints
    #[arg(long)]
    service: Option<ServiceId>,
    /// Wait until all have acknowledged it
    #[arg(long)]
    wait: bool,
    /// How long to wait
    #[arg(long, value_name = "TIME", default_value = "30s", requires = "wait", value_parser = parse_duration)]
    timeout: Duration,
    #[command(flatten)]
    options: ShowOptions,
}

pub(super) async fn run(command: Command, global: &Global) -> Result<(), Failure> {
    let Command::Status(arguments) = command;
    status(&global.client()?, &arguments).await
}

async fn status(http: &Http, arguments: &Status) -> Result<(), Failure> {
    let Status { revision, service, wait, timeout, options } = arguments;
    let limit = if *wait { *timeout } else { Duration::ZERO };
    let progress = *wait && std::io::stderr().is_terminal();
    let tell = |document: &Value| status_line(&line(document));
    let tell = progress.then_some(&tell as &dyn Fn(&Value));
    let document = rollout(http, *revision, service.as_ref(), limit, tell).await?;
    if progress {
        status_line("");
    }
    View { document: document.clone(), items: None, table: status_table, empty: "" }.print(options.output)?;
    if is_complete(&document) {
        return Ok(());
    }
    let within = if *wait { format!(" within {}", format_duration(*timeout)) } else { String::new() };
    let mut message = format!("{} acknowledged revision {revision}{within}", share(&document));
    if !pending(&document).is_empty() {
        message.push_str(&format!("; not yet: {}", some_of(&pending(&document))));
    }
    for line in unknown(&document) {
        message.push_str(&format!("\n  {line}"));
    }
    Err(Failure::not_yet(message))
}

/// E.g. `2 of 3 proxies`.
fn share(document: &Value) -> String {
    let has = number(document, "/acknowledged");
    let behind = u64::try_from(pending(document).len()).unwrap_or(u64::MAX);
    format!("{has} of {}", count(has.saturating_add(behind), "proxy"))
}

fn line(document: &Value) -> String {
    let mut waiting = pending(document);
    waiting.extend(unknown(document));
    format!("{} acknowledged it; waiting for {}", share(document), some_of(&waiting))
}

fn status_table(document: &Value, width: Option<usize>) -> String {
    let revision = number(document, "/revision");
    let has = number(document, "/acknowledged");
    let mut text = match (is_complete(document), has) {
        (true, 0) => format!("revision {revision} concerns no connected proxy\n"),
        (true, _) => {
            format!("revision {revision} is acknowledged by all that it concerns: {}\n", count(has, "proxy"))
        }
        (false, _) => String::new(),
    };
    let columns = [
        Column::new("NODE"),
        Column::new("TYPE"),
        Column::new("REASON"),
        Column::new("FOR"),
        Column::sentence("ERROR"),
        Column::wide("SINCE"),
        Column::wide("PEER"),
        Column::wide("PROTOCOL"),
    ];
    let waiting = document.get("waiting").and_then(Value::as_array).into_iter().flatten();
    let rows: Vec<_> = waiting
        .map(|lack| {
            let field = |name| cell(lack, name);
            vec![
                field("/node_id"),
                field("/type"),
                field("/reason"),
                age(lack, "/since", rt::now()),
                field("/error"),
                field("/since"),
                field("/peer"),
                field("/protocol"),
            ]
        })
        .collect();
    if !rows.is_empty() {
        text.push_str(&render(&columns, &rows, width));
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn whoever_is_behind_is_shown_in_80_columns() {
        let lack = json!({"node_id": "edge-\u{1b}1", "type": "endpoints", "reason": "rejected", "peer": "127.0.0.1:1",
                          "since": "2000-01-01T00:00:00Z", "error": "no such thing; ".repeat(20)});
        let document = json!({"revision": 7, "complete": false, "acknowledged": 2, "pending": ["edge-\u{1b}1"],
                              "waiting": [lack]});
        let text = status_table(&document, Some(80));
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        for want in ["edge-\\u{1b}1", "endpoints", "rejected", "no such"] {
            assert!(text.contains(want), "{want} is not in\n{text}");
        }
        assert_eq!(line(&document), "2 of 3 proxies acknowledged it; waiting for edge-\\u{1b}1");
        let complete =
            json!({"revision": 7, "complete": true, "acknowledged": 2, "pending": [], "waiting": []});
        assert_eq!(
            status_table(&complete, Some(80)),
            "revision 7 is acknowledged by all that it concerns: 2 proxies\n"
        );
    }
}
