//! Requests to etcd, short to write.

use bytes::Bytes;
use tonic::{Request, Response, Status, transport::Channel};

use super::client::MESSAGE;
use crate::proto::etcd::{
    Compare, DeleteRangeRequest, PutRequest, RangeRequest, RangeResponse, RequestOp, TxnRequest, TxnResponse,
    compare::{CompareResult, CompareTarget, TargetUnion},
    kv_client::KvClient,
    request_op,
};

pub(super) async fn range(
    channel: Channel,
    request: Request<RangeRequest>,
) -> Result<Response<RangeResponse>, Status> {
    KvClient::new(channel).max_decoding_message_size(MESSAGE).range(request).await
}

pub(super) async fn txn(
    channel: Channel,
    request: Request<TxnRequest>,
) -> Result<Response<TxnResponse>, Status> {
    KvClient::new(channel).max_decoding_message_size(MESSAGE).txn(request).await
}

/// The key was last written at this revision; 0: it is absent.
pub(super) fn is_at(key: Bytes, revision: i64) -> Compare {
    Compare {
        result: CompareResult::Equal.into(),
        target: CompareTarget::Mod.into(),
        key,
        target_union: Some(TargetUnion::ModRevision(revision)),
    }
}

/// The key is there with this value.
pub(super) fn has(key: Bytes, value: Bytes) -> Compare {
    Compare {
        result: CompareResult::Equal.into(),
        target: CompareTarget::Value.into(),
        key,
        target_union: Some(TargetUnion::Value(value)),
    }
}

/// Writes; with a lease of 0 the key is bound to none.
pub(super) fn put(key: Bytes, value: Bytes, lease: i64) -> RequestOp {
    RequestOp { request: Some(request_op::Request::RequestPut(PutRequest { key, value, lease })) }
}

pub(super) fn delete(key: Bytes) -> RequestOp {
    let request = DeleteRangeRequest { key, ..DeleteRangeRequest::default() };
    RequestOp { request: Some(request_op::Request::RequestDeleteRange(request)) }
}

/// Reads where the key was last written, and its value if asked.
pub(super) fn look(key: Bytes, value: bool) -> RequestOp {
    let request = RangeRequest { key, keys_only: !value, ..RangeRequest::default() };
    RequestOp { request: Some(request_op::Request::RequestRange(request)) }
}
