//! State of the world: whole lists of listeners and clusters, changed routes and endpoints, rules S1 to S12 and S-E1 to
//! S-E9.

#[cfg(test)]
mod tests;

use std::{collections::BTreeSet, mem, sync::Arc};

use envoy_types::pb::envoy::service::discovery::v3::DiscoveryRequest;
use xxhash_rust::xxh3::Xxh3;

use super::{
    Config, Protocol, ProtocolError, ResourceSet, ResourceType, StreamPolicy, Version,
    asked::Asked,
    engine::{Anew, Ask, Built, Variant},
    subscription::Terms,
    track::{Claim, Held, Track},
};

/// The state-of-the-world variant. It says nothing about types that Disco does not have (rule K3).
#[derive(Debug, Clone, Default)]
pub(super) struct Sotw;

/// Rule S-E1: every response of these types is the whole list, and what is not in it is removed.
fn is_full(kind: ResourceType) -> bool {
    matches!(kind, ResourceType::Cluster | ResourceType::Listener)
}

impl Variant for Sotw {
    const PROTOCOL: Protocol = Protocol::Sotw;
    type Request = DiscoveryRequest;

    fn ask(request: &Self::Request) -> Ask<'_> {
        Ask {
            node_id: request.node.as_ref().map(|node| node.id.as_str()),
            type_url: &request.type_url,
            nonce: &request.response_nonce,
            error: request.error_detail.as_ref().map(|error| error.message.as_str()),
        }
    }

    /// Rule G2: virtual hosts are incremental only. Rule L4: so are collections; Envoy crashes on their members.
    fn serves(kind: ResourceType) -> bool {
        !matches!(kind, ResourceType::VirtualHost | ResourceType::LbEndpoint)
    }

    fn tells_removals(kind: ResourceType) -> bool {
        is_full(kind)
    }

    fn subscribe(
        track: &mut Track,
        Asked { message: request, .. }: Asked<Self::Request>,
        first: bool,
        terms: Terms<'_>,
    ) -> Result<Anew, ProtocolError> {
        // Every ACK repeats the names; mostly they are the same.
        let hash = hash(&request.resource_names);
        if track.names_hash.replace(hash) == Some(hash) {
            return Ok(false);
        }
        let forced = if first { mem::take(&mut track.due) } else { BTreeSet::new() };
        let change = track.subscription.replace(&request.resource_names, terms)?;
        track.subscribed(change);
        // A version stands for the names that it came with.
        if let Some(claim) = track.claim.take() {
            track.due.extend(claim.forced.into_iter().filter(|name| track.subscription.covers(name)));
        }
        if first && !track.subscription.is_empty() {
            // Rule S8: the client learns what there is, even if that is nothing.
            track.owes = is_full(track.kind);
            track.claim = Some(Claim { held: Held::All(request.version_info), forced });
        }
        Ok(true)
    }

    fn weigh(track: &mut Track, set: &Arc<ResourceSet>, policy: StreamPolicy) -> bool {
        let Some(Claim { held: Held::All(version), forced }) = track.claim.take() else { return false };
        let reconnected = !version.is_empty();
        // Rule S9: who never sent a name cannot have dropped anything; names may have come and gone, unless the client is
        // known to keep its version for exactly what it asks for.
        let trusted = !track.resend && (track.subscription.is_legacy_wildcard() || policy.keeps_named);
        if reconnected && trusted && !resume(track, set, &version) && version == told(track, set) {
            track.due.clear();
            track.everything = false;
            track.owes = false;
            track.version = Some(version);
            track.catch_up(set);
        }
        track.due.extend(forced.into_iter().filter(|name| track.subscription.covers(name)));
        reconnected
    }

    fn build(
        track: &mut Track,
        set: &Arc<ResourceSet>,
        nonce: u64,
        config: &Config,
    ) -> Result<Option<Built>, ProtocolError> {
        if is_full(track.kind) { whole(track, set, config) } else { changed(track, set, nonce, config) }
    }
}

/// Goes on where a client was that states the version of a whole list, if the set remembers when that was. What was removed
/// since is then removed as on a stream that never broke: after the last route to it (rule O3).
fn resume(track: &mut Track, set: &ResourceSet, version: &str) -> bool {
    let kind = track.kind;
    if !is_full(kind) || !track.subscription.is_wildcard() {
        return false;
    }
    let number = |text: &str| u64::from_str_radix(text, 16).ok().filter(|_| text.len() == 16);
    let (all, held) = match version.split_once(HELD) {
        Some((all, held)) => (number(all), number(held)),
        None => (number(version), Some(0)),
    };
    let (Some(all), Some(mut held)) = (all, held) else { return false };
    let Some(at) = set.revision_of(kind, all.wrapping_sub(held)) else { return false };
    if !set.knows_removals_since(kind, at) {
        return false;
    }
    if held != 0 {
        // It kept the clusters that were removed last.
        let mut gone: Vec<_> = set.iter_gone(kind).filter(|(_, gone)| gone.removed <= at).collect();
        gone.sort_by_key(|(_, gone)| gone.removed);
        while held != 0 {
            let Some((name, gone)) = gone.pop() else {
                track.held.clear();
                return false;
            };
            held = held.wrapping_sub(ResourceSet::digest_of(&gone.last));
            track.held.insert(Arc::clone(name), gone.removed);
        }
    }
    track.due.clear();
    track.everything = false;
    track.owes = false;
    track.version = Some(version.to_owned());
    track.resume(at);
    true
}

/// Between the version of all that a client holds and the version of that part of it which it is to hold only for a while.
const HELD: char = '+';

/// All that is subscribed to, if it is not what the client was told last.
fn whole(track: &mut Track, set: &Arc<ResourceSet>, config: &Config) -> Result<Option<Built>, ProtocolError> {
    let mut names = track.take(set, true, track.kind == ResourceType::Cluster)?;
    let version = told(track, set);
    let all = |version: &str| version.split(HELD).next().map(str::to_owned);
    let same = track.version.as_ref().is_some_and(|last| all(last) == all(&version));
    if !track.owes && same && names.iter().all(|name| set.get(track.kind, name).is_none()) {
        return Ok(None);
    }
    for group in mem::take(&mut track.rejected) {
        names.extend(group);
    }
    let subscription = &track.subscription;
    let mut body = Vec::new();
    if subscription.is_wildcard() {
        body.extend(set.iter(track.kind).map(|(_, entry)| entry.resource.sotw_field()));
        let held = track.held.keys().filter_map(|name| set.gone(track.kind, name));
        body.extend(held.map(|gone| gone.last.sotw_field()));
    } else {
        let there = subscription.names().iter().filter_map(|name| track.find(set, name));
        body.extend(there.map(|resource| resource.sotw_field()));
    }
    let size: usize = body.iter().map(bytes::Bytes::len).sum();
    if size > config.response_bytes {
        // Rules S-E8, K5: it cannot be split.
        tracing::warn!(
            kind = ?track.kind, bytes = size, advised = config.response_bytes,
            "a full list is so large that clients may refuse it; use delta, or have clients subscribe to less"
        );
    }
    track.version = Some(version.clone());
    Ok(Some(Built { version, resources: body.len(), body, removed: 0, names }))
}

/// What is due and exists (rule S-E2); removal is implied by whatever no longer refers to it.
fn changed(
    track: &mut Track,
    set: &Arc<ResourceSet>,
    nonce: u64,
    config: &Config,
) -> Result<Option<Built>, ProtocolError> {
    let names = track.take(set, false, false)?;
    let mut there = names.into_iter().filter(|name| set.get(track.kind, name).is_some());
    let mut built = Built::default();
    let mut size = 0;
    for name in there.by_ref() {
        let Some(entry) = set.get(track.kind, &name) else { continue };
        let field = entry.resource.sotw_field();
        size += field.len();
        if size > config.response_bytes && !built.body.is_empty() {
            track.due.insert(name);
            break;
        }
        built.body.push(field);
        built.names.push(name);
    }
    track.due.extend(there);
    if built.body.is_empty() {
        return Ok(None);
    }
    built.resources = built.body.len();
    let version = digest(track, set);
    // A client that accepted this much does not hold what the version of the whole would promise (rules S2, S9).
    let partial = !track.due.is_empty() || !track.rejected.is_empty();
    built.version = if partial { format!("{version}~{nonce:x}") } else { version.to_string() };
    track.version = Some(built.version.clone());
    Ok(Some(built))
}

/// One version for everything that the client subscribes to and that exists, what it keeps for a while included
/// (rule S10: from content only).
fn told(track: &mut Track, set: &Arc<ResourceSet>) -> String {
    let live = digest(track, set);
    let held = track.held.keys().filter_map(|name| set.gone(track.kind, name));
    let held = held.fold(0, |sum: u64, gone| sum.wrapping_add(ResourceSet::digest_of(&gone.last)));
    let all = Version(live.0.wrapping_add(held));
    if held == 0 { all.to_string() } else { format!("{all}{HELD}{}", Version(held)) }
}

/// One version for everything that the client subscribes to and that exists.
fn digest(track: &mut Track, set: &Arc<ResourceSet>) -> Version {
    let kind = track.kind;
    let live = if track.subscription.is_wildcard() {
        set.digest(kind)
    } else {
        let names = track.subscription.names();
        let part =
            |name: &Arc<str>| set.get(kind, name).map_or(0, |entry| ResourceSet::digest_of(&entry.resource));
        let known = track.digest.take().and_then(|(base, sum)| {
            let changes = set.digests_since(kind, base)?.filter(|(name, _)| names.contains(*name));
            Some(changes.fold(sum, |sum, (_, change)| sum.wrapping_add(change)))
        });
        let sum =
            known.unwrap_or_else(|| names.iter().fold(0, |sum: u64, name| sum.wrapping_add(part(name))));
        track.digest = Some((set.revision(), sum));
        sum
    };
    Version(live)
}

fn hash(names: &[String]) -> u64 {
    let mut hasher = Xxh3::new();
    for name in names {
        hasher.update(&(name.len() as u64).to_le_bytes());
        hasher.update(name.as_bytes());
    }
    hasher.digest()
}
