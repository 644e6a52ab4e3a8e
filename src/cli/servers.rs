//! Questions that one server cannot answer alone: each knows the proxies that are connected to it.

use std::time::Duration;

use futures_util::future::join_all;
use serde_json::{Map, Value, json};
use tokio::time::Instant;

use super::{
    Failure,
    output::{cell, clean},
};
use crate::{
    client::{Http, HttpError},
    model::ServiceId,
};

/// How long one question for acknowledgements may wait at the servers.
const ASK: Duration = Duration::from_secs(20);

/// Likewise while somebody watches the progress.
const TURN: Duration = Duration::from_millis(500);

/// Shortest time between two questions, should a server not wait as asked.
const PAUSE: Duration = Duration::from_millis(100);

/// The field for servers that did not answer: what their proxies have is not known.
const UNKNOWN: &str = "unknown";

/// Whether what is asked for may be known to one server and not to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Elsewhere {
    Maybe,
    No,
}

/// Asks all servers and puts their answers together: lists one after the other without what is there twice, numbers added, and
/// true only if all say so, but for what only one can know. Servers that did not answer are listed beside, and then nothing is complete. Who says that there is no
/// such thing counts as no answer, unless it may well be known `elsewhere` only.
///
/// # Errors
/// Nobody answered. A refusal tells most.
pub(super) async fn ask_all(
    http: &Http,
    path: &str,
    wait: Duration,
    elsewhere: Elsewhere,
) -> Result<Value, Failure> {
    let servers = http.each();
    let answers = join_all(servers.iter().map(|server| server.get(path, wait))).await;
    let (mut whole, mut unknown, mut errors) = (None, Vec::new(), Vec::new());
    for (server, answer) in servers.iter().zip(answers) {
        match answer {
            Ok(Value::Object(fields)) => match &mut whole {
                None => whole = Some(fields),
                Some(whole) => join(whole, fields),
            },
            Ok(other) => whole = whole.or_else(|| other.as_object().cloned()),
            Err(error @ HttpError::Refused { status: 404, .. }) if elsewhere == Elsewhere::Maybe => {
                errors.push(error);
            }
            Err(error) => {
                unknown.push(json!({"server": server.address(), "error": error.to_string()}));
                errors.push(error);
            }
        }
    }
    let Some(mut whole) = whole else {
        let refusal = errors.iter().position(|error| matches!(error, HttpError::Refused { .. }));
        let error = (refusal.unwrap_or_default() < errors.len())
            .then(|| errors.swap_remove(refusal.unwrap_or_default()));
        return Err(error.map_or_else(|| Failure::failed("no server answered"), Failure::from));
    };
    if !unknown.is_empty() {
        if let Some(complete) = whole.get_mut("complete") {
            *complete = false.into();
        }
        whole.insert(UNKNOWN.to_owned(), unknown.into());
    }
    Ok(Value::Object(whole))
}

fn join(whole: &mut Map<String, Value>, other: Map<String, Value>) {
    for (name, value) in other {
        match (whole.get_mut(&name), value) {
            (None, value) => drop(whole.insert(name, value)),
            (Some(Value::Array(all)), Value::Array(more)) => {
                for item in more {
                    // Views are counted by each server for itself.
                    if name == "views" || !all.contains(&item) {
                        all.push(item);
                    }
                }
            }
            // Only the server that counts an instance's lease can know it.
            (Some(Value::Bool(all)), Value::Bool(this)) if name == "abandoned" => *all |= this,
            (Some(Value::Bool(all)), Value::Bool(this)) => *all &= this,
            // A revision is the same for all.
            (Some(all), Value::Number(this)) if name != "revision" => {
                let sum = all.as_u64().unwrap_or_default().saturating_add(this.as_u64().unwrap_or_default());
                *all = sum.into();
            }
            _ => {}
        }
    }
}

/// Asks who has acknowledged `revision` until all that it concerns have, at most for `limit`; zero asks once. Each answer that is not
/// the last goes to `tell`.
///
/// # Errors
/// As [`ask_all`].
pub(super) async fn rollout(
    http: &Http,
    revision: u64,
    service: Option<&ServiceId>,
    limit: Duration,
    tell: Option<&dyn Fn(&Value)>,
) -> Result<Value, Failure> {
    let only = service.map(|service| format!("&service={service}")).unwrap_or_default();
    let started = Instant::now();
    loop {
        let asked = Instant::now();
        let left = limit.saturating_sub(started.elapsed());
        let turn = left.min(if tell.is_some() { TURN } else { ASK });
        let path = format!("/v1/revisions/{revision}?wait={}ms{only}", turn.as_millis());
        let delivery = ask_all(http, &path, turn, Elsewhere::No).await?;
        if is_complete(&delivery) || started.elapsed() >= limit {
            return Ok(delivery);
        }
        if let Some(tell) = tell {
            tell(&delivery);
        }
        tokio::time::sleep_until(asked + PAUSE.min(left)).await;
    }
}

/// Whether all that it concerns have acknowledged it.
pub(super) fn is_complete(delivery: &Value) -> bool {
    delivery.get("complete").and_then(Value::as_bool).unwrap_or_default()
}

/// The proxies that have not acknowledged, as safe text.
pub(super) fn pending(delivery: &Value) -> Vec<String> {
    let nodes = delivery.get("pending").and_then(Value::as_array).into_iter().flatten();
    nodes.filter_map(Value::as_str).map(clean).collect()
}

/// A line for each server that did not answer.
pub(super) fn unknown(document: &Value) -> Vec<String> {
    let servers = document.get(UNKNOWN).and_then(Value::as_array).into_iter().flatten();
    let line = |server: &Value| {
        format!("not known: the proxies of {} ({})", cell(server, "/server"), clean(&cell(server, "/error")))
    };
    servers.map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_put_together() {
        let answer = |see: u64, node: &str, abandoned: bool| {
            json!({"revision": 7, "complete": true, "acknowledged": 2, "abandoned": abandoned,
                   "views": [{"client": "envoy", "proxies": 1, "see": see}], "proxies": [{"node_id": node}]})
        };
        let Value::Object(mut whole) = answer(1, "a", false) else { panic!("an object") };
        for other in [answer(1, "a", true), answer(0, "b", false)] {
            let Value::Object(other) = other else { panic!("an object") };
            join(&mut whole, other);
        }
        let view = |see: u64| json!({"client": "envoy", "proxies": 1, "see": see});
        assert_eq!(
            Value::Object(whole),
            json!({"revision": 7, "complete": true, "acknowledged": 6, "abandoned": true,
                   "views": [view(1), view(1), view(0)], "proxies": [{"node_id": "a"}, {"node_id": "b"}]})
        );
    }
}
