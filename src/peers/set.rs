use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::SocketAddr,
    str::FromStr,
    sync::Arc,
    time::SystemTime,
};

use crate::model::{InstanceId, Revision, Role, ServiceId, excerpt};

/// The id of a replica, for databases that want a number. Given out once for ever within a set, never 0 (rule N4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub u64);

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What a database takes its identity from: minted once for each founding of a set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ClusterId(pub u128);

impl ClusterId {
    /// The short form, for databases that want a number of 64 bits. Never 0.
    pub fn short(self) -> u64 {
        let folded = (self.0 >> 64) as u64 ^ self.0 as u64;
        folded.max(1)
    }
}

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hex = format!("{:032x}", self.0);
        let (a, rest) = hex.split_at(8);
        let (b, rest) = rest.split_at(4);
        let (c, rest) = rest.split_at(4);
        let (d, e) = rest.split_at(4);
        write!(f, "{a}-{b}-{c}-{d}-{e}")
    }
}

impl FromStr for ClusterId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let hex = text.replace('-', "");
        let parsed = u128::from_str_radix(&hex, 16).ok().filter(|_| hex.len() == 32 && !hex.starts_with('+'));
        parsed
            .map(Self)
            .ok_or_else(|| format!("{} is not a cluster id: want 32 hexadecimal digits", excerpt(text)))
    }
}

/// What a list of peers means to a database.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// The list is the cluster's identity: another list is another database.
    Identity,
    /// The list is where to ask first. It may follow who lives.
    Seeds,
    /// There is no list: ids are looked up as needed.
    Addresses,
}

impl Class {
    /// Its name in requests and answers.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Identity => "identity",
            Self::Seeds => "seeds",
            Self::Addresses => "addresses",
        }
    }
}

/// How a database tells who leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leadership {
    /// Every replica names the leader it follows: a leader is one that a majority of the voters names.
    Majority,
    /// Only the leader says so of itself, or an arbiter (a sentinel, a lock) says so of it.
    Claim,
}

macro_rules! kinds {
    ($($variant:ident $name:literal $class:ident $leadership:ident $learners:literal $doc:literal;)*) => {
        /// Which database a set is of. It decides what a list means, how changes of membership go, and which commands are named.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Kind {
            $(#[doc = $doc] $variant,)*
        }

        impl Kind {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// Its name in requests and answers.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// What a list of peers means to it.
            pub fn class(self) -> Class {
                match self { $(Self::$variant => Class::$class,)* }
            }

            /// How it tells who leads.
            pub fn leadership(self) -> Leadership {
                match self { $(Self::$variant => Leadership::$leadership,)* }
            }

            /// Whether a new replica is to copy as a learner before it votes.
            pub fn has_learners(self) -> bool {
                match self { $(Self::$variant => $learners,)* }
            }
        }
    };
}

kinds! {
    Etcd "etcd" Identity Majority true "etcd.";
    Dragonboat "dragonboat" Identity Majority true "A program with dragonboat.";
    Flamed "flamed" Identity Majority true "flamed, which is dragonboat.";
    TigerBeetle "tigerbeetle" Identity Claim false "TigerBeetle: an ordered list, of fixed length.";
    MongoDb "mongodb" Identity Majority false "A MongoDB replica set.";
    Kafka "kafka" Identity Majority false "Kafka's KRaft controllers.";
    ZooKeeper "zookeeper" Identity Majority false "ZooKeeper.";
    FoundationDb "foundationdb" Identity Claim false "FoundationDB's coordinators.";
    Nebula "nebula" Identity Majority false "NebulaGraph's meta services.";
    Nats "nats" Seeds Majority false "NATS with JetStream.";
    Scylla "scylla" Seeds Claim false "ScyllaDB or Cassandra.";
    Cockroach "cockroach" Seeds Claim false "CockroachDB.";
    Galera "galera" Seeds Claim false "MariaDB Galera.";
    Rqlite "rqlite" Seeds Majority true "rqlite.";
    Redis "redis" Seeds Claim false "Redis with Sentinel.";
    Postgres "postgres" Seeds Claim false "PostgreSQL, by Patroni or by a lock.";
    HashicorpRaft "hashicorp-raft" Identity Majority true "A program with hashicorp/raft.";
    OpenRaft "openraft" Addresses Majority true "A program with openraft.";
    RaftRs "raft-rs" Addresses Majority true "A program with raft-rs.";
    Generic "generic" Identity Claim false "Anything else; the careful choice.";
}

impl FromStr for Kind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL.iter().find(|kind| kind.as_str() == text).copied().ok_or_else(|| {
            let all: Vec<_> = Self::ALL.iter().map(|kind| kind.as_str()).collect();
            format!(
                "{} is not a kind of database that Disco knows: want one of {}",
                excerpt(text),
                all.join(", ")
            )
        })
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// What a replica is in the database's own membership.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Suffrage {
    /// It is not in it yet.
    Staging,
    /// It copies, and has no vote.
    Learner,
    /// It votes.
    Voter,
    /// It votes, and keeps no data.
    Witness,
}

impl Suffrage {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Staging, Self::Learner, Self::Voter, Self::Witness];

    /// Its name in requests and answers.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Staging => "staging",
            Self::Learner => "learner",
            Self::Voter => "voter",
            Self::Witness => "witness",
        }
    }

    /// Whether it counts towards a quorum.
    pub fn votes(self) -> bool {
        matches!(self, Self::Voter | Self::Witness)
    }
}

/// How a replica came into the database: what it has to be started with, for ever (finding 3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Birth {
    /// With the founding list.
    Founder,
    /// Added to a running database.
    Joiner,
}

impl Birth {
    /// Its name in requests and answers.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Founder => "founder",
            Self::Joiner => "joiner",
        }
    }
}

/// Whether a replica runs, by leases and checks. Never a reason to take it out of a list (rule N5).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Liveness {
    /// It does not, or nobody knows of it.
    #[default]
    Down,
    /// Nobody vouches for it any more, or its check fails.
    Suspect,
    /// It does.
    Up,
}

impl Liveness {
    /// Its name in requests and answers.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Down => "down",
            Self::Suspect => "suspect",
            Self::Up => "up",
        }
    }
}

/// Where a replica listens. IP addresses and ports only (rule N9).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Addresses {
    /// For the other replicas.
    pub raft: SocketAddr,
    /// For clients of the database.
    pub client: SocketAddr,
    /// Others, by what they are for, such as `http`.
    pub extra: BTreeMap<String, SocketAddr>,
}

/// A replica.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Its number.
    pub node: NodeId,
    /// Its name, which is also its instance id.
    pub key: InstanceId,
    /// Which disk it has: another one under the same name is another replica (rule N4).
    pub disk: String,
    /// Its place in ordered lists, from 0. Given once (rule N8).
    pub ordinal: u32,
    /// Where it listens now.
    pub at: Addresses,
    /// Where it stands, for spreading; empty when unknown.
    pub zone: String,
    /// Of its software; empty when unknown.
    pub version: String,
    /// What it is in the database, as last confirmed.
    pub suffrage: Suffrage,
    /// How it came in.
    pub birth: Birth,
    /// An operator wants it out.
    pub leaving: bool,
}

/// A replica as it was when the list was frozen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Founder {
    /// Its number.
    pub node: NodeId,
    /// Its name.
    pub key: InstanceId,
    /// Its place, from 0.
    pub ordinal: u32,
    /// Where it listened.
    pub at: Addresses,
    /// Where it stood.
    pub zone: String,
}

/// The list that a database is founded with. Once frozen it never changes and is kept for ever (rules N2 and N3).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Founding {
    /// In order; complete.
    pub list: Arc<[Founder]>,
    /// SHA-256 over all that makes it this list, in hexadecimal.
    pub digest: String,
    /// When the last founder came.
    pub at: SystemTime,
    /// What about it may be regretted, such as all in one zone (rules N13 and N14).
    pub warnings: Vec<String>,
}

/// How replicas are to be spread over zones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Spread {
    /// Most voters in one zone.
    pub most_per_zone: u32,
    /// Refuse rather than warn.
    pub required: bool,
}

/// A change to a database's own membership.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Change {
    /// In, to copy.
    AddLearner,
    /// In, with a vote.
    AddVoter,
    /// From copying to voting.
    Promote,
    /// From voting to copying.
    Demote,
    /// Out.
    Remove,
}

impl Change {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::AddLearner, Self::AddVoter, Self::Promote, Self::Demote, Self::Remove];

    /// Its name in requests and answers.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::AddLearner => "add-learner",
            Self::AddVoter => "add-voter",
            Self::Promote => "promote",
            Self::Demote => "demote",
            Self::Remove => "remove",
        }
    }
}

/// The one change that is under way (rule N6).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pending {
    /// What.
    pub change: Change,
    /// To which replica.
    pub node: NodeId,
    /// Since when.
    pub since: SystemTime,
}

/// What is wanted of a set when it is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spec {
    /// The set, which is also the service that its replicas are instances of.
    pub name: ServiceId,
    /// Which database.
    pub kind: Kind,
    /// How many founders; from 1 to [`MOST_FOUNDERS`].
    pub expect: u32,
    /// How they are to be spread, if anyhow.
    pub spread: Option<Spread>,
    /// How Disco is to find out who leads; `None`: somebody reports it.
    pub observe: Option<Observe>,
}

/// Most founders of a set.
pub const MOST_FOUNDERS: u32 = 64;

/// Most replicas of a set, with those that are to join.
pub const MOST_PEERS: usize = 256;

/// How Disco is to find out what each replica does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Observe {
    /// Which language to speak.
    pub adapter: String,
    /// Which of a replica's extra addresses to ask; empty: its client address.
    pub port: String,
    /// What else the adapter needs, such as a path.
    pub options: BTreeMap<String, String>,
    /// How often each replica is asked.
    pub every: std::time::Duration,
}

impl Observe {
    /// How often, unless it is said.
    pub const EVERY: std::time::Duration = std::time::Duration::from_millis(100);
}

/// The replicas of one database: who founded it, who is in it, and which change is under way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerSet {
    /// What was wanted.
    pub spec: Spec,
    /// The identity of this founding.
    pub cluster: ClusterId,
    /// Counts foundings, from 1.
    pub generation: u64,
    /// No founding that was ever begun has a greater number than this (rule N2). Beyond `generation` after a restore only.
    pub last_generation: u64,
    /// `None` while founders are collected.
    pub founding: Option<Founding>,
    /// All that have a number and are not removed, by it.
    pub peers: BTreeMap<NodeId, Peer>,
    /// Numbers that are never given again, with the name and the disk that had each (rule N4).
    pub removed: BTreeMap<NodeId, Gone>,
    /// The next number to give out. Greater than all that were.
    pub next_node: u64,
    /// The next place in ordered lists.
    pub next_ordinal: u32,
    /// At most one.
    pub pending: Option<Pending>,
    /// The change that last touched it; 0 before the first.
    pub revision: Revision,
}

/// A replica that is out for good.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Gone {
    /// Its name.
    pub key: InstanceId,
    /// Its disk.
    pub disk: String,
    /// Where the others knew it; `None` when it was never in this database.
    pub raft: Option<SocketAddr>,
}

/// A replica in a database's own list of members.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct SeenMember {
    /// How the database calls it.
    pub id: String,
    /// The name that it goes by there; empty when it has none.
    pub name: String,
    /// Where the others find it, when the database tells.
    pub raft: Option<SocketAddr>,
    /// Whether it votes.
    pub voter: bool,
}

/// What one replica says about itself and the others.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observation {
    /// What it does.
    pub role: Role,
    /// Its term (epoch, configuration number), 0 when the database has none.
    pub term: u64,
    /// Whom it takes for the leader.
    pub leader: Option<NodeId>,
    /// The index of the configuration that it goes by, 0 when unknown.
    pub config_index: u64,
    /// How far it has come, in log entries or bytes; 0 when unknown.
    pub applied: u64,
    /// Its list of members, when it tells.
    pub members: Option<BTreeSet<SeenMember>>,
    /// The digest of the founding list that it was started with, when it tells (rule N2).
    pub digest: Option<String>,
}

/// What is known of the replicas beside what is written: by leases and by what they say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Facts {
    /// Whether each runs. One that is absent is down.
    pub liveness: BTreeMap<NodeId, Liveness>,
    /// What each that was heard of lately says.
    pub observed: BTreeMap<NodeId, Observation>,
}

impl Facts {
    /// Whether a replica runs.
    pub fn liveness(&self, node: NodeId) -> Liveness {
        self.liveness.get(&node).copied().unwrap_or_default()
    }
}

impl PeerSet {
    /// A replica by name.
    pub fn peer(&self, key: &InstanceId) -> Option<&Peer> {
        self.peers.values().find(|peer| peer.key == *key)
    }

    /// Those that vote.
    pub fn voters(&self) -> impl Iterator<Item = &Peer> {
        self.peers.values().filter(|peer| peer.suffrage.votes())
    }

    /// Those that are in the database: what is handed out as the current list (never while founders are collected, rule N1).
    pub fn members(&self) -> impl Iterator<Item = &Peer> {
        self.peers.values().filter(|peer| self.founding.is_some() && peer.suffrage != Suffrage::Staging)
    }

    /// Which replica a member of the database's own list is, by what is surest in such a database: where an address is identity,
    /// another address is another member whatever its name; where ids are looked up, another number is another member wherever it
    /// is. A name or an address that was used again must not pass for whom it was before.
    pub fn find(&self, seen: &SeenMember) -> Option<&Peer> {
        let by = |matches: &dyn Fn(&Peer) -> bool| self.peers.values().find(|peer| matches(peer));
        let by_id = || by(&|peer| seen.id == peer.node.to_string());
        let by_name = || by(&|peer| !seen.name.is_empty() && peer.key.as_str() == seen.name);
        // A name that was another member's before may be that one still.
        let used =
            |key: &InstanceId| self.removed.values().any(|gone| gone.raft.is_some() && gone.key == *key);
        let by_own_name = || by_name().filter(|peer| !used(&peer.key));
        let by_raft = || seen.raft.and_then(|raft| by(&|peer| same_place(peer.at.raft, raft)));
        match self.spec.kind.class() {
            Class::Identity if seen.raft.is_some() => by_raft(),
            Class::Identity => by_own_name().or_else(by_id),
            Class::Addresses if seen.id.parse::<u64>().is_ok() => by_id(),
            Class::Addresses => by_name().or_else(by_raft),
            Class::Seeds if seen.raft.is_some() => by_name().or_else(by_raft),
            Class::Seeds => by_name().or_else(by_id),
        }
    }

    /// Whether some replica's own list of members has this one.
    pub fn is_listed(&self, node: NodeId, facts: &Facts) -> bool {
        let lists = facts.observed.values().filter_map(|seen| seen.members.as_ref());
        lists.flatten().any(|member| self.find(member).is_some_and(|peer| peer.node == node))
    }

    /// Whether what a replica says is said of this database: one that was started with another founding list is in another (rule
    /// N2).
    pub fn is_of_this(&self, seen: &Observation) -> bool {
        let Some(digest) = &seen.digest else { return true };
        self.founding.as_ref().is_some_and(|founding| founding.digest == *digest)
    }
}

/// Whether two addresses are one, also when one of them is an IPv4 address in the form of IPv6.
pub(super) fn same_place(a: SocketAddr, b: SocketAddr) -> bool {
    (a.ip().to_canonical(), a.port()) == (b.ip().to_canonical(), b.port())
}
