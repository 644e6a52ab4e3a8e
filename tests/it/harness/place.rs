use std::{ffi::OsStr, net::IpAddr, process::Command};

/// Where a process runs: on this machine, or on one of its own made of a network namespace.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    /// Its network namespace.
    pub(crate) network: Option<String>,
    /// Its address for all others.
    pub(crate) ip: IpAddr,
    /// Its address for the test, which no cut concerns.
    pub(crate) seen: IpAddr,
}

impl Place {
    /// Loopback.
    pub(crate) fn here() -> Self {
        let ip = IpAddr::from([127, 0, 0, 1]);
        Self { network: None, ip, seen: ip }
    }

    /// A command that runs `program` there.
    pub(crate) fn command(&self, program: impl AsRef<OsStr>) -> Command {
        match &self.network {
            None => Command::new(program),
            Some(name) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", name]).arg(program);
                command
            }
        }
    }

    /// What to listen on, to be reached at both addresses.
    pub(crate) fn listen(&self) -> IpAddr {
        if self.network.is_some() { [0, 0, 0, 0].into() } else { self.ip }
    }
}
