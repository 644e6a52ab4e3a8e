//! Calls to the store, through a proxy or to a node.

use std::time::Duration;

use tonic::transport::{Channel, Endpoint, Uri};

use super::pb::{
    AddLearnerRequest, GetRequest, NodeRequest, PutRequest, key_value_client::KeyValueClient,
    membership_client::MembershipClient,
};

const PATIENCE: Duration = Duration::from_secs(10);

/// Whom to call.
#[derive(clap::Args)]
pub(super) struct To {
    /// The proxy, or a node's client address
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:10000", global = true)]
    at: String,
    /// What to ask the proxy for
    #[arg(long, value_name = "NAME", default_value = "kv.leader", global = true)]
    authority: String,
}

/// What to ask.
#[derive(clap::Subcommand)]
pub(super) enum Call {
    /// Write a value
    Put { key: String, value: String },
    /// Read a value
    Get { key: String },
    /// Have a node get the log, without a vote; it need not run yet
    AddLearner {
        node: u64,
        /// Its Raft address
        #[arg(value_name = "IP:PORT")]
        address: String,
    },
    /// Have a learner vote
    Promote { node: u64 },
    /// Have a voter be a learner
    Demote { node: u64 },
    /// Have a node be none any more
    Remove { node: u64 },
}

impl Call {
    /// Returns what to print.
    pub(super) async fn make(self, to: &To) -> anyhow::Result<String> {
        let authority: Uri = format!("http://{}", to.authority).parse()?;
        let endpoint = Endpoint::from_shared(format!("http://{}", to.at))?.origin(authority);
        let channel: Channel = endpoint.connect_timeout(PATIENCE).timeout(PATIENCE).connect().await?;
        let mut store = KeyValueClient::new(channel.clone());
        let mut members = MembershipClient::new(channel);
        let changed = match self {
            Self::Put { key, value } => {
                let reply = store.put(PutRequest { key, value }).await?.into_inner();
                return Ok(format!("written by node {} at index {}", reply.node, reply.index));
            }
            Self::Get { key } => {
                let value = store.get(GetRequest { key }).await?.into_inner().value;
                return value.ok_or_else(|| anyhow::anyhow!("no such key"));
            }
            Self::AddLearner { node, address } => {
                members.add_learner(AddLearnerRequest { node, address }).await
            }
            Self::Promote { node } => members.promote(NodeRequest { node }).await,
            Self::Demote { node } => members.demote(NodeRequest { node }).await,
            Self::Remove { node } => members.remove(NodeRequest { node }).await,
        };
        Ok(format!("done at index {}", changed?.into_inner().index))
    }
}
