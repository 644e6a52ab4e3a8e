//! Random histories of changes, requests, answers, lost connections and delays against reference clients: in the end the
//! client holds what the server has, and then nothing more is sent.

mod collections;
mod envoy;
mod names;

use std::collections::BTreeMap;

use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest};

use super::{
    ResourceType,
    delta::Delta,
    sotw::Sotw,
    testing::{Sent, Speak, delta},
};

/// Version and content by type and name, as a client holds them.
type View = BTreeMap<ResourceType, BTreeMap<String, (String, String)>>;

/// How a variant's client words things.
trait Client: Speak {
    /// First request of a type on a stream.
    fn first(kind: ResourceType, names: &[String], view: &View, accepted: Option<&String>) -> Self::Request;
    /// A change of names: all, those that came, those that went.
    fn resubscribe(
        kind: ResourceType,
        names: &[String],
        came: &[String],
        went: &[String],
        newest: Option<&Sent>,
        accepted: Option<&String>,
    ) -> Option<Self::Request>;
}

impl Client for Delta {
    fn first(kind: ResourceType, names: &[String], view: &View, _: Option<&String>) -> Self::Request {
        let held = view.get(&kind).into_iter().flatten();
        DeltaDiscoveryRequest {
            initial_resource_versions: held
                .map(|(name, (version, _))| (name.clone(), version.clone()))
                .collect(),
            resource_names_subscribe: names.to_vec(),
            ..delta(kind, &[], &[])
        }
    }

    fn resubscribe(
        kind: ResourceType,
        _: &[String],
        came: &[String],
        went: &[String],
        _: Option<&Sent>,
        _: Option<&String>,
    ) -> Option<Self::Request> {
        (!came.is_empty() || !went.is_empty()).then(|| DeltaDiscoveryRequest {
            resource_names_subscribe: came.to_vec(),
            resource_names_unsubscribe: went.to_vec(),
            ..delta(kind, &[], &[])
        })
    }
}

impl Client for Sotw {
    fn first(kind: ResourceType, names: &[String], _: &View, accepted: Option<&String>) -> Self::Request {
        DiscoveryRequest {
            type_url: kind.url().into(),
            resource_names: names.to_vec(),
            version_info: accepted.cloned().unwrap_or_default(),
            ..Default::default()
        }
    }

    /// Envoy repeats itself even if no name changed, when a cluster waits for its endpoints.
    fn resubscribe(
        kind: ResourceType,
        names: &[String],
        _: &[String],
        _: &[String],
        newest: Option<&Sent>,
        accepted: Option<&String>,
    ) -> Option<Self::Request> {
        Some(DiscoveryRequest {
            response_nonce: newest.map(|sent| sent.nonce.clone()).unwrap_or_default(),
            ..Self::first(kind, names, &View::new(), accepted)
        })
    }
}
