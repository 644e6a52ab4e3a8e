//! The guard: a process beside `disco lock run` that ends the command when that one cannot.
//!
//! It knows until when the lock is held, reads what is new of that from its input, and kills the command's process group when the
//! time is over or when the input ends, as it does when `disco lock run` is killed. Each of the two watches over the
//! command, so that freezing or killing one of them leaves the other.

use std::{
    io::{BufRead as _, stdin},
    process::Stdio,
    str::FromStr,
    thread,
    time::Duration,
};

use clap::Args;
use rustix::process::{Pid, Signal, kill_process_group, test_kill_process_group};
use tokio::{
    io::AsyncWriteExt as _,
    process::{Child, ChildStdin, Command},
    sync::mpsc,
    time::timeout,
};

use super::run::say;
use crate::{
    cli::{Failure, Global, run::process::stop_requests},
    client::{Locks, Servers},
    model::{LockName, Revision},
    rt::{Tasks, boot_time, sleep_until_boot},
};

/// How long a message to a guard may take: longer only for one that is frozen.
const TELL: Duration = Duration::from_secs(1);
/// How long a killed group may take to be gone, and a server to take the lock back.
const GONE: Duration = Duration::from_secs(5);

/// What a guard has to know.
#[derive(Debug, Clone, Args)]
pub(in crate::cli) struct GuardArgs {
    /// The lock
    pub(super) name: LockName,
    /// Its token
    pub(super) fence: u64,
    /// From SIGTERM to SIGKILL, in milliseconds
    pub(super) grace: u64,
}

/// A line of a guard's input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Message {
    /// The process group to watch over.
    Group(Pid),
    /// The lock is held until then, by [`boot_time`].
    Until(Duration),
    /// The command has ended.
    Done,
}

impl Message {
    fn line(self) -> String {
        match self {
            Self::Group(group) => format!("group {}\n", group.as_raw_nonzero()),
            Self::Until(until) => format!("until {}\n", until.as_nanos()),
            Self::Done => "done\n".to_owned(),
        }
    }
}

impl FromStr for Message {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, String> {
        let wrong = || format!("{line:?} is no message to a guard");
        match line.split_once(' ').unwrap_or((line, "")) {
            ("group", group) => group.parse().ok().and_then(Pid::from_raw).map(Self::Group),
            ("until", until) => until.parse().ok().map(|nanos| Self::Until(Duration::from_nanos(nanos))),
            ("done", "") => Some(Self::Done),
            _ => None,
        }
        .ok_or_else(wrong)
    }
}

/// A guard, seen from `disco lock run`. Dropping it without [`Guard::done`] makes it kill the command.
#[derive(Debug)]
pub(super) struct Guard {
    child: Child,
    input: Option<ChildStdin>,
    since: Duration,
}

impl Guard {
    pub(super) async fn start(
        arguments: &GuardArgs,
        global: &Global,
        until: Duration,
    ) -> Result<Self, Failure> {
        let mut command = Command::new("/proc/self/exe");
        command
            .args(["lock", "guard", arguments.name.as_str()])
            .args([arguments.fence.to_string(), arguments.grace.to_string()])
            .env("DISCO_GRPC", &global.grpc)
            .stdin(Stdio::piped())
            // Not with the terminal's Ctrl-C: the other one ends first.
            .process_group(0);
        if let Some(token) = &global.token {
            command.env("DISCO_TOKEN", token);
        }
        let failed = |error| Failure::failed(format!("the guard of the command cannot be started: {error}"));
        let mut child = command.spawn().map_err(failed)?;
        let input = child.stdin.take();
        let mut guard = Self { child, input, since: boot_time() };
        guard.tell(Message::Until(until)).await;
        Ok(guard)
    }

    pub(super) async fn group(&mut self, group: Pid) {
        self.tell(Message::Group(group)).await;
    }

    pub(super) async fn until(&mut self, until: Duration) {
        self.tell(Message::Until(until)).await;
    }

    pub(super) async fn done(mut self) {
        self.tell(Message::Done).await;
    }

    async fn tell(&mut self, message: Message) {
        if let Some(input) = &mut self.input {
            // One that is frozen or dead is not told; its end is seen elsewhere.
            let line = message.line();
            let _ = timeout(TELL, input.write_all(line.as_bytes())).await;
        }
    }

    /// Returns when it has ended, which it should not, with how long it lived. Cancel-safe.
    pub(super) async fn ended(&mut self) -> Duration {
        // Fails only for a child that somebody else has reaped.
        let _ = self.child.wait().await;
        boot_time().saturating_sub(self.since)
    }
}

/// Watches until the command has ended.
pub(super) async fn run(arguments: GuardArgs, global: &Global) -> Result<(), Failure> {
    let GuardArgs { name, fence, grace } = arguments;
    let servers = Servers::parse(&global.grpc, global.token.as_deref()).map_err(Failure::usage)?;
    // Signals to all processes of a service are for the others.
    let tasks = Tasks::default();
    let (_, _ignored) = stop_requests(&tasks)?;

    let (sender, mut messages) = mpsc::channel(16);
    let reader = thread::Builder::new().name("guard-input".into()).spawn(move || {
        for line in stdin().lock().lines() {
            let message = line.ok().and_then(|line| line.parse::<Message>().ok());
            let Some(message) = message else { return };
            if sender.blocking_send(message).is_err() {
                return;
            }
        }
    });
    reader.map_err(|error| Failure::failed(format!("cannot start a thread: {error}")))?;

    let (mut group, mut until) = (None, Duration::MAX);
    let over = loop {
        tokio::select! {
            biased;
            message = messages.recv() => match message {
                Some(Message::Group(of)) => group = Some(of),
                Some(Message::Until(new)) => until = new,
                Some(Message::Done) => return Ok(()),
                None => break false,
            },
            () = sleep_until_boot(until) => break true,
        }
    };
    let Some(group) = group else { return Ok(()) };
    let signal = |signal| {
        // Fails when nothing of the group is left.
        let _ = kill_process_group(group, signal);
    };
    if over {
        say(&format!("lock {name} was not renewed in time: its command is stopped by the guard"));
        signal(Signal::TERM);
        let done = async {
            while let Some(message) = messages.recv().await {
                if message == Message::Done {
                    break;
                }
            }
        };
        tokio::select! {
            () = sleep_until_boot(until + Duration::from_millis(grace)) => {}
            () = done => {}
        }
        signal(Signal::KILL);
        return Ok(());
    }
    say(&format!("`disco lock run {name}` is gone: its command is killed by the guard"));
    signal(Signal::KILL);
    let end = boot_time() + GONE;
    while test_kill_process_group(group).is_ok() && boot_time() < end {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    if test_kill_process_group(group).is_err() {
        // Nothing of it is left, so the next one need not wait for the lease to end.
        let _ = Locks::new(servers).release(&name, Revision(fence), GONE).await;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_read_as_they_were_written() {
        let group = Pid::from_raw(77).unwrap();
        for message in [Message::Group(group), Message::Until(Duration::new(9, 1)), Message::Done] {
            assert_eq!(message.line().trim_end().parse(), Ok(message));
        }
        for wrong in ["", "group 0", "group x", "until", "until -1", "done it"] {
            assert!(wrong.parse::<Message>().is_err(), "{wrong}");
        }
    }
}
