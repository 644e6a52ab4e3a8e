//! Peer sets, over HTTP/JSON and as `disco.v1.Peers`.
//!
//! What is not final is "not yet": no answer ever holds a list before the set is founded (rule N1).

pub(super) mod etcd;
mod grpc;
mod http;
mod render;

use std::{future::Future, time::Duration};

pub(super) use grpc::PeersService;
pub(super) use http::{create, finish, list, propose, refound, register, report, show, withdraw};
pub(super) use render::list as rendered;

use super::{
    Api,
    error::{ApiError, Kind},
};
use crate::{
    model::{InstanceId, Problems, Revision, ServiceId},
    peers::{self, Peers, Refusal, Until, View, Want},
    rt::Tasks,
};

/// What an operator wants, as both edges tell it: at most one of them may be set.
#[derive(Debug, Default)]
struct Wanted<'a> {
    add: Option<&'a str>,
    remove: Option<&'a str>,
    replace: Option<(&'a str, &'a str)>,
    demote: Option<&'a str>,
}

impl Wanted<'_> {
    fn check(self, problems: &mut Problems) -> Option<Want> {
        let mut key = |field: &str, text: &str| problems.take(field, text.parse::<InstanceId>());
        let mut wants = Vec::new();
        if let Some(text) = self.add {
            wants.push(key("add", text).map(Want::Add));
        }
        if let Some(text) = self.remove {
            wants.push(key("remove", text).map(Want::Remove));
        }
        if let Some(text) = self.demote {
            wants.push(key("demote", text).map(Want::Demote));
        }
        if let Some((old, new)) = self.replace {
            let (old, new) = (key("replace.old", old), key("replace.new", new));
            wants.push(old.zip(new).map(|(old, new)| Want::Replace(old, new)));
        }
        match (wants.len(), wants.pop()) {
            (1, Some(want)) => want,
            _ => {
                problems.add("", "want one of add, remove, replace and demote, with the name of a replica");
                None
            }
        }
    }
}

/// The set once it is as wanted, waiting at most `wait`, and no longer than this server runs.
async fn until(
    peers: &Peers,
    tasks: &Tasks,
    name: &ServiceId,
    until: Until,
    wait: Duration,
) -> Result<View, ApiError> {
    if !wait.is_zero() {
        let came = tokio::time::timeout(wait, peers.wait(name, &until));
        if let Some(Ok(view)) = unless_shutdown(tasks, came).await {
            return Ok(view);
        }
    }
    let view = peers.view(name)?;
    // Nothing newer is no error: what there is is the answer.
    match (Until { after: Revision::default(), ..until }).missing(&view) {
        None => Ok(view),
        Some(missing) => Err(ApiError::new(Kind::NotYet, missing)),
    }
}

async fn unless_shutdown<T>(tasks: &Tasks, event: impl Future<Output = T>) -> Option<T> {
    tokio::select! {
        value = event => Some(value),
        () = tasks.shutdown().wait() => None,
    }
}

impl From<peers::Error> for ApiError {
    fn from(error: peers::Error) -> Self {
        let message = error.to_string();
        let kind = match error {
            peers::Error::Invalid(problems) => return problems.into(),
            peers::Error::NoSet(_) | peers::Error::Refused(Refusal::NoPeer(_)) => Kind::NotFound,
            peers::Error::Refused(Refusal::NotYet { .. }) => Kind::NotYet,
            peers::Error::Refused(Refusal::Full { .. }) | peers::Error::Limit => Kind::Limit,
            peers::Error::Exists { .. } | peers::Error::Refused(_) => Kind::Conflict,
            peers::Error::Contended(_) | peers::Error::Unread | peers::Error::Store(_) => Kind::Unavailable,
            peers::Error::Record { .. } => Kind::Internal,
        };
        Self::new(kind, message)
    }
}

impl Api {
    fn peers(&self) -> Result<&Peers, ApiError> {
        self.peers.as_ref().ok_or_else(|| {
            let message =
                "this node keeps no peer sets: it does not have the role `registry`; ask one that has";
            ApiError::new(Kind::Misdirected, message)
        })
    }
}
