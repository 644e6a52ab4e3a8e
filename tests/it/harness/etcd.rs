use std::{net::SocketAddr, path::Path, process::Command};

use anyhow::Context as _;
use rustix::process::Signal;

use super::{PATIENCE, Place, Process, eventually, free_port, request, tool};

/// The members of an etcd cluster.
#[derive(Debug)]
pub(crate) struct Etcd {
    folder: std::path::PathBuf,
    members: Vec<Member>,
}

#[derive(Debug)]
struct Member {
    name: String,
    place: Place,
    arguments: Vec<String>,
    url: String,
    seen: SocketAddr,
    process: Option<Process>,
}

impl Etcd {
    /// Starts a member in each place and waits until they answer.
    pub(crate) fn start(folder: &Path, places: &[Place]) -> anyhow::Result<Self> {
        let ports: Vec<_> =
            places.iter().map(|_| anyhow::Ok((free_port()?, free_port()?))).collect::<Result<_, _>>()?;
        let url = |place: &Place, port: u16| format!("http://{}", SocketAddr::new(place.ip, port));
        let cluster: Vec<_> = places
            .iter()
            .zip(&ports)
            .enumerate()
            .map(|(n, (place, (_, peer)))| format!("e{}={}", n + 1, url(place, *peer)))
            .collect();
        let member = |(n, (place, (client, peer))): (usize, (&Place, &(u16, u16)))| {
            let name = format!("e{}", n + 1);
            let (own, peer_url) = (url(place, *client), url(place, *peer));
            let listen = |port: u16| format!("http://{}", SocketAddr::new(place.listen(), port));
            let mut arguments = vec!["--unsafe-no-fsync".to_owned()];
            for (flag, value) in [
                ("name", name.clone()),
                ("data-dir", folder.join(format!("{name}.data")).display().to_string()),
                ("listen-client-urls", listen(*client)),
                ("advertise-client-urls", own.clone()),
                ("listen-peer-urls", listen(*peer)),
                ("initial-advertise-peer-urls", peer_url),
                ("initial-cluster", cluster.join(",")),
                ("heartbeat-interval", "100".into()),
                ("election-timeout", "1000".into()),
                ("log-level", "error".into()),
            ] {
                arguments.push(format!("--{flag}={value}"));
            }
            let seen = SocketAddr::new(place.seen, *client);
            Member { name, place: place.clone(), arguments, url: own, seen, process: None }
        };
        let members = places.iter().zip(&ports).enumerate().map(member).collect();
        let mut etcd = Self { folder: folder.to_owned(), members };
        for n in 0..places.len() {
            etcd.begin(n)?;
        }
        etcd.wait_well()?;
        Ok(etcd)
    }

    /// Starts the member, which does not run.
    pub(crate) fn begin(&mut self, n: usize) -> anyhow::Result<()> {
        let member = &mut self.members[n];
        let mut command: Command = member.place.command(tool("etcd")?);
        command.args(&member.arguments);
        member.process = Some(Process::start(&member.name, &self.folder, &mut command)?);
        Ok(())
    }

    /// Waits until all say that they have a leader.
    pub(crate) fn wait_well(&self) -> anyhow::Result<()> {
        for member in &self.members {
            eventually(&format!("answer of etcd {}", member.name), PATIENCE, || {
                let answer = request(member.seen, "GET", "/health", b"").ok()?;
                answer.body.contains("true").then_some(())
            })?;
        }
        Ok(())
    }

    pub(crate) fn members(&self) -> usize {
        self.members.len()
    }

    /// What Disco calls them.
    pub(crate) fn endpoints(&self) -> Vec<String> {
        self.members.iter().map(|member| member.url.clone()).collect()
    }

    /// `kill -9`.
    pub(crate) fn kill(&mut self, n: usize) {
        self.members[n].process = None;
    }

    /// Stops or continues it, say.
    pub(crate) fn signal(&self, n: usize, signal: Signal) -> anyhow::Result<()> {
        self.members[n].process.as_ref().context("it does not run")?.signal(signal)
    }
}
