//! Tests of the whole, and against real clients.

mod validate;
