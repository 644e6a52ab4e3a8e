use std::{fmt, time::Duration};

use super::{Protocol, ResourceType, Response};

/// Is told what happens on the streams, for metrics. Called in the streams' loops: must be cheap and must not wait.
pub trait Observer: fmt::Debug + Send + Sync + 'static {
    /// A node was let in.
    fn connected(&self, _protocol: Protocol) {}
    /// It left, or was cut.
    fn disconnected(&self, _protocol: Protocol) {}
    /// A response was handed to the connection.
    fn sent(&self, _protocol: Protocol, _response: &Response) {}
    /// A response was acknowledged, so long after the change behind it was published.
    fn acknowledged(&self, _protocol: Protocol, _kind: ResourceType, _latency: Duration) {}
    /// A response was rejected.
    fn rejected(&self, _protocol: Protocol, _kind: ResourceType, _reason: &str) {}
    /// Responses were not answered in time.
    fn unanswered(&self, _protocol: Protocol, _responses: u64) {}
}

/// Is told, and forgets.
#[derive(Debug, Clone, Copy, Default)]
pub struct Unobserved;

impl Observer for Unobserved {}
