//! The truth in memory: which instances of which services there are, as immutable snapshots.
//!
//! One writer applies batches; each gives a new [`Snapshot`] that shares what did not change, and a line in a bounded
//! change list. Readers hold a snapshot as long as they like and ask what changed since. What changes many times a second is
//! on a board beside the snapshots.

mod endpoints;
mod live;
mod reader;
mod snapshot;
mod writer;

pub use endpoints::{Endpoints, Part};
pub use live::{Live, LiveBoard, LiveService};
pub use reader::{Changes, Reader, Stale};
pub use snapshot::{Change, Service, Snapshot};
pub use writer::{Writer, catalog};
