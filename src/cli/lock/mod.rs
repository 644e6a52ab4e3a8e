//! `disco lock`: what must run exactly once.

mod guard;
mod run;

use std::time::Duration;

use clap::Subcommand;
use http::Method;
use serde_json::Value;

use super::{
    Failure, Global,
    output::{
        Column, ListOptions, Refresh, ShowOptions, View, age, cell, count, list, number, print, render,
    },
    parse,
};
use crate::{
    client::Http,
    model::{LockName, Revision},
    rt,
};

/// Verbs of `disco lock`.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Run a command while holding a lock; wait for the lock first
    #[command(long_about = run::LONG)]
    Run(run::RunArgs),
    /// List the locks that are held: by whom, with which token, since when
    #[command(visible_alias = "ls", after_help = "Example:\n  disco lock list --watch")]
    List(ListOptions),
    /// Show one lock
    #[command(after_help = "Example:\n  disco lock show nightly-report")]
    Show {
        /// Its name
        name: LockName,
        #[command(flatten)]
        options: ShowOptions,
    },
    /// Ask a lock back from its holder, or give it back by its token
    #[command(
        long_about = "Ask a lock back from its holder, or give it back by its token.\n\nWithout --fence the holder cannot renew \
                      it any more: it stops its command when it learns of that, and the lock goes to the next one then, or \
                      when its lease is over. So there are never two holders. With --fence the lock is free at once: only for \
                      whoever holds it.",
        after_help = "Example:\n  disco lock release nightly-report"
    )]
    Release {
        /// Its name
        name: LockName,
        /// Its fencing token, for whoever holds it
        #[arg(long, value_name = "N", value_parser = parse::whole)]
        fence: Option<u64>,
    },
    /// Watches over a command beside `disco lock run`
    #[command(hide = true, after_help = "Example:\n  disco lock guard nightly-report 7 2500")]
    Guard(guard::GuardArgs),
}

/// Returns the exit code for the process.
pub(super) async fn run(command: Command, global: &Global) -> Result<u8, Failure> {
    match command {
        Command::Run(arguments) => return Box::pin(run::run(arguments, global)).await,
        Command::Guard(arguments) => guard::run(arguments, global).await?,
        Command::List(options) => {
            let http = global.client()?;
            list(&options, async |refresh| locks(&http, refresh).await).await?;
        }
        Command::Show { name, options } => {
            let document = global.client()?.get(&format!("/v1/locks/{name}"), Duration::ZERO).await?;
            View { document, items: None, table: lock_table, empty: "" }.print(options.output)?;
        }
        Command::Release { name, fence } => release(&global.client()?, &name, fence.map(Revision)).await?,
    }
    Ok(0)
}

async fn locks(http: &Http, refresh: Refresh) -> Result<View, Failure> {
    Ok(View {
        document: refresh.get(http, "/v1/locks").await?,
        items: Some("locks"),
        table: locks_table,
        empty: "no lock is held; take one with `disco lock run NAME -- COMMAND`",
    })
}

fn locks_table(document: &Value, width: Option<usize>) -> String {
    let locks = document.get("locks").and_then(Value::as_array).into_iter().flatten();
    let row = |lock: &Value| {
        let field = |name| cell(lock, name);
        let revoked = lock.get("revoked").and_then(Value::as_bool).unwrap_or_default();
        vec![
            field("/name"),
            field("/holder"),
            field("/token"),
            age(lock, "/since", rt::now()),
            field("/ttl"),
            field("/waiting"),
            if revoked { "asked back" } else { "held" }.to_owned(),
            field("/node"),
        ]
    };
    let rows: Vec<_> = locks.map(row).collect();
    let columns = ["NAME", "HOLDER", "TOKEN", "HELD FOR", "TTL", "WAITING", "STATE"].map(Column::new);
    let columns = [columns.as_slice(), &[Column::wide("NODE")]].concat();
    render(&columns, &rows, width)
}

fn lock_table(document: &Value, _: Option<usize>) -> String {
    let Some(lock) = document.get("lock").filter(|lock| !lock.is_null()) else {
        return "held by nobody\n".to_owned();
    };
    let field = |name| cell(lock, name);
    let mut text = format!(
        "Lock     {}\nHolder   {}\nToken    {}\nSince    {} ({} ago)\nTTL      {}\nWaiting  {} at this node\nNode     {} \
         counts its lease\n",
        field("/name"),
        field("/holder"),
        field("/token"),
        field("/since"),
        age(lock, "/since", rt::now()),
        field("/ttl"),
        count(number(lock, "/waiting"), "other"),
        field("/node"),
    );
    if lock.get("revoked").and_then(Value::as_bool).unwrap_or_default() {
        text.push_str("State    asked back: it is renewed no more\n");
    }
    text
}

async fn release(http: &Http, name: &LockName, token: Option<Revision>) -> Result<(), Failure> {
    let query = token.map(|token| format!("?token={token}")).unwrap_or_default();
    let answer = http.send(Method::DELETE, &format!("/v1/locks/{name}{query}"), None, Duration::ZERO).await?;
    print(&match (token, answer.get("lock")) {
        (None, Some(lock)) => format!(
            "{name} was asked back from {}: it is free when that one lets go, or when its lease is over ({})\n",
            cell(lock, "/holder"),
            cell(lock, "/ttl")
        ),
        (Some(token), _) => format!("{name} is not held with token {token} any more\n"),
        (None, None) => format!("{name} released at revision {}\n", number(&answer, "/revision")),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn tables() {
        let lock = json!({
            "name": "nightly", "token": 7, "holder": "host\u{1b}:1", "since": "2000-01-01T00:00:00Z", "ttl": "10s",
            "node": "n1", "revoked": true, "waiting": 2, "revision": 9,
        });
        let text = locks_table(&json!({"revision": 9, "locks": [lock]}), Some(80));
        let row: Vec<_> = text.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(row[..3], ["nightly", "host\\u{1b}:1", "7"], "{text}");
        assert_eq!(row[4..], ["10s", "2", "asked", "back"], "{text}");
        let text = lock_table(&json!({"lock": lock}), None);
        assert!(text.contains("Token    7\n") && text.contains("2 others at this node"), "{text}");
        assert_eq!(lock_table(&json!({"lock": null}), None), "held by nobody\n");
    }
}
