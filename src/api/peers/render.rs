//! Lists of peers as text.

use std::time::Duration;

use axum::{
    extract::{RawQuery, State},
    http::{HeaderName, HeaderValue, header},
    response::IntoResponse as _,
};
use tokio::time::Instant;

use super::{
    super::{
        Api,
        error::{ApiError, Kind},
        request::{Path, Query, Reply, read_wait, service_id},
    },
    until,
};
use crate::{
    model::{InstanceId, Revision, ServiceId},
    peers::{
        Refusal, Until, View,
        render::{Format, Options, RenderError, Rendered, render},
    },
};

/// What is asked for.
#[derive(Debug)]
struct Asked {
    format: Format,
    peer: Option<InstanceId>,
    recovering: bool,
    tls: bool,
}

pub(in crate::api) async fn list(
    State(api): State<Api>,
    Path(set): Path<String>,
    RawQuery(query): RawQuery,
) -> Reply {
    let (asked, index, wait) = Query::of(query.as_deref()).read(|fields, problems| {
        let format = fields.parse("format", problems, str::parse::<Format>).unwrap_or(Format::Json);
        let peer = fields.parse("peer", problems, str::parse::<InstanceId>);
        let mut flag = |name| fields.parse(name, problems, read_flag).unwrap_or_default();
        let (recovering, tls) = (flag("recovering"), flag("tls"));
        let index = fields.integer("index", 0..=u64::MAX.into(), problems).unwrap_or_default();
        let index = Revision(u64::try_from(index).unwrap_or_default());
        (Asked { format, peer, recovering, tls }, index, read_wait(fields, problems))
    })?;
    let (view, rendered) = wait_for(&api, &service_id(&set)?, &asked, index, wait).await?;
    let kind = match asked.format {
        Format::Json => "application/json",
        _ => "text/plain; charset=utf-8",
    };
    let number = |Revision(number)| HeaderValue::from(number);
    let digest = HeaderValue::from_str(&rendered.digest);
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static(kind)),
        // To wait for the next change with.
        (HeaderName::from_static("disco-revision"), number(view.revision)),
        (HeaderName::from_static("disco-set-revision"), number(rendered.revision)),
        (
            HeaderName::from_static("disco-digest"),
            digest.map_err(|_| ApiError::new(Kind::Internal, "the digest is no header"))?,
        ),
    ];
    Ok((headers, rendered.text).into_response())
}

fn read_flag(text: &str) -> Result<bool, &'static str> {
    match text {
        "" | "true" => Ok(true),
        "false" => Ok(false),
        _ => Err("want true or false"),
    }
}

/// Waits for a list, too: that the set is founded, and that the add of a joiner was seen.
async fn wait_for(
    api: &Api,
    set: &ServiceId,
    asked: &Asked,
    after: Revision,
    wait: Duration,
) -> Result<(View, Rendered), ApiError> {
    let end = Instant::now() + wait;
    let mut wanted = Until { after, ..Until::default() };
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let view = until(api.peers()?, &api.tasks, set, wanted.clone(), left).await?;
        match rendered(&view, asked) {
            Ok(rendered) => return Ok((view, rendered)),
            Err(error) if error.is_not_yet() && view.revision > wanted.after && !left.is_zero() => {
                wanted.after = view.revision;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

fn rendered(view: &View, asked: &Asked) -> Result<Rendered, RenderError> {
    let peer = match &asked.peer {
        // While founders are collected that is the answer, whoever asks.
        Some(key) if view.set.founding.is_some() => {
            let refusal = || RenderError::NoPeer(Refusal::NoPeer(key.clone()));
            Some(view.set.peer(key).ok_or_else(refusal)?)
        }
        Some(_) | None => None,
    };
    let options = Options {
        recovering: asked.recovering,
        tls: asked.tls,
        facts: Some(&view.facts),
        leader: view.roles.leader.as_ref(),
    };
    render(&view.set, peer, asked.format, &options)
}

impl From<RenderError> for ApiError {
    fn from(error: RenderError) -> Self {
        let message = error.to_string();
        let kind = match &error {
            error if error.is_not_yet() => Kind::NotYet,
            RenderError::NoPeer(_) => Kind::NotFound,
            RenderError::NeedsPeer { .. } | RenderError::WrongKind { .. } | RenderError::Template(_) => {
                Kind::Invalid
            }
            _ => Kind::Conflict,
        };
        Self::new(kind, message)
    }
}
