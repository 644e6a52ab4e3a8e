use std::{sync::Arc, time::Duration};

use super::ResourceType;

/// Limits and times of the xDS server.
#[derive(Debug, Clone)]
pub struct Config {
    /// `control_plane.identifier` in every response: which server it was (rule G8).
    pub identifier: Arc<str>,
    /// How long an answer to a response is waited for before the next one is sent all the same.
    pub ack_timeout: Duration,
    /// How long listeners and routes wait for clusters to warm (rule O7).
    pub warming_timeout: Duration,
    /// How long after a reconnect a removed cluster is kept while the client has not yet asked for its listeners and
    /// routes (rule O3).
    pub reconnect_grace: Duration,
    /// How long a new stream may take to send its first request.
    pub first_request_timeout: Duration,
    /// Types that are sent anew to a client that reconnects, whatever it says that it holds (rule D10). Empty, because a
    /// proxy that holds everything is to be sent nothing; for clients that stall without it.
    pub resend_on_reconnect: Vec<ResourceType>,
    /// Streams at the same time; further ones are turned away.
    pub streams: usize,
    /// First requests that are worked on at the same time; further ones wait.
    pub arrivals: usize,
    /// Responses are split so that they stay below this where the protocol allows it, in bytes (rules D18, K5).
    pub response_bytes: usize,
    /// The largest request that is decoded, in bytes.
    pub request_bytes: usize,
    /// The largest `node` in a first request, in bytes. Envoy lists all its extensions in it, tens of kilobytes.
    pub node_bytes: usize,
    /// Names that a stream may subscribe to, over all types (rule W12).
    pub names_per_stream: usize,
    /// The longest resource name, in bytes (rule W12).
    pub name_bytes: usize,
    /// The longest type URL, in bytes.
    pub type_url_bytes: usize,
    /// Rejections that are remembered per type and stream, for status.
    pub rejections_kept: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            identifier: "disco".into(),
            ack_timeout: Duration::from_secs(60),
            warming_timeout: Duration::from_secs(20),
            reconnect_grace: Duration::from_secs(5),
            first_request_timeout: Duration::from_secs(30),
            resend_on_reconnect: Vec::new(),
            streams: 50_000,
            arrivals: 64,
            // gRPC clients take at most 4 MiB.
            response_bytes: 3 << 20,
            // A reconnect with a hundred thousand names and versions fits.
            request_bytes: 64 << 20,
            node_bytes: 1 << 20,
            names_per_stream: 200_000,
            name_bytes: 2048,
            type_url_bytes: 512,
            rejections_kept: 4,
        }
    }
}
