//! Starts the real thing: Disco, greeters under `disco run`, Envoy, clients that call without a pause.
//!
//! Each is a process that ends with the value that stands for it. The demo uses the same.

mod disco;
mod envoy;
mod etcd;
mod greeter;
mod http;
mod load;
mod network;
mod nodes;
mod place;
pub(crate) mod process;

pub(crate) use self::{
    disco::Disco,
    envoy::{Envoy, Protocol},
    etcd::Etcd,
    greeter::Greeter,
    http::{Answer, request, request_within},
    load::{Client, Load},
    network::Network,
    nodes::{Nodes, example_files},
    place::Place,
    process::{Process, free_port, sibling, tool},
};

use std::{
    fs,
    path::Path,
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};

/// How long anything may take that normally takes milliseconds, on a machine that is busy with other things.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Returns what `probe` finds, asking until it finds something, or an error that says `what` was waited for.
pub(crate) fn eventually<T>(
    what: &str,
    bound: Duration,
    mut probe: impl FnMut() -> Option<T>,
) -> anyhow::Result<T> {
    let end = Instant::now() + bound;
    loop {
        if let Some(found) = probe() {
            return Ok(found);
        }
        if Instant::now() >= end {
            bail!("after {bound:?} still no {what}");
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Runs `play` with a folder of its own; one at a time, since each needs the machine for itself. When it fails, the ends
/// of all logs in the folder are shown.
pub(crate) fn scene(play: impl FnOnce(&Path) -> anyhow::Result<()>) {
    static STAGE: Mutex<()> = Mutex::new(());
    let _turn = STAGE.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = tempfile::tempdir().expect("a temporary folder");
    if let Err(error) = play(folder.path()) {
        panic!("{error:#}\n{}", log_ends(folder.path()).unwrap_or_default());
    }
}

fn log_ends(folder: &Path) -> anyhow::Result<String> {
    let mut text = String::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "log") {
            continue;
        }
        let log = String::from_utf8_lossy(&fs::read(&path).context("cannot read a log")?).into_owned();
        let lines: Vec<_> = log.lines().collect();
        let end = &lines[lines.len().saturating_sub(25)..];
        text +=
            &format!("\n--- {} ---\n{}\n", path.file_name().unwrap_or_default().display(), end.join("\n"));
    }
    Ok(text)
}
