use std::{
    env, fs,
    fs::File,
    net::TcpListener,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio},
    time::Duration,
};

use anyhow::{Context as _, bail};
use rustix::process::{Pid, Signal, kill_process};

use super::eventually;

/// A process with its output in `<folder>/<name>.log`. Dropping it kills it and all that it started.
#[derive(Debug)]
pub(crate) struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command` with its output in the log.
    pub(crate) fn start(name: &str, folder: &Path, command: &mut Command) -> anyhow::Result<Self> {
        let log = folder.join(format!("{name}.log"));
        let file = File::options().create(true).append(true).open(&log)?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        Self::spawn(name, log, command)
    }

    /// Starts `command` with pipes for standard input and output, and its errors in the log.
    pub(crate) fn start_piped(
        name: &str,
        folder: &Path,
        command: &mut Command,
    ) -> anyhow::Result<(Self, ChildStdin, ChildStdout)> {
        let log = folder.join(format!("{name}.log"));
        let file = File::options().create(true).append(true).open(&log)?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(file);
        let mut process = Self::spawn(name, log, command)?;
        let stdin = process.child.stdin.take().context("no pipe")?;
        let stdout = process.child.stdout.take().context("no pipe")?;
        Ok((process, stdin, stdout))
    }

    fn spawn(name: &str, log: PathBuf, command: &mut Command) -> anyhow::Result<Self> {
        // In a group of its own, so that Ctrl-C reaches only the one who started it, who then ends the others in order.
        let child = command.process_group(0).spawn();
        let child = child.with_context(|| format!("cannot start {}", command.get_program().display()))?;
        Ok(Self { name: name.to_owned(), child, log })
    }

    /// What it has written so far.
    pub(crate) fn output(&self) -> String {
        fs::read(&self.log).map(|log| String::from_utf8_lossy(&log).into_owned()).unwrap_or_default()
    }

    /// Asks `probe` until it finds something; fails at once when the process ends.
    pub(crate) fn wait_for<T>(
        &mut self,
        what: &str,
        bound: Duration,
        mut probe: impl FnMut(&Self) -> Option<T>,
    ) -> anyhow::Result<T> {
        let found = eventually(what, bound, || match probe(self) {
            Some(found) => Some(Ok(found)),
            None => self.child.try_wait().ok().flatten().map(Err),
        })
        .with_context(|| format!("{}:\n{}", self.name, self.output()))?;
        match found {
            Ok(found) => Ok(found),
            Err(status) => bail!("{} ended ({status}) before {what}:\n{}", self.name, self.output()),
        }
    }

    pub(crate) fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        Ok(kill_process(self.pid()?, signal)?)
    }

    /// Waits for its end.
    pub(crate) fn ended(&mut self, bound: Duration) -> anyhow::Result<ExitStatus> {
        eventually(&format!("end of {}", self.name), bound, || self.child.try_wait().ok().flatten())
    }

    /// Kills it and all that it started, with -9.
    pub(crate) fn kill(&mut self) {
        if !matches!(self.child.try_wait(), Ok(None)) {
            return;
        }
        let children = self.descendants();
        let _ = self.child.kill();
        for pid in children {
            let _ = kill_process(pid, Signal::KILL);
        }
        let _ = self.child.wait();
    }

    /// The processes it started, and those that they started.
    pub(crate) fn descendants(&self) -> Vec<Pid> {
        self.pid().map(descendants).unwrap_or_default()
    }

    fn pid(&self) -> anyhow::Result<Pid> {
        Pid::from_raw(i32::try_from(self.child.id())?).context("no process id")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The processes that `pid` started, and those that they started.
pub(crate) fn descendants(pid: Pid) -> Vec<Pid> {
    let mut found = children(pid);
    let mut next = 0;
    while let Some(pid) = found.get(next) {
        found.extend(children(*pid));
        next += 1;
    }
    found
}

/// From `/proc`: the child processes of every thread.
fn children(pid: Pid) -> Vec<Pid> {
    let threads = fs::read_dir(format!("/proc/{}/task", pid.as_raw_nonzero()));
    let lists = threads
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|t| fs::read_to_string(t.path().join("children")).ok());
    lists
        .flat_map(|list| {
            list.split_whitespace().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)).collect::<Vec<_>>()
        })
        .collect()
}

/// A program that cargo builds beside this one, e.g. `disco` or `examples/greeter-server`.
pub(crate) fn sibling(name: &str) -> anyhow::Result<PathBuf> {
    // target/<profile>/deps/it-… or target/<profile>/examples/demo.
    let me = env::current_exe()?;
    let path = me.parent().and_then(Path::parent).context("an odd place for a program")?.join(name);
    if !path.exists() {
        bail!(
            "{} is missing; `cargo build --bins --examples` makes it (with the same --profile)",
            path.display()
        );
    }
    Ok(path)
}

/// A program of `.tools/bin`.
pub(crate) fn tool(name: &str) -> anyhow::Result<PathBuf> {
    let folder = env::var_os("DISCO_TEST_TOOLS").map(PathBuf::from);
    let folder = folder.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join(".tools"));
    let path = folder.join("bin").join(name);
    if !path.exists() {
        bail!("{} is missing; run `make tools`", path.display());
    }
    Ok(path)
}

/// A port of the loopback address that nobody used a moment ago.
pub(crate) fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}
