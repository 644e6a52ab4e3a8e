//! Lists of peers as the databases read them.
//!
//! Pure: a set in, a text out. No text exists while founders are collected (rule N1), none is ever empty, and all have IP addresses
//! and ports only (rule N9). Where the list is a database's identity, a founder is given the list that it was founded with, for
//! ever, and a joiner the members of today, once its add was seen (finding 3, rule N11). Who lives decides nothing but, for
//! one database that stops at the first dead address, the order (rule N5).

mod documents;
mod format;
mod lines;
mod list;
mod template;
#[cfg(test)]
mod tests;

use std::fmt::Write as _;

pub use format::Format;
pub use template::render_template;

use super::{
    Refusal,
    set::{Birth, Facts, Founding, Kind, NodeId, Peer, PeerSet},
};
use crate::model::{InstanceId, Revision, ServiceId};
use list::List;

/// What else to go by.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options<'a> {
    /// Somebody repairs a database that lost its quorum, and said so (rule N10).
    pub recovering: bool,
    /// The databases speak TLS to each other, where that is part of an address.
    pub tls: bool,
    /// Who lives, for ordering only.
    pub facts: Option<&'a Facts>,
    /// Who leads, as published.
    pub leader: Option<&'a InstanceId>,
}

/// A list in a database's own format.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// Ends with a line end. Never empty.
    pub text: String,
    /// Of the set.
    pub revision: Revision,
    /// Of the founding list.
    pub digest: String,
}

/// Why there is no text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RenderError {
    /// The set is not founded yet. Not wrong, only too early.
    #[error(transparent)]
    NotYet(Refusal),
    /// The joiner may not start yet (rule N11). Not wrong, only too early.
    #[error(
        "{key} is not in the database yet: have it added (`disco peers propose`), and start it when that was seen; ask again"
    )]
    NotAdded {
        /// Which one.
        key: InstanceId,
    },
    /// There is no such replica.
    #[error(transparent)]
    NoPeer(Refusal),
    /// The text is different for each replica.
    #[error("{} is different for each replica: say for which one (peer)", format.as_str())]
    NeedsPeer {
        /// What was asked for.
        format: Format,
    },
    /// Nothing in the text would keep a joiner from founding a database.
    #[error(
        "{key} is no founder, and {} cannot say so: it would found a second database. {instead}",
        format.as_str()
    )]
    Joiner {
        /// Which one.
        key: InstanceId,
        /// What was asked for.
        format: Format,
        /// What to do.
        instead: &'static str,
    },
    /// The text makes a database forget who its members are.
    #[error(
        "{} is for a database that has lost its quorum for good: each replica that is left takes it for the truth and forgets what \
         was agreed with the others. Stop all of them, say that you are recovering (--i-am-recovering), and take out by hand who \
         is lost",
        format.as_str()
    )]
    NotRecovering {
        /// What was asked for.
        format: Format,
    },
    /// A format of another database.
    #[error("{set} is a set of {kind}, and {} is not a format for it: want one of {}", format.as_str(), names(*kind))]
    WrongKind {
        /// The set.
        set: ServiceId,
        /// Its database.
        kind: Kind,
        /// What was asked for.
        format: Format,
    },
    /// The database has less room for ids.
    #[error("{key} is node {node}, and {} has room for 1 to {most} only", format.as_str())]
    IdRange {
        /// Which one.
        key: InstanceId,
        /// Its number.
        node: NodeId,
        /// The greatest that there may be.
        most: u64,
        /// What was asked for.
        format: Format,
    },
    /// The replica has not told an address that the format has.
    #[error("{key} has no address for {port}: register it with one (ports.{port})")]
    NoPort {
        /// Which one.
        key: InstanceId,
        /// What the address is for.
        port: &'static str,
    },
    /// Nobody is in the database, which is no list at all (finding 1).
    #[error("nobody is in {set}: an empty list would found a second database")]
    Nobody {
        /// The set.
        set: ServiceId,
    },
    /// The template is wrong.
    #[error("{0}")]
    Template(String),
}

impl RenderError {
    /// Whether asking again may help: nothing is wrong.
    pub fn is_not_yet(&self) -> bool {
        matches!(self, Self::NotYet(_) | Self::NotAdded { .. })
    }
}

fn names(kind: Kind) -> String {
    let names: Vec<_> =
        Format::ALL.iter().filter(|format| format.fits(kind)).map(|format| format.as_str()).collect();
    names.join(", ")
}

/// The list of a set in a format, for one of its replicas, or for nobody in particular: a client, or a founder whichever it is.
///
/// # Errors
/// [`RenderError`] says why there is none. What is handed out is whole.
pub fn render(
    set: &PeerSet,
    peer: Option<&Peer>,
    format: Format,
    options: &Options<'_>,
) -> Result<Rendered, RenderError> {
    let founding = set.founding.as_ref().ok_or_else(|| RenderError::NotYet(set.not_yet()))?;
    if !format.fits(set.spec.kind) {
        return Err(RenderError::WrongKind { set: set.spec.name.clone(), kind: set.spec.kind, format });
    }
    if format == Format::HashicorpPeersJson && !options.recovering {
        return Err(RenderError::NotRecovering { format });
    }
    let list = List::of(set, founding, peer, format)?;
    let mut text = match format.comment() {
        Some(mark) => header(mark, set, founding),
        None => String::new(),
    };
    text.push_str(&body(set, founding, peer, format, &list, options)?);
    text.push('\n');
    Ok(Rendered { text, revision: set.revision, digest: founding.digest.clone() })
}

fn header(mark: &str, set: &PeerSet, founding: &Founding) -> String {
    let PeerSet { spec, generation, revision, .. } = set;
    let digest = &founding.digest;
    format!(
        "{mark} disco: set {}, generation {generation}, revision {revision}, digest {digest}\n",
        spec.name
    )
}

fn body(
    set: &PeerSet,
    founding: &Founding,
    peer: Option<&Peer>,
    format: Format,
    list: &List<'_>,
    options: &Options<'_>,
) -> Result<String, RenderError> {
    let own = || peer.ok_or(RenderError::NeedsPeer { format });
    Ok(match format {
        Format::Json => documents::json(set, founding, peer, list),
        Format::Env => lines::env(set, founding, peer, list),
        Format::EtcdInitialCluster => lines::etcd(list, options.tls),
        Format::EtcdEnv => lines::etcd_env(set, own()?, list, options.tls),
        Format::Flamed => lines::flamed(list),
        Format::FlamedEnv => lines::flamed_env(own()?, list),
        Format::Dragonboat => documents::dragonboat(set, founding, peer, list),
        Format::HashicorpConfiguration => documents::hashicorp_configuration(list),
        Format::HashicorpPeersJson => documents::hashicorp_peers(list),
        Format::Rqlite => lines::joined(&list.living_first(options.facts)),
        Format::NatsRoutes => lines::nats(list, options.tls),
        Format::Cockroach | Format::TigerBeetle | Format::Nebula => lines::joined(&list.lines),
        Format::FdbCluster => lines::fdb(set, list),
        Format::Galera => format!("gcomm://{}", lines::joined(&list.lines)),
        Format::ZooKeeper => lines::zookeeper(list)?,
        Format::KafkaQuorumVoters => lines::kafka_voters(list)?,
        Format::KafkaBootstrapServers => {
            format!("controller.quorum.bootstrap.servers={}", lines::joined(&list.lines))
        }
        Format::MongoDb => documents::mongodb(set, list)?,
        Format::ScyllaSeeds => lines::scylla(list),
        Format::SentinelMonitor => lines::sentinel(set, list, options.leader),
    })
}

/// `a b` with a line end before each but the first.
fn push_line(text: &mut String, line: impl std::fmt::Display) {
    if !text.is_empty() {
        text.push('\n');
    }
    // Writing to a string does not fail.
    let _ = write!(text, "{line}");
}

impl Birth {
    /// Whether the replica is added to a database that runs.
    fn joins(self) -> bool {
        self == Self::Joiner
    }
}
