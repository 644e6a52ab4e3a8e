//! Speaks to a Disco server: its HTTP/JSON API for the command line.
//!
//! Holds no state of the mesh; whatever it learns it hands to its caller. Errors say what to do next.

mod http;

pub use http::{FieldError, Http, HttpError};
