use std::{fmt, str::FromStr};

use crate::{
    model::excerpt,
    peers::set::{Class, Kind},
};

macro_rules! formats {
    ($($variant:ident $name:literal $class:tt $comment:tt [$($kind:ident)*] $doc:literal;)*) => {
        /// How a list is written.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Format {
            $(#[doc = $doc] $variant,)*
        }

        impl Format {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// Its name in requests.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// What it is, for help texts.
            pub fn describe(self) -> &'static str {
                match self { $(Self::$variant => $doc,)* }
            }

            /// What such a list means; `None`: what it means to the database, whichever that is.
            pub fn class(self) -> Option<Class> {
                match self { $(Self::$variant => formats!(@class $class),)* }
            }

            /// What begins a comment, where there may be any. Then the first line is one, with the revision and the digest.
            pub fn comment(self) -> Option<&'static str> {
                match self { $(Self::$variant => formats!(@comment $comment),)* }
            }

            /// Whose it is; none: everybody's.
            fn kinds(self) -> &'static [Kind] {
                match self { $(Self::$variant => &[$(Kind::$kind),*],)* }
            }
        }
    };
    (@class any) => { None };
    (@class $class:ident) => { Some(Class::$class) };
    (@comment -) => { None };
    (@comment $mark:literal) => { Some($mark) };
}

formats! {
    Json "json" any - [] "Everything about the set and this replica, for programs and templates.";
    Env "env" any "#" [] "Environment variables: DISCO_PEERS, DISCO_NODE_ID, PEERS_0_ADDR and others.";
    EtcdInitialCluster "etcd-initial-cluster" Identity - [Etcd] "For `etcd --initial-cluster`.";
    EtcdEnv "etcd-env" Identity "#" [Etcd] "ETCD_INITIAL_CLUSTER and all that goes with it, as an environment file.";
    Flamed "flamed" Identity - [Flamed Dragonboat] "For `flamed --initial-members`; founders only.";
    FlamedEnv "flamed-env" Identity "#" [Flamed] "FLAMED_INITIALMEMBERS, FLAMED_JOIN and others, as an environment file.";
    Dragonboat "dragonboat" Identity - [Dragonboat Flamed] "JSON for StartReplica: initial_members and join.";
    HashicorpConfiguration "hashicorp-configuration" Identity - [HashicorpRaft] "JSON of raft.Configuration, for BootstrapCluster; founders only.";
    HashicorpPeersJson "hashicorp-peers-json" Seeds - [HashicorpRaft Rqlite] "peers.json, for the recovery of a lost quorum and nothing else.";
    Rqlite "rqlite" Seeds - [Rqlite] "For `rqlited -join`, those that live first.";
    NatsRoutes "nats-routes" Seeds "#" [Nats] "The routes, to be included in `cluster { include \"routes.conf\" }`.";
    Cockroach "cockroach" Seeds - [Cockroach] "For `cockroach start --join`.";
    TigerBeetle "tigerbeetle" Identity - [TigerBeetle] "For `tigerbeetle start --addresses` and for clients, in order.";
    FdbCluster "fdb-cluster" Identity "#" [FoundationDb] "fdb.cluster; FoundationDB owns the file once it is there.";
    Galera "galera" Seeds - [Galera] "For wsrep_cluster_address; never empty.";
    ZooKeeper "zookeeper" Identity "#" [ZooKeeper] "The server lines of zoo.cfg; the address for elections is the port `election`.";
    KafkaQuorumVoters "kafka-quorum-voters" Identity "#" [Kafka] "controller.quorum.voters, for a static quorum; founders only.";
    KafkaBootstrapServers "kafka-bootstrap-servers" Seeds "#" [Kafka] "controller.quorum.bootstrap.servers, for a dynamic quorum.";
    MongoDb "mongodb" Identity - [MongoDb] "The document for rs.initiate, on one founder, once.";
    ScyllaSeeds "scylla-seeds" Seeds - [Scylla] "The seeds of scylla.yaml and cassandra.yaml: the first three addresses.";
    SentinelMonitor "sentinel-monitor" Seeds "#" [Redis] "The monitor line of sentinel.conf; Sentinel owns the file once it runs.";
    Nebula "nebula" Identity - [Nebula] "For --meta_server_addrs.";
}

impl Format {
    /// Whether it says something to this database.
    pub fn fits(self, kind: Kind) -> bool {
        self.kinds().is_empty() || kind == Kind::Generic || self.kinds().contains(&kind)
    }

    /// Whether the database writes such a file itself, so that it is written only where there is none.
    pub fn is_theirs(self) -> bool {
        matches!(self, Self::FdbCluster | Self::SentinelMonitor)
    }
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL.iter().find(|format| format.as_str() == text).copied().ok_or_else(|| {
            let all: Vec<_> = Self::ALL.iter().map(|format| format.as_str()).collect();
            format!("{} is not a format: want one of {}", excerpt(text), all.join(", "))
        })
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}
