//! Checks whether an instance works: one-shot probes over a fresh connection to an IP and port.
//!
//! Knows nothing of the registry; who probes decides what follows from the result.

mod probe;

pub use probe::Probe;
