//! Peer sets: which replicas founded a database, which are in it, who leads it.
//!
//! A database that is given an empty list, a part of it, or two different ones, becomes two databases. So a list is frozen once, in
//! the step in which its last founder comes, and until then there is none to be had. What is written (who founded, who is in, which
//! change is under way) changes by operators and by what the database itself says, never because a lease ended. Whether a
//! replica runs is the catalog's to say: it is an instance of the service that is called as the set.
//!
//! [`PeerSet`] and its transitions are pure. [`Peers`] keeps them in the store, each set one record that is written by
//! compare-and-set. The rules N1 to N14 are those of the brief; each has a test that names it.

mod board;
mod change;
mod found;
mod hear;
mod hint;
mod keep;
mod lead;
pub mod observe;
mod record;
mod refusal;
pub mod render;
mod set;
#[cfg(test)]
mod tests;

pub use board::View;
pub use change::{Step, Want};
pub use found::{Newcomer, parse_address};
pub use hint::hint;
pub use keep::{Error, Peers, Until};
pub use record::{
    birth_to_proto, liveness_to_proto, observation_from_proto, observation_to_proto, observe_from_proto,
    pending_to_proto, role_to_proto, set_to_proto, spec_to_proto,
};
pub use refusal::Refusal;
pub use set::{
    Addresses, Birth, Change, Class, ClusterId, Facts, Founder, Founding, Gone, Kind, Leadership, Liveness,
    MOST_FOUNDERS, MOST_PEERS, NodeId, Observation, Observe, Peer, PeerSet, Pending, SeenMember, Spec,
    Spread, Suffrage,
};
