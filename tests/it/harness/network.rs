use std::{collections::BTreeMap, net::IpAddr, process::Command};

use anyhow::{Context as _, ensure};

use super::Place;

/// Where packets go that are to be lost.
const NOWHERE: &str = "nowhere";

/// Several machines on one network, made of network namespaces on a bridge; the test is one of them. Each has two addresses: one
/// for the others, which can be cut, and one for the test.
///
/// Wants a network namespace of its own, and a `/run` that it may write to: see `make chaos`.
#[derive(Debug)]
pub(crate) struct Network {
    places: BTreeMap<String, Place>,
}

impl Network {
    /// The name of the machine that the test is on.
    pub(crate) const TEST: &'static str = "test";

    /// Makes the machines of these names.
    pub(crate) fn new(names: &[&str]) -> anyhow::Result<Self> {
        ip("link add mesh0 type bridge")?;
        ip("link set mesh0 up")?;
        ip("addr add 10.77.0.1/24 dev mesh0")?;
        ip("addr add 10.78.0.1/24 dev mesh0")?;
        nowhere("")?;
        let here = Place { network: None, ip: [10, 77, 0, 1].into(), seen: [10, 78, 0, 1].into() };
        let mut places = BTreeMap::from([(Self::TEST.to_owned(), here)]);
        for (name, n) in names.iter().zip(11_u8..) {
            let (ip_address, seen) = (IpAddr::from([10, 77, 0, n]), IpAddr::from([10, 78, 0, n]));
            for line in [
                format!("netns add {name}"),
                format!("link add v-{name} type veth peer name wire netns {name}"),
                format!("link set v-{name} master mesh0"),
                format!("link set v-{name} up"),
                format!("-n {name} link set lo up"),
                format!("-n {name} addr add {ip_address}/24 dev wire"),
                format!("-n {name} addr add {seen}/24 dev wire"),
                format!("-n {name} link set wire up"),
            ] {
                ip(&line)?;
            }
            nowhere(&format!("-n {name} "))?;
            let place = Place { network: Some((*name).to_owned()), ip: ip_address, seen };
            places.insert((*name).to_owned(), place);
        }
        Ok(Self { places })
    }

    pub(crate) fn place(&self, name: &str) -> anyhow::Result<&Place> {
        self.places.get(name).with_context(|| format!("no machine {name}"))
    }

    /// Loses every packet between the one group and the other.
    pub(crate) fn cut(&self, one: &[&str], other: &[&str]) -> anyhow::Result<()> {
        self.each_way(one, other, "add")
    }

    /// Undoes that.
    pub(crate) fn mend(&self, one: &[&str], other: &[&str]) -> anyhow::Result<()> {
        self.each_way(one, other, "del")
    }

    fn each_way(&self, one: &[&str], other: &[&str], verb: &str) -> anyhow::Result<()> {
        for a in one {
            for b in other {
                let (a, b) = (self.place(a)?, self.place(b)?);
                for (from, to) in [(a, b), (b, a)] {
                    let within = from.network.as_ref().map(|name| format!("-n {name} ")).unwrap_or_default();
                    ip(&format!("{within}route {verb} {}/32 dev {NOWHERE}", to.ip))?;
                }
            }
        }
        Ok(())
    }
}

/// A wire to a wall: what goes in is for nobody, and nobody says so.
fn nowhere(within: &str) -> anyhow::Result<()> {
    ip(&format!("{within}link add {NOWHERE} type veth peer name wall"))?;
    ip(&format!("{within}link set {NOWHERE} arp off"))?;
    ip(&format!("{within}link set wall arp off"))?;
    ip(&format!("{within}link set wall up"))?;
    ip(&format!("{within}link set {NOWHERE} up"))
}

fn ip(line: &str) -> anyhow::Result<()> {
    let output = Command::new("ip").args(line.split_whitespace()).output().context("cannot run ip")?;
    ensure!(output.status.success(), "ip {line}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
