use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::Context as _;

/// What an HTTP server answered.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) fn json(&self) -> anyhow::Result<serde_json::Value> {
        serde_json::from_str(&self.body).with_context(|| format!("{}: {}", self.status, self.body))
    }
}

/// One HTTP/1.1 request on a connection of its own. Fails when nothing comes for a minute.
pub(crate) fn request(server: SocketAddr, method: &str, path: &str, body: &[u8]) -> anyhow::Result<Answer> {
    request_within(Duration::from_secs(60), server, method, path, body)
}

/// Likewise, but fails when it cannot connect, or nothing comes, for as long as `patience`.
pub(crate) fn request_within(
    patience: Duration,
    server: SocketAddr,
    method: &str,
    path: &str,
    body: &[u8],
) -> anyhow::Result<Answer> {
    let connection = TcpStream::connect_timeout(&server, patience);
    let mut connection = connection.with_context(|| format!("nobody listens on {server}"))?;
    connection.set_nodelay(true)?;
    connection.set_read_timeout(Some(patience))?;
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: {server}\r\nconnection: close\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    // A server that refuses a body may answer and close before it has read all of it: what it said counts.
    let sent = connection.write_all(head.as_bytes()).and_then(|()| connection.write_all(body));
    match read(BufReader::new(connection)) {
        Err(error) => Err(sent.err().map_or(error, Into::into)),
        answer => answer,
    }
}

fn read(mut stream: BufReader<TcpStream>) -> anyhow::Result<Answer> {
    let mut line = || {
        let mut line = String::new();
        stream.read_line(&mut line).map(|_| line.trim_end().to_owned())
    };
    let first = line()?;
    let status = first.split(' ').nth(1).and_then(|status| status.parse().ok());
    let status = status.with_context(|| format!("not an HTTP answer: {first:?}"))?;
    let (mut length, mut chunked) = (None, false);
    loop {
        let header = line()?.to_ascii_lowercase();
        match header.split_once(':') {
            None => break,
            Some(("content-length", value)) => length = value.trim().parse::<u64>().ok(),
            Some(("transfer-encoding", value)) => chunked = value.trim() == "chunked",
            Some(_) => {}
        }
    }
    let mut body = Vec::new();
    if chunked {
        loop {
            let mut size = String::new();
            stream.read_line(&mut size)?;
            let size = u64::from_str_radix(size.trim(), 16)?;
            (&mut stream).take(size).read_to_end(&mut body)?;
            stream.read_line(&mut String::new())?;
            if size == 0 {
                break;
            }
        }
    } else {
        stream.take(length.unwrap_or(u64::MAX)).read_to_end(&mut body)?;
    }
    Ok(Answer { status, body: String::from_utf8(body)? })
}
