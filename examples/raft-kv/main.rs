//! A replicated key-value store over gRPC, with openraft. Who it is, who founds it with whom and where they are, Disco tells it:
//!
//! ```text
//! disco peers create kv --expect 3 --kind openraft --observe openraft
//! disco run --peer-set kv --peer-key n1 --raft-port 7001 --port 8001 --data-dir n1 --health http /metrics -- raft-kv --data n1/raft
//! ```
//!
//! With a command it is a client: `raft-kv put KEY VALUE`. See README.md beside this file.

mod client;
mod network;
mod pb;
mod service;
mod store;

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail};
use axum::{routing::get, serve::ListenerExt as _};
use clap::Parser;
use client::{Call, To};
use network::{Ear, Network};
use openraft::{
    BasicNode, Config, Raft,
    error::{InitializeError, RaftError},
};
use pb::{key_value_server::KeyValueServer, membership_server::MembershipServer, raft_server::RaftServer};
use serde::{Deserialize, Serialize};
use service::Service;
use store::{Log, Machine};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
};
use tonic::transport::{Server, server::TcpIncoming};

type NodeId = u64;
type Node = BasicNode;

openraft::declare_raft_types!(
    /// What openraft is to replicate.
    Types: D = Write, R = (), SnapshotData = std::io::Cursor<Vec<u8>>
);

/// An entry of the log.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Write {
    key: String,
    value: String,
}

/// A replicated key-value store whose list of nodes comes from Disco.
#[derive(Parser)]
#[command(
    args_conflicts_with_subcommands = true,
    override_usage = "disco run --peer-set SET … -- raft-kv --data DIR\n       raft-kv COMMAND"
)]
struct Args {
    #[command(flatten)]
    told: Option<Told>,
    #[command(flatten)]
    to: To,
    #[command(subcommand)]
    call: Option<Call>,
}

/// What `disco run --peer-set` tells it.
#[derive(clap::Args)]
struct Told {
    /// Where the log is kept
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    #[arg(long, env = "DISCO_CLUSTER_ID", hide = true)]
    cluster: String,
    #[arg(long, env = "DISCO_NODE_ID", hide = true)]
    node: NodeId,
    #[arg(long, env = "DISCO_PEER_BIRTH", hide = true)]
    birth: Birth,
    #[arg(long, env = "DISCO_PEERS_FILE", hide = true)]
    peers: PathBuf,
    /// Where the other nodes reach it
    #[arg(long, env = "DISCO_PEER_ADDR", hide = true)]
    raft: SocketAddr,
    /// Where clients do
    #[arg(long, env = "DISCO_PEER_CLIENT_ADDR", hide = true)]
    clients: SocketAddr,
}

/// Whether it is one of those that make the cluster, or is added to it.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Birth {
    Founder,
    Joiner,
}

/// A list of peers in Disco's format `json`.
#[derive(Deserialize)]
struct Peers {
    cluster_id: String,
    founders: Vec<Founder>,
}

#[derive(Deserialize)]
struct Founder {
    node_id: NodeId,
    raft: SocketAddr,
}

#[tokio::main]
#[allow(clippy::print_stdout, reason = "a program for people")]
async fn main() -> anyhow::Result<()> {
    match Args::parse() {
        Args { call: Some(call), to, .. } => println!("{}", call.make(&to).await?),
        Args { told: Some(told), .. } => serve(told).await?,
        Args { .. } => bail!("want --data DIR, under `disco run --peer-set`, or a command"),
    }
    Ok(())
}

#[allow(clippy::print_stdout, reason = "a program for people")]
async fn serve(told: Told) -> anyhow::Result<()> {
    let Told { data, cluster, node, birth, peers, raft: at, clients, .. } = told;
    let config = Config {
        cluster_name: cluster.clone(),
        heartbeat_interval: 100,
        election_timeout_min: 250,
        election_timeout_max: 450,
        install_snapshot_timeout: 2000,
        snapshot_max_chunk_size: 1 << 20,
        max_payload_entries: 64,
        ..Config::default()
    };
    let log = Log::open(&data).await?;
    let machine = Machine::open(&data).await?;
    let network = Network { cluster: cluster.clone() };
    let raft = Raft::new(node, Arc::new(config.validate()?), network, log, machine.clone()).await?;

    let peer_listener = TcpListener::bind(at).await.with_context(|| at.to_string())?;
    let client_listener = TcpListener::bind(clients).await.with_context(|| clients.to_string())?;
    let ear = RaftServer::new(Ear { cluster: cluster.clone(), node, raft: raft.clone() });
    let ear = ear.max_decoding_message_size(network::LONGEST).max_encoding_message_size(network::LONGEST);
    let incoming = TcpIncoming::from(peer_listener).with_nodelay(Some(true));
    let peers_served = Server::builder().add_service(ear).serve_with_incoming(incoming);

    let service = Service { node, raft: raft.clone(), machine };
    let observed = service.clone();
    let routes = tonic::service::Routes::new(KeyValueServer::new(service.clone()))
        .add_service(MembershipServer::new(service))
        .into_axum_router()
        .route("/metrics", get(move || async move { observed.metrics() }));
    // gRPC calls and Disco's questions come to the one port.
    let client_listener = client_listener.tap_io(|stream| drop(stream.set_nodelay(true)));
    let clients_served = axum::serve(client_listener, routes);

    println!("node {node} of cluster {cluster} listens on {at} for nodes and on {clients} for clients");
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        served = peers_served => served?,
        served = async { clients_served.await } => served?,
        ended = live(&raft, birth, &peers, &cluster) => ended?,
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    // What it has said yes to is on its disk: calls under way fail, and are made again.
    tokio::time::timeout(Duration::from_secs(2), raft.shutdown()).await??;
    Ok(())
}

/// Makes the cluster when it is to, and returns when it can go on no longer, as when its disk is full.
async fn live(raft: &Raft<Types>, birth: Birth, peers: &Path, cluster: &str) -> anyhow::Result<()> {
    if birth == Birth::Founder {
        // All founders do so, with the one list that Disco has frozen: which of them is first does not matter. At a later start there
        // is something on the disk, and it is refused.
        match raft.initialize(founders(peers, cluster)?).await {
            Ok(()) | Err(RaftError::APIError(InitializeError::NotAllowed(_))) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let mut metrics = raft.metrics();
    loop {
        metrics.borrow_and_update().running_state.clone()?;
        metrics.changed().await?;
    }
}

fn founders(file: &Path, cluster: &str) -> anyhow::Result<BTreeMap<NodeId, Node>> {
    let read = || anyhow::Ok(serde_json::from_slice::<Peers>(&fs::read(file)?)?);
    let peers = read().with_context(|| file.display().to_string())?;
    if peers.cluster_id != cluster {
        bail!("{} is the list of cluster {}, not of {cluster}", file.display(), peers.cluster_id);
    }
    // An empty one would found a cluster of nobody (rule N1); Disco never writes it.
    if peers.founders.is_empty() {
        bail!("{} names no founders", file.display());
    }
    let node = |founder: Founder| (founder.node_id, Node::new(founder.raft));
    Ok(peers.founders.into_iter().map(node).collect())
}
