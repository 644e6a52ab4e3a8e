use std::{ffi::OsString, process::Stdio, time::Duration};

use futures_util::future::BoxFuture;
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _},
    process,
};

use super::{Ask, Outcome};
use crate::model::{excerpt, format_duration};

/// The exit code of a command that found its service degraded: `EX_TEMPFAIL`, which no common tool uses for "down".
const DEGRADED: i32 = 75;

/// How much of what the command says is read.
const OUTPUT: u64 = 4096;

/// Asks by a command of the owner, run by `/bin/sh`: it works if that ends with 0, is degraded with 75, and does not work with
/// anything else, or when it takes too long. The reason is the last line that it writes.
#[derive(Debug)]
pub struct Command {
    line: String,
    environment: Vec<(&'static str, String)>,
    limit: Duration,
}

impl Command {
    /// Runs `line` with these variables beside those of this process.
    pub fn new(line: String, environment: Vec<(&'static str, String)>, limit: Duration) -> Self {
        Self { line, environment, limit }
    }

    async fn run(&self) -> Outcome {
        let shell: OsString = "/bin/sh".into();
        let child = process::Command::new(shell)
            .arg("-c")
            .arg(&self.line)
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn();
        let mut child = match child {
            Ok(child) => child,
            Err(error) => return Outcome::NotAsked(format!("/bin/sh cannot be started: {error}")),
        };
        // Whatever becomes of it, and whatever it started.
        let _group = Group(child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw));
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let end = async {
            let (said, complained, status) = tokio::join!(read_some(stdout), read_some(stderr), child.wait());
            (if complained.trim().is_empty() { said } else { complained }, status)
        };
        let (said, status) = match tokio::time::timeout(self.limit, end).await {
            Ok(ended) => ended,
            Err(_) => {
                return Outcome::Failed(format!(
                    "the check did not end within {}",
                    format_duration(self.limit)
                ));
            }
        };
        let seen = |end: String| match said.lines().rev().map(str::trim).find(|line| !line.is_empty()) {
            Some(line) => format!("{end}: {}", excerpt(line)),
            None => end,
        };
        match status.map(|status| status.code()) {
            Ok(Some(0)) => Outcome::Passed,
            Ok(Some(DEGRADED)) => Outcome::Degraded(seen(format!("exit code {DEGRADED}"))),
            Ok(Some(code)) => Outcome::Failed(seen(format!("exit code {code}"))),
            Ok(None) => Outcome::Failed(seen("the check was killed".to_owned())),
            Err(error) => Outcome::NotAsked(format!("the check cannot be waited for: {error}")),
        }
    }
}

impl Ask for Command {
    fn ask(&mut self) -> BoxFuture<'_, Outcome> {
        Box::pin(self.run())
    }
}

/// Reads to the end, and keeps the beginning.
async fn read_some(stream: Option<impl AsyncRead + Unpin>) -> String {
    let Some(mut stream) = stream else { return String::new() };
    let mut kept = Vec::new();
    // What cannot be read is not shown.
    let _ = (&mut stream).take(OUTPUT).read_to_end(&mut kept).await;
    let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
    String::from_utf8_lossy(&kept).into_owned()
}

/// A process group that ends with this value.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            // Fails when nobody of it is left.
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn outcomes_of_commands() {
        let failed = |seen: &str| Outcome::Failed(seen.to_owned());
        for (line, want) in [
            ("exit 0", Outcome::Passed),
            ("test $PORT = 7", Outcome::Passed),
            ("echo lagging; exit 75", Outcome::Degraded("exit code 75: \"lagging\"".to_owned())),
            ("echo a; echo b; exit 2", failed("exit code 2: \"b\"")),
            ("echo a; echo no disk >&2; exit 1", failed("exit code 1: \"no disk\"")),
            ("kill -9 $$", failed("the check was killed")),
            ("no-such-command-here 2>/dev/null", failed("exit code 127")),
            // More than is kept, and more than a pipe holds.
            ("head -c 1000000 /dev/zero; exit 0", Outcome::Passed),
        ] {
            let mut command =
                Command::new(line.to_owned(), vec![("PORT", "7".to_owned())], Duration::from_secs(20));
            assert_eq!(command.ask().await, want, "{line}");
        }
        let mut slow = Command::new("sleep 1000 & wait".to_owned(), Vec::new(), Duration::from_millis(100));
        assert_eq!(slow.ask().await, failed("the check did not end within 100ms"));
    }
}
