//! The xDS protocol: subscriptions, versions, ACKs and NACKs, order, for SotW and delta. It knows names and bytes, not
//! services: [`ResourceSet`]s come in through a [`Publisher`], and who a stream belongs to through [`Admit`].
//!
//! A change wakes the streams that asked for what changed, and no others (`feed`); these count as having it, because for them
//! there is nothing to have.
//!
//! [`AdsServer`] runs each stream, in the task that writes its responses, around a state machine (`engine`, with what
//! differs in `delta` and `sotw`), which is plain code without IO or clock. The machine keeps no list of what its client
//! holds: a cursor into the set's changes says it, and what was held at an earlier connection the client says itself.
//! Responses are a few bytes of their own and the shared bytes of the resources down to the socket. Streams write
//! [`Proxies`]; `api` and the registry read it; what a stream holds is derived from that when somebody asks (`ledger`).
//! [`LoadReports`] takes what clients count of their calls into [`Loads`], which `api` reads (`load`).
//!
//! Tests are named after the rules of the protocol that they hold (`s4_…`, `d15_…`), so that a search for a rule finds them;
//! `RULES.md` has the whole table. Random ones are the same each time; `DISCO_FUZZ_SECONDS` has them go on with others.

mod admit;
mod asked;
mod by_type;
mod config;
#[cfg(test)]
mod convergence;
mod delta;
mod engine;
mod error;
mod feed;
#[cfg(test)]
mod fuzz;
mod ledger;
mod load;
mod names;
mod observe;
#[cfg(test)]
mod pitfalls;
mod resource;
mod response;
#[cfg(test)]
mod rules;
mod served;
mod server;
mod sotw;
mod status;
mod subscription;
#[cfg(test)]
mod testing;
mod track;
mod wire;

pub use admit::{Admit, Admitted, Locality, Node, Refusal, StreamPolicy};
pub use config::Config;
pub use engine::{Heard, Protocol};
pub use error::{Code, ProtocolError};
pub use feed::{Feed, Publisher};
pub use ledger::{Concern, Delivery, Held, Lack, Why};
pub use load::{Load, LoadReports, Loads, Reportable, Traffic};
pub use observe::{Observer, Unobserved};
pub use resource::{Change, Entry, Gone, Resource, ResourceSet, ResourceType, Version};
pub use response::Response;
pub use server::{AdsServer, unreadable};
pub use status::{Progress, Proxies, ProxyStatus, Rejection, TypeStatus};
pub use subscription::Subscription;
