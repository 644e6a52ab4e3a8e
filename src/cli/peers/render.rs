//! `disco peers render`: a list in a database's own format.

use std::{fs, path::PathBuf, process::Stdio, time::Duration};

use bytes::Bytes;
use clap::Args;
use http::Response;

use super::{
    POLL,
    file::{ListFile, Text, Written},
    path,
};
use crate::{
    cli::{
        Failure, Global,
        output::{note, print},
    },
    client::{Http, HttpError},
    model::{InstanceId, Revision, ServiceId, format_duration},
    peers::render::{Format, render_template},
    rt::Backoff,
};

/// Changes that follow each other within this time are told of once.
const SETTLE: Duration = Duration::from_millis(300);

/// Longest that the command of `--on-change` may take.
const COMMAND: Duration = Duration::from_secs(60);

/// Pauses while no server answers: the first, and the longest.
const PAUSE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(10));

/// Arguments of `disco peers render`.
#[derive(Debug, Args)]
pub(in crate::cli) struct Render {
    /// The set
    set: ServiceId,
    /// How the list is written; `--format help` lists the formats
    #[arg(long, value_parser = format, conflicts_with = "template", required_unless_present = "template")]
    format: Option<Format>,
    /// For which replica: a founder and one that joins are told differently
    #[arg(long, value_name = "PEER")]
    peer: Option<InstanceId>,
    /// Fill this template (Jinja) with the document of `--format json`
    #[arg(long, value_name = "FILE")]
    template: Option<PathBuf>,
    /// Write to this file, whole or not at all, and only when the list has changed
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Run this command by /bin/sh when the file has changed
    #[arg(long, value_name = "COMMAND", requires = "out")]
    on_change: Option<String>,
    /// Stay, wait until the set is founded, and write again whenever the list changes
    #[arg(short, long)]
    watch: bool,
    /// The replicas speak TLS to each other, where that is part of an address
    #[arg(long)]
    tls: bool,
    /// The database has lost its quorum for good, and I am repairing it by hand
    #[arg(long)]
    i_am_recovering: bool,
}

fn format(text: &str) -> Result<Format, String> {
    if text != "help" {
        return text.parse();
    }
    let lines: Vec<_> =
        Format::ALL.iter().map(|format| format!("  {:<24} {}", format.as_str(), format.describe())).collect();
    Err(format!("the formats are\n{}", lines.join("\n")))
}

/// What is asked for.
#[derive(Debug, Clone)]
pub(in crate::cli) struct Asked<'a> {
    pub(in crate::cli) set: &'a ServiceId,
    pub(in crate::cli) format: Format,
    pub(in crate::cli) peer: Option<&'a InstanceId>,
    pub(in crate::cli) tls: bool,
    pub(in crate::cli) recovering: bool,
}

/// Fetches a list, and the revision to wait for the next change with. The server waits until there is one that is newer than
/// `after`; when the time is up it says what there is.
pub(in crate::cli) async fn fetch(
    http: &Http,
    asked: &Asked<'_>,
    after: Revision,
    wait: Duration,
) -> Result<(Revision, Text), HttpError> {
    let Asked { set, format, peer, tls, recovering } = asked;
    let peer = peer.map(|peer| format!("&peer={peer}")).unwrap_or_default();
    let path = format!(
        "{}/render?format={format}{peer}&tls={tls}&recovering={recovering}&index={after}&wait={}",
        path(set),
        format_duration(wait)
    );
    let answer = http.page(&path, wait).await?;
    read(&answer).ok_or_else(|| HttpError::NotDisco {
        address: http.address(),
        reason: "no list with its revision and digest came".to_owned(),
    })
}

fn read(answer: &Response<Bytes>) -> Option<(Revision, Text)> {
    let header = |name| answer.headers().get(name)?.to_str().ok();
    let text = Text {
        text: String::from_utf8(answer.body().to_vec()).ok()?,
        set_revision: header("disco-set-revision")?.parse().ok()?,
        digest: header("disco-digest")?.to_owned(),
    };
    // What is empty was never sent (rule N1).
    (!text.text.trim().is_empty()).then_some((Revision(header("disco-revision")?.parse().ok()?), text))
}

/// Whether asking again later may help.
pub(in crate::cli) fn is_passing(error: &HttpError) -> bool {
    match error {
        HttpError::Unreachable { .. } | HttpError::TimedOut { .. } | HttpError::NotDisco { .. } => true,
        HttpError::Refused { status, .. } => matches!(status, 425 | 429 | 500..),
        HttpError::Settings(_) => false,
    }
}

/// Runs the command that is to take the change up, and says what was wrong with that.
pub(in crate::cli) async fn on_change(command: &str, file: &ListFile) -> Result<(), String> {
    let child = tokio::process::Command::new("/bin/sh")
        .args(["-c", command])
        .env("DISCO_PEERS_FILE", file.path())
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .status();
    match tokio::time::timeout(COMMAND, child).await {
        Ok(Ok(status)) if status.success() => Ok(()),
        Ok(Ok(status)) => Err(format!("`{command}` ended with {status}")),
        Ok(Err(error)) => Err(format!("`{command}` cannot be started: {error}")),
        Err(_) => Err(format!("`{command}` took more than {} and was killed", format_duration(COMMAND))),
    }
}

pub(super) async fn run(arguments: Render, global: &Global) -> Result<(), Failure> {
    let http = global.client()?;
    let template = match &arguments.template {
        Some(file) => Some(fs::read_to_string(file).map_err(|error| {
            Failure::bad_data(format!("cannot read the template {}: {error}", file.display()))
        })?),
        None => None,
    };
    let format = arguments.format;
    if format == Some(Format::HashicorpPeersJson) && (arguments.watch || arguments.on_change.is_some()) {
        return Err(Failure::usage(
            "hashicorp-peers-json is for one recovery, by hand: not with --watch or --on-change",
        ));
    }
    let asked = Asked {
        set: &arguments.set,
        format: format.unwrap_or(Format::Json),
        peer: arguments.peer.as_ref(),
        tls: arguments.tls,
        recovering: arguments.i_am_recovering,
    };
    let lists = Lists { http, asked, template };
    let target = Target {
        file: arguments.out.map(|out| ListFile::new(out, format)),
        command: arguments.on_change,
        shown: None,
    };
    if arguments.watch { watch(&lists, target).await } else { once(&lists, target).await }
}

/// Where lists come from.
#[derive(Debug)]
struct Lists<'a> {
    http: Http,
    asked: Asked<'a>,
    template: Option<String>,
}

impl Lists<'_> {
    async fn next(&self, after: Revision, wait: Duration) -> Result<(Revision, Text), Trouble> {
        let (revision, mut list) =
            fetch(&self.http, &self.asked, after, wait).await.map_err(Trouble::Http)?;
        if let Some(template) = &self.template {
            let wrong = |error: &dyn std::fmt::Display| Trouble::Fatal(Failure::bad_data(error.to_string()));
            let view = serde_json::from_str(&list.text).map_err(|error| wrong(&error))?;
            list.text = render_template(template, &view).map_err(|error| wrong(&error))?;
        }
        Ok((revision, list))
    }
}

#[derive(Debug)]
enum Trouble {
    Http(HttpError),
    Fatal(Failure),
}

/// Where they go.
#[derive(Debug)]
struct Target {
    file: Option<ListFile>,
    command: Option<String>,
    /// What was printed last, without a file.
    shown: Option<String>,
}

impl Target {
    /// Whether the list is another one than before.
    fn take(&mut self, list: Text) -> Result<bool, Failure> {
        let Some(file) = &self.file else {
            let new = self.shown.as_ref() != Some(&list.text);
            if new {
                print(&list.text)?;
                self.shown = Some(list.text);
            }
            return Ok(new);
        };
        let written = file.write(&list)?;
        if written == Written::Theirs {
            note(&format!(
                "{} is there: the database owns it, so it is left as it is",
                file.path().display()
            ));
        }
        Ok(written == Written::Changed)
    }

    async fn tell(&self) -> Result<(), String> {
        match (&self.command, &self.file) {
            (Some(command), Some(file)) => on_change(command, file).await,
            _ => Ok(()),
        }
    }
}

async fn once(lists: &Lists<'_>, mut target: Target) -> Result<(), Failure> {
    let (_, list) =
        lists.next(Revision::default(), Duration::ZERO).await.map_err(|trouble| match trouble {
            Trouble::Http(error) => error.into(),
            Trouble::Fatal(failure) => failure,
        })?;
    if target.take(list)? {
        target.tell().await.map_err(|error| Failure::failed(format!("the list is written, but {error}")))?;
    }
    Ok(())
}

/// Keeps the last list whatever happens; ends only when the first one is refused, or when another database is founded.
async fn watch(lists: &Lists<'_>, mut target: Target) -> Result<(), Failure> {
    let (mut after, mut newest) = (Revision::default(), 0);
    let mut backoff = Backoff::new(PAUSE.0, PAUSE.1);
    let mut told = String::new();
    loop {
        match lists.next(after, POLL).await {
            Ok((revision, list)) => {
                told.clear();
                if list.set_revision < newest {
                    // Another server, which has not read the store to its end.
                    tokio::time::sleep(backoff.next_wait()).await;
                    continue;
                }
                backoff.reset();
                (after, newest) = (revision, list.set_revision);
                if target.take(list)? {
                    tokio::time::sleep(SETTLE).await;
                    match lists.next(Revision::default(), Duration::ZERO).await {
                        Ok((revision, list)) if list.set_revision >= newest => {
                            (after, newest) = (revision, list.set_revision);
                            target.take(list)?;
                        }
                        Ok(_) | Err(_) => {}
                    }
                    if let Err(error) = target.tell().await {
                        note(&format!("{error}; it is tried again with the next change"));
                    }
                }
            }
            Err(Trouble::Fatal(failure)) => return Err(failure),
            Err(Trouble::Http(error)) => {
                if after == Revision::default() && !is_passing(&error) {
                    return Err(error.into());
                }
                let waits = matches!(error, HttpError::Refused { status: 425, .. });
                let message = error.to_string();
                if message != told {
                    note(&if waits { format!("waiting: {message}") } else { message.clone() });
                    told = message;
                }
                if !waits {
                    tokio::time::sleep(backoff.next_wait()).await;
                }
            }
        }
    }
}
