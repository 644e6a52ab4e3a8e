//! Renewals that came to another process than the one that counts the lease: it is told, and nothing is written. So a load
//! balancer may spread the renewals of one instance over all processes, and the store hears of none of them.

use std::{fmt::Debug, time::Duration};

use dashmap::DashMap;
use futures_util::future::BoxFuture;
use tonic::{
    Request,
    metadata::MetadataValue,
    transport::{Channel, Endpoint},
};

use super::{Membership, Registry, write::Accepted};
use crate::{
    model::{Incarnation, Instance, InstanceKey, Lease, MemberId, Revision},
    proto::v1::{InstanceRef, RenewRequest, registry_client::RegistryClient},
};

/// Marks a renewal that was passed on, so that it is not passed on again.
pub const FORWARDED: &str = "disco-forwarded";

/// How long the other process may take. Then this one becomes the owner, which always works.
const WITHIN: Duration = Duration::from_secs(1);

/// Tells another process of a renewal.
pub trait Forward: Debug + Send + Sync {
    /// The TTL, if `owner` has counted the renewal; `None` if it did not for whatever reason.
    fn renew<'a>(
        &'a self,
        owner: &'a MemberId,
        key: &'a InstanceKey,
        incarnation: Incarnation,
    ) -> BoxFuture<'a, Option<Duration>>;
}

/// Over gRPC, to where the members say that they listen.
#[derive(Debug)]
pub struct GrpcForward {
    nodes: Membership,
    links: DashMap<String, RegistryClient<Channel>>,
}

impl GrpcForward {
    /// To the members that `nodes` tells of.
    pub fn new(nodes: Membership) -> Self {
        Self { nodes, links: DashMap::new() }
    }

    fn link(&self, owner: &MemberId) -> Option<RegistryClient<Channel>> {
        let node = self.nodes.latest().into_iter().find(|node| node.id == *owner)?;
        if let Some(link) = self.links.get(&node.grpc) {
            return Some(link.clone());
        }
        let endpoint = Endpoint::from_shared(format!("http://{}", node.grpc)).ok()?;
        let endpoint = endpoint.connect_timeout(WITHIN).timeout(WITHIN).tcp_nodelay(true);
        let link = RegistryClient::new(endpoint.connect_lazy());
        // Nodes come and go with other ports.
        let nodes: Vec<String> = self.nodes.latest().into_iter().map(|node| node.grpc).collect();
        self.links.retain(|address, _| nodes.contains(address));
        self.links.insert(node.grpc, link.clone());
        Some(link)
    }
}

impl Forward for GrpcForward {
    fn renew<'a>(
        &'a self,
        owner: &'a MemberId,
        key: &'a InstanceKey,
        incarnation: Incarnation,
    ) -> BoxFuture<'a, Option<Duration>> {
        Box::pin(async move {
            let mut link = self.link(owner)?;
            let instance = InstanceRef {
                service: key.service.to_string(),
                id: key.id.to_string(),
                incarnation: incarnation.0,
            };
            let mut request = Request::new(RenewRequest { instance: Some(instance) });
            request.metadata_mut().insert(FORWARDED, MetadataValue::from_static("1"));
            match tokio::time::timeout(WITHIN, link.renew(request)).await {
                Ok(Ok(answer)) => Duration::try_from(answer.into_inner().ttl?).ok(),
                Ok(Err(error)) => {
                    tracing::debug!(%owner, instance = %key, %error, "a renewal was not taken by the node that counts the lease");
                    None
                }
                Err(_) => None,
            }
        })
    }
}

impl Registry {
    /// Has the process that counts the lease renew it.
    pub(super) async fn renew_elsewhere(&self, instance: &Instance) -> Option<Duration> {
        let forward = self.inner.network.forward.as_ref()?;
        let owner = instance.owner.as_ref()?;
        let fresh = instance.stale.is_none() && matches!(instance.lease, Lease::Ttl(_));
        if !fresh || self.inner.keeps(instance) || !self.inner.members.borrow().live.contains(owner) {
            return None;
        }
        forward.renew(owner, &instance.key, instance.incarnation).await
    }

    /// The renewal of a lease that another process counts.
    pub(super) async fn renew_there(
        &self,
        key: &InstanceKey,
        incarnation: Option<Incarnation>,
    ) -> Option<(Duration, Revision)> {
        let snapshot = self.inner.catalog.latest();
        let present = snapshot.instance(key)?;
        if incarnation.is_some_and(|incarnation| incarnation != present.incarnation) {
            return None;
        }
        let ttl = self.renew_elsewhere(present).await?;
        Some((ttl, snapshot.revision()))
    }

    /// What a registration comes to that changes nothing of an instance whose lease another process counts: its renewal.
    pub(super) async fn register_there(&self, next: &Instance) -> Option<Accepted> {
        let snapshot = self.inner.catalog.latest();
        let present = snapshot.instance(&next.key)?;
        let same = Instance { owner: present.owner.clone(), revision: present.revision, ..next.clone() };
        if same != **present {
            return None;
        }
        self.renew_elsewhere(present).await?;
        Some(Accepted { revision: present.revision, instance: present.clone() })
    }
}
