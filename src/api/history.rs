//! What changed, when, by whom and why, over HTTP/JSON.

use std::time::SystemTime;

use axum::{
    Json,
    extract::{RawQuery, State},
    response::IntoResponse as _,
};
use serde_json::{Value, json};

use super::{
    Api,
    dto::InstanceDto,
    request::{Path, Query, Reply, service_id},
    time::{read_time, timestamp},
};
use crate::{
    model::{InstanceId, InstanceKey},
    registry::{Entry, What},
};

pub(super) async fn of_service(
    State(api): State<Api>,
    Path(service): Path<String>,
    RawQuery(query): RawQuery,
) -> Reply {
    let service = service_id(&service)?;
    let (since, id) = Query::of(query.as_deref()).read(|fields, problems| {
        (fields.parse("since", problems, read_time), fields.parse("id", problems, str::parse::<InstanceId>))
    })?;
    let entries = api.registry()?.history(&service).await?;
    let begins = entries.first().map(|entry| timestamp(entry.at));
    let wanted = entries
        .iter()
        .filter(|entry| since.is_none_or(|since| entry.at >= since))
        .filter(|entry| id.as_ref().is_none_or(|id| entry.id == *id));
    let entries: Vec<Value> = wanted.map(shown).collect();
    Ok(Json(json!({"service": service.as_str(), "begins": begins, "entries": entries})).into_response())
}

fn shown(entry: &Entry) -> Value {
    let Entry { at, revision, id, incarnation, what, by, why, instance } = entry;
    json!({
        "at": timestamp(*at),
        "revision": revision.0,
        "id": id.as_str(),
        "incarnation": incarnation.0,
        "what": what.name(),
        "by": by,
        "why": why,
        "instance": instance.as_deref().map(InstanceDto::from),
    })
}

/// What an instance was at a time.
#[derive(Debug, PartialEq, Eq)]
enum Past<'a> {
    /// As this change left it.
    After(&'a Entry),
    /// As it is now: nothing has changed since before the history begins.
    AsNow,
    /// There was none.
    Absent,
    /// Nobody knows any more.
    Forgotten,
}

/// `present` is whether it is registered now.
fn past<'a>(entries: &'a [Entry], id: &InstanceId, present: bool, at: SystemTime) -> Past<'a> {
    let mut own = entries.iter().filter(|entry| entry.id == *id);
    if let Some(last) = own.clone().rfind(|entry| entry.at <= at) {
        return Past::After(last);
    }
    // What comes after the oldest entry of the service is all there.
    let complete = entries.first().is_some_and(|first| first.at <= at);
    match own.next() {
        Some(next) if next.what == What::Registered && complete => Past::Absent,
        None if complete && present => Past::AsNow,
        None if complete => Past::Absent,
        _ => Past::Forgotten,
    }
}

pub(super) async fn at(api: &Api, key: &InstanceKey, at: SystemTime) -> Reply {
    let entries = api.registry()?.history(&key.service).await?;
    let snapshot = api.catalog.latest();
    let present = snapshot.instance(key);
    let begins = entries.first().map(|entry| timestamp(entry.at));
    let (state, entry, instance) = match past(&entries, &key.id, present.is_some(), at) {
        Past::After(entry) if entry.what.removes() => ("absent", Some(entry), None),
        Past::After(entry) => ("registered", Some(entry), entry.instance.as_deref()),
        Past::AsNow => ("registered", None, present.map(|present| &**present)),
        Past::Absent => ("absent", None, None),
        Past::Forgotten => ("unknown", None, None),
    };
    Ok(Json(json!({
        "service": key.service.as_str(),
        "id": key.id.as_str(),
        "at": timestamp(at),
        "begins": begins,
        "state": state,
        "entry": entry.map(shown),
        "instance": instance.map(InstanceDto::from),
    }))
    .into_response())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::model::{Incarnation, Revision};

    #[test]
    fn what_an_instance_was() {
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let entry = |seconds, id: &str, what| Entry {
            at: at(seconds),
            revision: Revision(seconds),
            id: id.parse().unwrap(),
            incarnation: Incarnation(1),
            what,
            by: String::new(),
            why: String::new(),
            instance: None,
        };
        let entries = [
            entry(10, "old", What::Updated),
            entry(20, "new", What::Registered),
            entry(30, "new", What::Drained),
            entry(40, "late", What::Updated),
            entry(50, "new", What::Expired),
        ];
        let after = |n: usize| Past::After(&entries[n]);
        for (id, present, seconds, want) in [
            ("new", false, 5, Past::Forgotten),
            ("new", false, 15, Past::Absent),
            ("new", false, 20, after(1)),
            ("new", false, 49, after(2)),
            ("new", false, 99, after(4)),
            ("old", true, 5, Past::Forgotten),
            ("old", true, 10, after(0)),
            ("late", true, 30, Past::Forgotten),
            ("quiet", true, 30, Past::AsNow),
            ("quiet", true, 5, Past::Forgotten),
            ("never", false, 30, Past::Absent),
        ] {
            assert_eq!(past(&entries, &id.parse().unwrap(), present, at(seconds)), want, "{id} at {seconds}");
        }
    }
}
