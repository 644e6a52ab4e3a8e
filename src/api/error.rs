use axum::{
    Json,
    response::{IntoResponse, Response},
};
use http::StatusCode;
use serde_json::json;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::{
    catalog::Snapshot,
    model::{Problem, Problems, ServiceId, nearest},
    registry,
};

/// How many names a slip is compared with: asking must stay cheap.
const COMPARED: usize = 1_000;

/// A refusal as both edges give it.
#[derive(Debug)]
pub(super) struct ApiError {
    kind: Kind,
    message: String,
    fields: Vec<Problem>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Invalid,
    NotFound,
    MethodNotAllowed,
    Conflict,
    /// Not wrong, only too early: ask again, or wait.
    NotYet,
    TooLarge,
    Limit,
    Unavailable,
    /// Another server may do it: this one does not have the role.
    Misdirected,
    Internal,
}

impl Kind {
    /// Its name in JSON, its HTTP status and its gRPC code.
    fn codes(self) -> (&'static str, StatusCode, Code) {
        match self {
            Self::Invalid => ("invalid", StatusCode::BAD_REQUEST, Code::InvalidArgument),
            Self::NotFound => ("not_found", StatusCode::NOT_FOUND, Code::NotFound),
            Self::MethodNotAllowed => {
                ("method_not_allowed", StatusCode::METHOD_NOT_ALLOWED, Code::Unimplemented)
            }
            Self::Conflict => ("conflict", StatusCode::CONFLICT, Code::Aborted),
            Self::NotYet => ("not_yet", StatusCode::TOO_EARLY, Code::FailedPrecondition),
            Self::TooLarge => ("too_large", StatusCode::PAYLOAD_TOO_LARGE, Code::OutOfRange),
            Self::Limit => ("limit", StatusCode::TOO_MANY_REQUESTS, Code::ResourceExhausted),
            Self::Unavailable => ("unavailable", StatusCode::SERVICE_UNAVAILABLE, Code::Unavailable),
            Self::Misdirected => ("misdirected", StatusCode::MISDIRECTED_REQUEST, Code::Unimplemented),
            Self::Internal => ("internal", StatusCode::INTERNAL_SERVER_ERROR, Code::Internal),
        }
    }
}

impl ApiError {
    pub(super) fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), fields: Vec::new() }
    }

    /// There is no such service; perhaps another one was meant.
    pub(super) fn no_service(snapshot: &Snapshot, id: ServiceId) -> Self {
        match nearest(id.as_str(), snapshot.services().take(COMPARED).map(|service| service.id.as_str())) {
            Some(near) => {
                Self::new(Kind::NotFound, format!("service {id} is not known; did you mean {near}?"))
            }
            None => registry::Error::NoService(id).into(),
        }
    }

    /// The HTTP status and the message.
    pub(super) fn http(&self) -> (StatusCode, &str) {
        (self.kind.codes().1, &self.message)
    }

    /// The gRPC code and the message.
    pub(super) fn grpc(&self) -> (Code, &str) {
        (self.kind.codes().2, &self.message)
    }
}

impl From<Problems> for ApiError {
    fn from(problems: Problems) -> Self {
        Self { kind: Kind::Invalid, message: problems.to_string(), fields: problems.0 }
    }
}

impl From<registry::Error> for ApiError {
    fn from(error: registry::Error) -> Self {
        let message = error.to_string();
        let (kind, fields) = match error {
            registry::Error::Invalid(problems) => (Kind::Invalid, problems.0),
            registry::Error::NotFound(_) | registry::Error::NoService(_) | registry::Error::NoLock(_) => {
                (Kind::NotFound, Vec::new())
            }
            registry::Error::NotEmpty(_) => (Kind::Conflict, Vec::new()),
            registry::Error::Conflict(problem) => (Kind::Conflict, vec![problem]),
            registry::Error::Limit(problem) => (Kind::Limit, vec![problem]),
            registry::Error::Store(_)
            | registry::Error::Elsewhere { .. }
            | registry::Error::Contended(_)
            | registry::Error::LocksUnread
            | registry::Error::Isolated
            | registry::Error::ShuttingDown => (Kind::Unavailable, Vec::new()),
            registry::Error::Record { .. } => (Kind::Internal, Vec::new()),
        };
        Self { kind, message, fields }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let (code, status, _) = self.kind.codes();
        let fields: Vec<_> =
            self.fields.iter().map(|p| json!({"field": p.field, "message": p.message})).collect();
        (status, Json(json!({"error": {"code": code, "message": self.message, "fields": fields}})))
            .into_response()
    }
}

impl From<ApiError> for Status {
    fn from(error: ApiError) -> Self {
        let (_, _, code) = error.kind.codes();
        if error.fields.is_empty() {
            return Self::new(code, error.message);
        }
        let mut details = ErrorDetails::new();
        for problem in error.fields {
            details.add_bad_request_violation(problem.field, problem.message);
        }
        Self::with_error_details(code, error.message, details)
    }
}
