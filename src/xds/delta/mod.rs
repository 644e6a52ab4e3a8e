//! The incremental form: changes and removals by name, rules D1 to D19.

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    mem,
    sync::Arc,
};

use bytes::Bytes;
use envoy_types::pb::envoy::service::discovery::v3::DeltaDiscoveryRequest;

use super::{
    Config, Entry, Protocol, ProtocolError, ResourceSet, ResourceType, StreamPolicy,
    asked::Asked,
    engine::{Anew, Ask, Built, Variant},
    names::is_glob,
    response::{bodyless_field, removed_field},
    subscription::Terms,
    track::{Claim, Held, Track},
};

/// The delta variant.
#[derive(Debug, Clone, Default)]
pub(super) struct Delta {
    /// Answers due for types that Disco does not have: the names that do not exist.
    unknown: BTreeMap<String, BTreeSet<String>>,
    /// Those that asked for something before.
    asked: BTreeSet<String>,
}

/// Types that Disco does not have and that a stream may ask for at the same time; further ones get no answer.
const UNKNOWN_TYPES: usize = 64;

/// Names of one such type that wait for an answer, and their length; further and longer ones get none. Only a client that
/// asks without reading gets here.
const UNKNOWN_NAMES: usize = 10_000;
const UNKNOWN_NAME_BYTES: usize = 2048;

impl Variant for Delta {
    const PROTOCOL: Protocol = Protocol::Delta;
    type Request = DeltaDiscoveryRequest;

    fn ask(request: &Self::Request) -> Ask<'_> {
        Ask {
            node_id: request.node.as_ref().map(|node| node.id.as_str()),
            type_url: &request.type_url,
            nonce: &request.response_nonce,
            error: request.error_detail.as_ref().map(|error| error.message.as_str()),
        }
    }

    fn serves(_: ResourceType) -> bool {
        true
    }

    fn tells_removals(_: ResourceType) -> bool {
        true
    }

    fn subscribe(
        track: &mut Track,
        Asked { message: request, held }: Asked<Self::Request>,
        first: bool,
        terms: Terms<'_>,
    ) -> Result<Anew, ProtocolError> {
        let (add, remove) = (&request.resource_names_subscribe, &request.resource_names_unsubscribe);
        if !first && add.is_empty() && remove.is_empty() {
            return Ok(false);
        }
        let forced = if first { mem::take(&mut track.due) } else { BTreeSet::new() };
        let mut change = track.subscription.update(add, remove, first, terms)?;
        if first && !held.is_empty() {
            // Which of them are due is known when what it holds was weighed.
            change.added.clear();
        }
        if !first && let Some(Claim { held: Held::Each(versions), .. }) = &mut track.claim {
            // What it gave up it does not hold any more, and what it asks for again it is to get (rule D4).
            for name in change.added.iter().chain(&change.removed) {
                versions.remove(name);
            }
            if change.everything {
                versions.distrust();
            }
        }
        let removed = change.removed.clone();
        track.subscribed(change);
        if track.subscription.is_wildcard() {
            // Rule D7: the client needs to be told whether the wildcard still covers them.
            track.due.extend(removed);
        }
        if first && !track.subscription.is_empty() {
            // Rule D12: a client that holds nothing learns that there is nothing.
            track.owes = track.subscription.is_wildcard() && held.is_empty();
            track.claim = Some(Claim { held: Held::Each(held), forced });
        }
        Ok(true)
    }

    fn weigh(track: &mut Track, set: &Arc<ResourceSet>, _: StreamPolicy) -> bool {
        let Some(Claim { held: Held::Each(versions), forced }) = track.claim.take() else { return false };
        let reconnected = !versions.is_empty();
        if reconnected {
            // Rule D9: what has not changed need not go again; here D9 outweighs D4 (rule D10).
            let has = |entry: &Entry| {
                let resource = &entry.resource;
                !track.resend && versions.get(&resource.name) == Some(Some(resource.version))
            };
            let everything = mem::take(&mut track.everything);
            let mut known = 0;
            if everything {
                for (name, entry) in set.iter(track.kind) {
                    known += usize::from(versions.get(name).is_some());
                    if has(entry) {
                        track.due.remove(name);
                    } else {
                        track.due.insert(Arc::clone(name));
                    }
                }
            }
            let mut gone: Vec<Arc<str>> = Vec::new();
            for (name, entry) in set.get_each(track.kind, track.subscription.names()) {
                match entry {
                    _ if entry.is_some_and(has) => _ = track.due.remove(name),
                    Some(entry) => _ = track.due.insert(Arc::clone(&entry.resource.name)),
                    None if !is_glob(name) => gone.push(Arc::clone(name)),
                    // Rule X3: a collection is its members, if it has any.
                    None => {
                        let mut members = set.members(track.kind, name).peekable();
                        if members.peek().is_none() {
                            gone.push(Arc::clone(name));
                        }
                        for (member, _) in members.filter(|(_, entry)| !has(entry)) {
                            track.due.insert(Arc::clone(member));
                        }
                    }
                }
            }
            if track.kind == ResourceType::LbEndpoint || everything && known < versions.len() {
                let gone_since =
                    |name: &&str| set.get(track.kind, name).is_none() && track.subscription.covers(name);
                gone.extend(versions.names().filter(gone_since).map(Into::into));
            }
            for name in gone {
                // Rule O3, over a reconnect: routes that the client holds may still name it.
                if track.kind == ResourceType::Cluster && versions.get(&name).is_some() {
                    track.due.remove(&name);
                    track.held.insert(name, set.revision());
                } else {
                    if track.kind == ResourceType::VirtualHost && versions.get(&name).is_some() {
                        track.vanished.insert(Arc::clone(&name));
                    }
                    track.due.insert(name);
                }
            }
            track.adds |= track.due.iter().any(|name| set.get(track.kind, name).is_some());
            track.catch_up(set);
        }
        track.due.extend(forced.into_iter().filter(|name| track.subscription.covers(name)));
        reconnected
    }

    fn build(
        track: &mut Track,
        set: &Arc<ResourceSet>,
        _: u64,
        config: &Config,
    ) -> Result<Option<Built>, ProtocolError> {
        // What is removed goes last: clusters, and the endpoints that go with them (rule O1); the last members of a
        // collection after what refers to it.
        let holds =
            matches!(track.kind, ResourceType::Cluster | ResourceType::Endpoints | ResourceType::LbEndpoint);
        let mut names = track.take(set, true, holds)?;
        let mut built = Built { version: set.revision().to_string(), ..Built::default() };
        let mut removed: Vec<&Arc<str>> = Vec::new();
        let mut size = 0;
        let mut fit = 0;
        for name in &names {
            let field = match track.find(set, name).map(|resource| resource.delta_field()) {
                None => track.is_unknown_host(name).then(|| bodyless_field(name)),
                found => found,
            };
            size += field.as_ref().map_or(name.len() + 4, Bytes::len);
            if size > config.response_bytes && fit > 0 {
                break;
            }
            match field {
                Some(field) => built.body.push(field),
                None => removed.push(name),
            }
            fit += 1;
        }
        built.resources = built.body.len();
        built.removed = removed.len();
        if !removed.is_empty() {
            built.body.push(removed_field(removed.iter().map(|name| name.as_ref())));
        }
        // Rule D18: the rest follows when this was answered.
        track.due.extend(names.split_off(fit));
        built.names = names;
        Ok((fit > 0 || track.owes).then_some(built))
    }

    fn on_unknown(&mut self, url: &str, request: Self::Request) {
        let names = request.resource_names_subscribe;
        let known = self.asked.contains(url);
        if !known && self.asked.len() >= UNKNOWN_TYPES {
            return;
        }
        let first = self.asked.insert(url.to_owned());
        if first || !names.is_empty() {
            let due = self.unknown.entry(url.to_owned()).or_default();
            let room = UNKNOWN_NAMES.saturating_sub(due.len());
            let names = names.into_iter().filter(|name| (1..=UNKNOWN_NAME_BYTES).contains(&name.len()));
            due.extend(names.take(room));
        }
    }

    fn owes_unknown(&self) -> bool {
        !self.unknown.is_empty()
    }

    fn next_unknown(&mut self) -> Option<(String, Vec<Bytes>, usize)> {
        let (url, mut names) = self.unknown.pop_first()?;
        names.remove("*");
        let body = removed_field(names.iter().map(String::as_str));
        Some((url, if names.is_empty() { Vec::new() } else { vec![body] }, names.len()))
    }
}
