//! Real etcds, as many as a test wants.

use std::{
    env, fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::Arc,
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::time::timeout;

use crate::store::{EtcdConfig, EtcdStore, EtcdTls, Status, Store as _};

/// What a test that is not stuck takes for anything.
pub(super) const BOUND: Duration = Duration::from_secs(20);

/// The members of one etcd cluster. Dropping it kills them.
pub(super) struct Cluster {
    dir: TempDir,
    members: Vec<Member>,
    tls: Option<EtcdTls>,
}

struct Member {
    arguments: Vec<String>,
    address: String,
    child: Option<Child>,
}

impl Cluster {
    /// Starts that many members.
    pub(super) fn start(members: usize) -> Self {
        Self::start_with(members, |_| Vec::new(), None)
    }

    /// Starts members with further arguments, made for the directory of the test.
    pub(super) fn start_with(
        members: usize,
        more: impl Fn(&Path) -> Vec<String>,
        tls: Option<fn(&Path) -> EtcdTls>,
    ) -> Self {
        let dir = TempDir::new().unwrap();
        let more = more(dir.path());
        let tls = tls.map(|tls| tls(dir.path()));
        let scheme = if tls.is_some() { "https" } else { "http" };
        let ports: Vec<(u16, u16)> = (0..members).map(|_| (free_port(), free_port())).collect();
        let all: Vec<String> =
            ports.iter().enumerate().map(|(n, (_, peer))| format!("m{n}=http://127.0.0.1:{peer}")).collect();
        let member = |(n, (client, peer)): (usize, &(u16, u16))| {
            let address = format!("{scheme}://127.0.0.1:{client}");
            let peer = format!("http://127.0.0.1:{peer}");
            let mut arguments: Vec<String> = vec!["--unsafe-no-fsync".into()];
            for (name, value) in [
                ("name", format!("m{n}")),
                ("data-dir", dir.path().join(format!("m{n}")).display().to_string()),
                ("listen-client-urls", address.clone()),
                ("advertise-client-urls", address.clone()),
                ("listen-peer-urls", peer.clone()),
                ("initial-advertise-peer-urls", peer),
                ("initial-cluster", all.join(",")),
                ("heartbeat-interval", "50".into()),
                ("election-timeout", "500".into()),
                ("log-level", "error".into()),
            ] {
                arguments.push(format!("--{name}={value}"));
            }
            arguments.extend(more.iter().cloned());
            Member { arguments, address, child: None }
        };
        let members = ports.iter().enumerate().map(member).collect();
        let mut cluster = Self { dir, members, tls };
        (0..ports.len()).for_each(|n| cluster.begin(n));
        cluster
    }

    pub(super) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Starts the member, which does not run.
    pub(super) fn begin(&mut self, n: usize) {
        let log = fs::File::options().create(true).append(true).open(self.dir.path().join("log")).unwrap();
        let member = &mut self.members[n];
        let mut command = Command::new(tool("etcd"));
        command.args(&member.arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        member.child = Some(command.spawn().unwrap());
    }

    /// Kills it as `kill -9` does.
    pub(super) fn kill(&mut self, n: usize) {
        if let Some(mut child) = self.members[n].child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Sends it SIGSTOP or SIGCONT.
    pub(super) fn signal(&self, n: usize, signal: Signal) {
        let child = self.members[n].child.as_ref().unwrap();
        kill_process(Pid::from_raw(child.id().cast_signed()).unwrap(), signal).unwrap();
    }

    /// The member that leads, when there is one.
    pub(super) fn leader(&self) -> Option<usize> {
        let leads = |n: &usize| {
            let status = self.ctl_at(*n, &["endpoint", "status"]);
            let text = String::from_utf8_lossy(&status.stdout).into_owned();
            text.split(", ").nth(4) == Some("true")
        };
        (0..self.members.len()).find(leads)
    }

    /// Puts a backup in the place of the data of a member that does not run.
    pub(super) fn restore(&self, n: usize, backup: &str) {
        let value = |name: &str| {
            let of = |argument: &String| argument.starts_with(&format!("--{name}="));
            self.members[n].arguments.iter().find(|argument| of(argument)).unwrap().clone()
        };
        fs::remove_dir_all(self.dir.path().join(format!("m{n}"))).unwrap();
        let names = ["name", "data-dir", "initial-cluster", "initial-advertise-peer-urls"];
        let mut command = Command::new(tool("etcdutl"));
        command.args(["snapshot", "restore", backup]).args(names.map(value));
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// Runs `etcdctl`; it must succeed.
    pub(super) fn ctl(&self, arguments: &[&str]) -> String {
        let output = self.ctl_at(0, arguments);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn ctl_at(&self, n: usize, arguments: &[&str]) -> Output {
        let mut command = Command::new(tool("etcdctl"));
        command.args(["--endpoints", &self.members[n].address]).args(arguments);
        if let Some(tls) = &self.tls {
            command.arg("--cacert").arg(&tls.ca);
            if let Some((certificate, key)) = &tls.identity {
                command.arg("--cert").arg(certificate).arg("--key").arg(key);
            }
        }
        command.output().unwrap()
    }

    /// What a store needs to know, with waits that suit a test.
    pub(super) fn config(&self) -> EtcdConfig {
        EtcdConfig {
            endpoints: self.members.iter().map(|member| member.address.clone()).collect(),
            timeout: Duration::from_secs(4),
            session_ttl: Duration::from_secs(2),
            tls: self.tls.clone(),
            ..EtcdConfig::default()
        }
    }

    /// A store that has its session.
    pub(super) async fn store(&self) -> Arc<EtcdStore> {
        let store = Arc::new(EtcdStore::open(&self.config()).unwrap());
        until(&store, "a session", |status| status.session.is_some()).await;
        store
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        (0..self.members.len()).for_each(|n| self.kill(n));
    }
}

/// Waits until the status is so.
pub(super) async fn until(store: &EtcdStore, what: &str, is: impl FnMut(&Status) -> bool) -> Status {
    let mut status = store.status();
    let found = timeout(BOUND, status.wait_for(is)).await;
    let found = found.unwrap_or_else(|_| panic!("not {what}: {:?}", store.status().borrow()));
    found.unwrap().clone()
}

#[allow(clippy::disallowed_methods, reason = "where the tools are is told through the environment")]
pub(super) fn tool(name: &str) -> PathBuf {
    let folder = env::var_os("DISCO_TEST_TOOLS").map(PathBuf::from);
    let folder = folder.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join(".tools"));
    let path = folder.join("bin").join(name);
    assert!(path.exists(), "{} is missing; run `make tools`", path.display());
    path
}

/// A port that nobody used a moment ago.
fn free_port() -> u16 {
    TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port()
}
