//! The xDS protocol: subscriptions, versions, ACKs and NACKs, order, for SotW and delta. It knows names and bytes, not
//! services: [`ResourceSet`]s come in through a `watch`, and who a stream belongs to through [`Admit`].

mod resource;

pub use resource::{Change, Entry, Gone, Resource, ResourceSet, ResourceType, Version};
