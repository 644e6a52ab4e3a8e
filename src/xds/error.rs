use crate::model::Revision;

/// How a stream ends when it cannot go on (rule K2); the names are gRPC's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// The client broke the protocol; the same request fails again.
    InvalidArgument,
    /// Who the client is was not shown.
    Unauthenticated,
    /// The client may not have this.
    PermissionDenied,
    /// A limit was reached.
    ResourceExhausted,
    /// Not now, or not here: connect again.
    Unavailable,
}

/// Why a stream cannot go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// Rule G6: nobody knows whose stream it is.
    #[error(
        "the first request of a stream must carry `node` with an `id`; set node.id in the client's bootstrap"
    )]
    NoNode,
    /// It would be kept as long as the stream.
    #[error("`node` has {len} bytes; at most {limit} are allowed (node_bytes)")]
    LargeNode {
        /// Its length in bytes.
        len: usize,
        /// The largest that is accepted.
        limit: usize,
    },
    /// It would be shown in tables and logs.
    #[error(
        "node.{field} must be at most {limit} bytes without control characters; correct the client's bootstrap"
    )]
    OddNode {
        /// Which field.
        field: &'static str,
        /// The longest that is accepted, in bytes.
        limit: usize,
    },
    /// Rule G6: a stream belongs to one node.
    #[error("node.id changed from {was:?} to {now:?}; open another stream for another node")]
    NodeChanged {
        /// The id of the first request.
        was: String,
        /// The id of this one.
        now: String,
    },
    /// Rule G3.
    #[error("`type_url` is empty; every request on an aggregated stream must name the resource type")]
    NoType,
    /// Rule G3.
    #[error(
        "this service serves {want} only, not {got:?}; leave `type_url` empty here, or use the aggregated service"
    )]
    OtherType {
        /// What it serves.
        want: &'static str,
        /// What was asked for.
        got: String,
    },
    /// Rule K2.
    #[error("`type_url` has {len} bytes; at most {limit} are allowed")]
    LongType {
        /// Its length in bytes.
        len: usize,
        /// The longest that is accepted.
        limit: usize,
    },
    /// Rule W12.
    #[error(
        "the stream would subscribe to {names} names; at most {limit} are allowed (names_per_stream), use the wildcard instead"
    )]
    ManyNames {
        /// How many there would be.
        names: usize,
        /// The most that one stream may have.
        limit: usize,
    },
    /// Rule W12.
    #[error("a resource name has {len} bytes; at most {limit} are allowed (name_bytes): {start:?}…")]
    LongName {
        /// Its length in bytes.
        len: usize,
        /// The longest that is accepted.
        limit: usize,
        /// How it begins.
        start: String,
    },
    /// The server forgot removals that the stream has not been told of.
    #[error(
        "this stream is at revision {at} and so far behind that removals are forgotten; reconnect and say what you hold"
    )]
    Behind {
        /// Up to where the stream was.
        at: Revision,
    },
}

impl ProtocolError {
    /// The status to end the stream with.
    pub fn code(&self) -> Code {
        match self {
            Self::NoNode
            | Self::OddNode { .. }
            | Self::NodeChanged { .. }
            | Self::NoType
            | Self::OtherType { .. }
            | Self::LongType { .. } => Code::InvalidArgument,
            Self::LargeNode { .. } | Self::ManyNames { .. } | Self::LongName { .. } => {
                Code::ResourceExhausted
            }
            Self::Behind { .. } => Code::Unavailable,
        }
    }
}
