//! Finds out whether instances work: asks each over the network, again and again, and reports when the verdict changes.
//!
//! Reads the catalog for what to check, and hands verdicts to a [`Sink`] (in `app`: the registry, which makes them durable). With several
//! nodes each checks its share ([`Duty`]); whoever takes an instance over goes on from the verdict in the catalog. A checker that is
//! cut off condemns nobody for its silence (`reach`). [`Prober`], [`Command`] and [`Machine`] also serve `disco run`.

mod checker;
mod command;
mod duty;
mod machine;
mod probe;
mod reach;
#[cfg(test)]
mod tests;

pub use checker::{Checker, Config, Monitor, Sink, Status};
pub use command::Command;
pub use duty::Duty;
pub use machine::Machine;
pub use probe::{Ask, Network, Outcome, Prober};
