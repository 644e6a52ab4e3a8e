use std::{
    ffi::OsString,
    fmt,
    io::{ErrorKind, IsTerminal as _, stdin},
    os::unix::process::ExitStatusExt as _,
    process::{ExitStatus, Stdio},
};

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::{
    process::{Child, Command},
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};

use crate::{cli::Failure, rt::Tasks};

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// By itself, with this code.
    Code(u8),
    /// Killed by this signal.
    Signal(i32),
}

impl Exit {
    /// The exit code that stands for it, as shells have it: 128 and the signal's number for a killed command.
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => u8::try_from(128 + signal).unwrap_or(u8::MAX),
        }
    }
}

impl From<ExitStatus> for Exit {
    fn from(status: ExitStatus) -> Self {
        match (status.code(), status.signal()) {
            (Some(code), _) => Self::Code(u8::try_from(code).unwrap_or(u8::MAX)),
            (None, Some(signal)) => Self::Signal(signal),
            (None, None) => Self::Code(u8::MAX),
        }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit code {code}"),
            Self::Signal(signal) => write!(f, "killed by signal {signal}"),
        }
    }
}

/// A running command, in a process group of its own: a Ctrl-C in the terminal reaches only this program, which then
/// stops the command in its own time. Dropping it kills the command.
#[derive(Debug)]
pub(crate) struct Running {
    child: Child,
    group: Option<Pid>,
}

impl Running {
    /// Starts `command`, which inherits the output and the environment. Its input is inherited unless that is a
    /// terminal: a background process group that reads from one is stopped by the kernel.
    pub(crate) fn start(
        program: &OsString,
        arguments: &[OsString],
        environment: &[(&str, String)],
    ) -> Result<Self, Failure> {
        let input = if stdin().is_terminal() { Stdio::null() } else { Stdio::inherit() };
        let child = Command::new(program)
            .args(arguments)
            .envs(environment.iter().map(|(name, value)| (name, value)))
            .stdin(input)
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| not_started(program, &error))?;
        let group = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        Ok(Self { child, group })
    }

    /// Its process group.
    pub(crate) fn group(&self) -> Option<Pid> {
        self.group
    }

    /// Kills what is left of the process group right after the command has ended.
    pub(crate) fn kill_rest(&self) {
        if let Some(group) = self.group {
            // Fails when nothing is left, which is the usual case.
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

fn not_started(program: &OsString, error: &std::io::Error) -> Failure {
    let program = program.display();
    let (code, message) = match error.kind() {
        ErrorKind::NotFound => {
            (127, format!("{program} was not found: give a path or a program that is on PATH"))
        }
        ErrorKind::PermissionDenied => (126, format!("{program} may not be run: is it an executable file?")),
        _ => (126, format!("{program} cannot be started: {error}")),
    };
    Failure { code, message }
}

/// A command that can be waited for and signalled.
pub(crate) trait Process {
    /// Returns when it has ended, again and again. Cancel-safe.
    async fn wait(&mut self) -> Exit;
    /// Sends it a signal; nothing happens when it has ended.
    fn signal(&mut self, signal: Signal);
}

impl Process for Running {
    async fn wait(&mut self) -> Exit {
        // Fails only for a child that somebody else has reaped, whose code nobody knows any more.
        self.child.wait().await.map_or(Exit::Code(u8::MAX), Exit::from)
    }

    fn signal(&mut self, signal: Signal) {
        // `id` is None once the command was reaped, so this never reaches a stranger with a reused number.
        if let (Some(_), Some(group)) = (self.child.id(), self.group) {
            // The whole group, so that what a wrapping shell started ends too. Fails when it has just ended.
            let _ = kill_process_group(group, signal);
        }
    }
}

/// Each request of this program's owner to end it: SIGTERM, SIGINT, SIGHUP or SIGQUIT; and a way to add others.
pub(crate) fn stop_requests(tasks: &Tasks) -> Result<(mpsc::Sender<()>, mpsc::Receiver<()>), Failure> {
    // Two are ever acted on.
    let (sender, receiver) = mpsc::channel(2);
    for kind in [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup(), SignalKind::quit()] {
        let mut signals =
            signal(kind).map_err(|error| Failure::failed(format!("cannot listen for signals: {error}")))?;
        let sender = sender.clone();
        tasks.spawn_until_shutdown("stop requests", async move {
            while signals.recv().await.is_some() {
                // A full queue already says everything.
                let _ = sender.try_send(());
            }
        });
    }
    Ok((sender, receiver))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn shell(script: &str) -> Running {
        let arguments = ["-c".into(), script.into()];
        Running::start(&"/bin/sh".into(), &arguments, &[("PORT", "50051".to_owned())]).unwrap()
    }

    async fn end(mut running: Running) -> Exit {
        tokio::time::timeout(Duration::from_secs(20), running.wait()).await.expect("took too long")
    }

    #[tokio::test]
    async fn exit_codes() {
        assert_eq!(end(shell("exit 7")).await, Exit::Code(7));
        assert_eq!(end(shell("test $PORT = 50051")).await, Exit::Code(0));
        assert_eq!(end(shell("kill -9 $$")).await, Exit::Signal(9));
        assert_eq!(Exit::Signal(9).code(), 137);
    }

    #[tokio::test]
    async fn a_signal_reaches_the_whole_group() {
        let folder = tempfile::tempdir().unwrap();
        let ready = folder.path().join("ready");
        // The shell outlives SIGTERM, and ends when what it waits for does.
        let mut running = shell(&format!("trap : TERM; : > {}; sleep 1000; exit 5", ready.display()));
        let ended = async {
            while !ready.exists() {
                tokio::task::yield_now().await;
            }
            loop {
                running.signal(Signal::TERM);
                if let Ok(exit) = tokio::time::timeout(Duration::from_millis(50), running.wait()).await {
                    return exit;
                }
            }
        };
        let exit = tokio::time::timeout(Duration::from_secs(20), ended).await.expect("took too long");
        assert_eq!(exit, Exit::Code(5));
        assert_eq!(running.wait().await, Exit::Code(5));
        running.signal(Signal::TERM);
    }

    #[tokio::test]
    async fn commands_that_cannot_start() {
        for (program, code) in
            [("/no/such/program", 127), ("no-such-program-here", 127), ("/etc/passwd", 126)]
        {
            let failure = Running::start(&program.into(), &[], &[]).unwrap_err();
            assert_eq!(failure.code, code, "{program}");
            assert!(failure.message.starts_with(program), "{}", failure.message);
        }
    }
}
