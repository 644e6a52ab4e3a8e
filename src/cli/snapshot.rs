//! `disco snapshot`: backups of everything that is registered.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use clap::Subcommand;
use serde_json::{Value, json};

use super::{
    Failure, Global,
    files::{Present, write_whole},
    output::{ShowOptions, View, cell, number, print},
};
use crate::{
    registry::{self, Restored},
    store::{self, Backup, FileStore, Store as _},
};

/// How long a server may take to send or to take a snapshot.
const WAIT: Duration = Duration::from_secs(600);

/// Verbs of `disco snapshot`.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Save everything that the store holds to a file
    #[command(after_help = "Example:\n  disco snapshot save disco-$(date +%F).snapshot")]
    Save {
        /// Where to
        file: PathBuf,
        /// Replace the file if it is there
        #[arg(long)]
        force: bool,
    },
    /// Show when a snapshot was taken and what is in it
    #[command(after_help = "Example:\n  disco snapshot show disco-2026-11-20.snapshot")]
    Show {
        /// The snapshot
        file: PathBuf,
        #[command(flatten)]
        options: ShowOptions,
    },
    /// Put a snapshot into an empty store
    #[command(
        long_about = "Put a snapshot into an empty store: that of a running server, or with --data that of a server which does \
                      not run.\n\nRevisions jump ahead by a thousand million first, so that no revision and no fencing token is \
                      given out twice. Leases start whole: who is alive has the time to come back, and proxies keep what they \
                      hold. What changed after the snapshot was taken is lost; a lock that was taken since then is free, so \
                      what it protects must check the token.",
        after_help = "Examples:\n  disco snapshot restore disco-2026-11-20.snapshot\n  disco snapshot restore \
                      disco-2026-11-20.snapshot --data /var/lib/disco"
    )]
    Restore {
        /// The snapshot
        file: PathBuf,
        /// The directory of the store (`store.file.dir`) of a server that does not run
        #[arg(long, value_name = "DIR")]
        data: Option<PathBuf>,
        /// Also into a store that is not empty: what is not in the snapshot is removed
        #[arg(long)]
        replace: bool,
    },
}

pub(super) async fn run(command: Command, global: &Global) -> Result<(), Failure> {
    match command {
        Command::Save { file, force } => save(global, &file, force).await,
        Command::Show { file, options } => {
            let document = describe(&read(&file)?.1);
            View { document, items: None, table: snapshot_table, empty: "" }.print(options.output)
        }
        Command::Restore { file, data, replace } => {
            let (bytes, backup) = read(&file)?;
            let answer = match data {
                Some(dir) => restore_offline(&dir, backup, replace).await?,
                None => {
                    let query = if replace { "?replace=true" } else { "" };
                    global.client()?.upload(&format!("/v1/snapshot{query}"), bytes, WAIT).await?
                }
            };
            print(&format!(
                "restored {} entries, removed {}; the revision is {}\n",
                number(&answer, "/entries"),
                number(&answer, "/removed"),
                number(&answer, "/revision")
            ))
        }
    }
}

async fn save(global: &Global, file: &Path, force: bool) -> Result<(), Failure> {
    let there =
        || Failure::failed(format!("{} is there already: give another name, or --force", file.display()));
    if !force && file.exists() {
        return Err(there());
    }
    let bytes = global.client()?.download("/v1/snapshot", WAIT).await?;
    let backup =
        Backup::read(&bytes).map_err(|error| Failure::failed(format!("what came is no use: {error}")))?;
    let present = if force { Present::Replace } else { Present::Keep };
    match write_whole(file, &bytes, 0o600, present) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Err(there()),
        Err(error) => return Err(Failure::failed(format!("cannot write {}: {error}", file.display()))),
    }
    let entries = backup.listing.entries.len();
    print(&format!("saved {entries} entries at revision {} to {}\n", backup.listing.revision, file.display()))
}

fn read(file: &Path) -> Result<(Bytes, Backup), Failure> {
    let bytes = fs::read(file)
        .map(Bytes::from)
        .map_err(|error| Failure::bad_data(format!("cannot read {}: {error}", file.display())))?;
    let backup =
        Backup::read(&bytes).map_err(|error| Failure::bad_data(format!("{}: {error}", file.display())))?;
    Ok((bytes, backup))
}

async fn restore_offline(dir: &Path, backup: Backup, replace: bool) -> Result<Value, Failure> {
    let failed = |error: &dyn std::fmt::Display| Failure::failed(error.to_string());
    let (store, _) = FileStore::open(dir, store::Config::default()).map_err(|error| failed(&error))?;
    let restored = registry::restore(&store, backup, replace).await;
    store.close().await.map_err(|error| failed(&error))?;
    let Restored { entries, removed, revision } = restored.map_err(|error| failed(&error))?;
    Ok(json!({"entries": entries, "removed": removed, "revision": revision.0}))
}

fn describe(backup: &Backup) -> Value {
    let mut kinds = BTreeMap::<&str, u64>::new();
    for entry in &backup.listing.entries {
        // Most is in the catalog: what of it tells more.
        let key = entry.key.strip_prefix("catalog/").unwrap_or(&entry.key);
        *kinds.entry(key.split('/').next().unwrap_or_default()).or_default() += 1;
    }
    let taken = jiff::Timestamp::try_from(backup.taken_at).unwrap_or_default();
    json!({
        "taken_at": format!("{taken:.3}"),
        "revision": backup.listing.revision.0,
        "entries": backup.listing.entries.len(),
        "kinds": kinds,
    })
}

fn snapshot_table(document: &Value, _: Option<usize>) -> String {
    let field = |name| cell(document, name);
    let mut text = format!(
        "Taken     {}\nRevision  {}\nEntries   {}\n",
        field("/taken_at"),
        field("/revision"),
        field("/entries")
    );
    for (kind, count) in document.get("kinds").and_then(Value::as_object).into_iter().flatten() {
        text.push_str(&format!("  {:<12}{count}\n", super::output::clean(kind)));
    }
    text
}
