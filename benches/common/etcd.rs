//! An etcd with its data on the disk of the build, from `.tools` or `DISCO_TEST_TOOLS`, and its own limit.

use std::{
    env,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use bytes::Bytes;
use disco::proto::etcd::{PutRequest, RequestOp, TxnRequest, kv_client::KvClient, request_op::Request};
use tempfile::TempDir;
use tonic::transport::Channel;

use super::guard;

pub(crate) struct Etcd {
    _server: guard::Server,
    pub(crate) address: String,
    _dir: TempDir,
}

impl Etcd {
    #[allow(clippy::disallowed_methods, reason = "the tools may be elsewhere")]
    pub(crate) fn start() -> Self {
        let folder = env::var_os("DISCO_TEST_TOOLS").map(PathBuf::from);
        let folder = folder.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join(".tools"));
        let dir = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
        let listener = || TcpListener::bind(("127.0.0.1", 0)).and_then(|it| it.local_addr());
        let port = || listener().expect("a port").port();
        let (address, peer) =
            (format!("http://127.0.0.1:{}", port()), format!("http://127.0.0.1:{}", port()));
        let mut command = Command::new(folder.join("bin/etcd"));
        command.arg("--log-level=error").arg("--data-dir").arg(dir.path().join("etcd"));
        command.args(["--listen-client-urls", &address, "--advertise-client-urls", &address]);
        command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        command.args(["--name=m", &format!("--initial-cluster=m={peer}")]);
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("make tools has run");
        Self { _server: guard::Server::new(child), address, _dir: dir }
    }
}

/// What a bare client does at best: one transaction with one put.
pub(crate) async fn put(raw: &mut KvClient<Channel>, key: &str, value: Bytes) {
    let put = PutRequest { key: Bytes::from(format!("/raw/data/{key}")), value, lease: 0 };
    let success = vec![RequestOp { request: Some(Request::RequestPut(put)) }];
    raw.txn(TxnRequest { success, ..TxnRequest::default() }).await.expect("etcd answers");
}
