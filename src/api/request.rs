//! What the handlers read from an HTTP request: body, path and query, checked whole.

use std::{future::Future, time::Duration};

use axum::{
    body::Bytes,
    extract::{self, FromRequest, FromRequestParts, Request, rejection::BytesRejection},
    http::{StatusCode, header, request::Parts},
    response::Response,
};

use super::{
    Api,
    error::{ApiError, Kind},
};
use crate::model::{
    Fields, Incarnation, InstanceId, InstanceKey, Node, Problems, Revision, ServiceId, Value,
    format_duration, parse_duration,
};

/// Longest that a long poll is held.
pub(super) const WAIT_MAX: Duration = Duration::from_secs(300);

/// Longest that a body may take to arrive.
const BODY_WITHIN: Duration = Duration::from_secs(30);

pub(super) type Reply = Result<Response, ApiError>;

/// A request body within the limit.
pub(super) struct Body(pub(super) Bytes);

impl FromRequest<Api> for Body {
    type Rejection = ApiError;

    async fn from_request(request: Request, api: &Api) -> Result<Self, ApiError> {
        let limit = api.config.body_limit;
        let too_large = || {
            let message = format!("the body is larger than {limit} bytes; limits.body raises that");
            ApiError::new(Kind::TooLarge, message)
        };
        // What is announced need not be waited for.
        let announced = request.headers().get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok());
        if announced.and_then(|length| length.parse::<usize>().ok()).is_some_and(|length| length > limit) {
            return Err(too_large());
        }
        let body = tokio::time::timeout(BODY_WITHIN, Bytes::from_request(request, api)).await;
        let body = body.map_err(|_| {
            let message = format!("the body did not arrive within {}", format_duration(BODY_WITHIN));
            ApiError::new(Kind::Invalid, message)
        })?;
        match body {
            Ok(body) => Ok(Self(body)),
            Err(BytesRejection::FailedToBufferBody(error))
                if error.status() == StatusCode::PAYLOAD_TOO_LARGE =>
            {
                Err(too_large())
            }
            Err(error) => Err(ApiError::new(Kind::Invalid, format!("the body did not arrive: {error}"))),
        }
    }
}

/// The variable parts of a path.
pub(super) struct Path<T>(pub(super) T);

impl<T: serde::de::DeserializeOwned + Send> FromRequestParts<Api> for Path<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, api: &Api) -> Result<Self, ApiError> {
        match extract::Path::from_request_parts(parts, api).await {
            Ok(extract::Path(path)) => Ok(Self(path)),
            Err(error) => Err(ApiError::new(Kind::Invalid, format!("the path is not text: {error}"))),
        }
    }
}

/// The parameters behind the `?`, read like the fields of a body.
pub(super) struct Query(Node);

impl Query {
    pub(super) fn of(raw: Option<&str>) -> Self {
        let pairs = raw.unwrap_or_default().split('&').filter(|pair| !pair.is_empty()).map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let value = percent_decode(value);
            let value = value.parse().map_or(Value::Text(value), Value::Int);
            (percent_decode(name), Node { value, at: None })
        });
        Self(Node { value: Value::Map(pairs.collect()), at: None })
    }

    pub(super) fn read<T>(
        &self,
        read: impl FnOnce(&mut Fields<'_>, &mut Problems) -> T,
    ) -> Result<T, ApiError> {
        let mut problems = Problems::default();
        let mut fields = Fields::of(&self.0, "", &mut problems);
        let value = read(&mut fields, &mut problems);
        fields.finish(&mut problems);
        if problems.is_empty() { Ok(value) } else { Err(problems.into()) }
    }
}

pub(super) fn percent_decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        let mut digits = rest.clone();
        let hex = |digit: Option<u8>| digit.and_then(|d| char::from(d).to_digit(16));
        match (byte, hex(digits.next()), hex(digits.next())) {
            (b'%', Some(high), Some(low)) => {
                bytes.push(u8::try_from(high * 16 + low).unwrap_or(b'?'));
                rest = digits;
            }
            (b'+', ..) => bytes.push(b' '),
            _ => bytes.push(byte),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// How long a long poll waits; absent means not at all.
pub(super) fn read_wait(fields: &mut Fields<'_>, problems: &mut Problems) -> Duration {
    let wait = fields.parse("wait", problems, parse_duration).unwrap_or_default();
    if wait > WAIT_MAX {
        problems.add(
            "wait",
            format!("{} is too long: want at most {}", format_duration(wait), format_duration(WAIT_MAX)),
        );
    }
    wait
}

pub(super) fn read_incarnation(fields: &mut Fields<'_>, problems: &mut Problems) -> Option<Incarnation> {
    fields
        .integer("incarnation", 1..=u64::MAX.into(), problems)
        .and_then(|number| u64::try_from(number).ok())
        .map(Incarnation)
}

pub(super) fn service_id(text: &str) -> Result<ServiceId, ApiError> {
    let mut problems = Problems::default();
    problems.take("service", text.parse()).ok_or_else(|| problems.into())
}

pub(super) fn instance_key(service: &str, id: &str) -> Result<InstanceKey, ApiError> {
    let mut problems = Problems::default();
    let service = problems.take("service", service.parse::<ServiceId>());
    let id = problems.take("id", id.parse::<InstanceId>());
    match (service, id) {
        (Some(service), Some(id)) => Ok(InstanceKey { service, id }),
        _ => Err(problems.into()),
    }
}

/// `?index` and `?wait` of a long poll.
pub(super) fn read_poll(query: Option<&str>) -> Result<(Revision, Duration), ApiError> {
    Query::of(query).read(|fields, problems| {
        let index = fields.integer("index", 0..=u64::MAX.into(), problems).unwrap_or_default();
        (Revision(u64::try_from(index).unwrap_or_default()), read_wait(fields, problems))
    })
}

/// Waits for `event`, but no longer than `wait`, nor than this server runs: what there is then is the answer.
pub(super) async fn wait_at_most<T>(api: &Api, wait: Duration, event: impl Future<Output = T>) {
    if wait.is_zero() {
        return;
    }
    tokio::select! {
        _ = tokio::time::timeout(wait, event) => {}
        () = api.tasks.shutdown().wait() => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_poll_says_from_where_and_how_long() {
        let (index, wait) = read_poll(Some("index=7&wait=1m")).unwrap();
        assert_eq!((index, wait), (Revision(7), Duration::from_secs(60)));
        for bad in ["index=x", "wait=30", "wait=1h", "indx=7", "index=-1"] {
            assert!(read_poll(Some(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn queries_are_read_like_fields() {
        let service =
            Query::of(Some("service=123")).read(|f, p| f.parse("service", p, str::parse::<ServiceId>));
        assert_eq!(service.unwrap().unwrap().as_str(), "123", "a name of digits is a name");
        assert_eq!(percent_decode("a%20b+c%zz%"), "a b c%zz%");
    }
}
