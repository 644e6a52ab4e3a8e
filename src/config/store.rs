//! The part of a file that says where the state is kept.

use std::{path::PathBuf, time::Duration};

use super::{
    Config, Store,
    check::{DEFAULT_DIR, Reader},
};
use crate::{
    model::{Fields, Value, excerpt},
    store::{EtcdConfig, EtcdTls, EtcdUser},
};

const WANT: &str = "want `memory`, `file: {dir: PATH}` or `etcd: {endpoints: [URL]}`";

impl Reader<'_> {
    pub(super) fn store(&mut self, fields: &mut Fields<'_>, config: &mut Config) {
        let Some(node) = fields.node("store") else { return };
        match &node.value {
            Value::Text(text) if text == "memory" => config.store = Store::Memory,
            Value::Map(_) => {
                let mut store = Fields::of(node, "store", &mut self.problems);
                let file = store.fields("file", &mut self.problems).map(|file| self.file(file));
                let etcd = store.fields("etcd", &mut self.problems).map(|etcd| self.etcd(etcd));
                let before = self.problems.0.len();
                store.finish(&mut self.problems);
                match (file, etcd) {
                    (Some(_), Some(_)) => {
                        self.problems.add_at("store", format!("names two stores: {WANT}"), node.at);
                    }
                    (Some(one), None) | (None, Some(one)) => config.store = one,
                    (None, None) if self.problems.0.len() == before => {
                        self.problems.add_at("store", format!("names no store: {WANT}"), node.at);
                    }
                    (None, None) => {}
                }
            }
            _ => self.problems.add_at("store", format!("is not a store: {WANT}"), node.at),
        }
    }

    fn file(&mut self, mut file: Fields<'_>) -> Store {
        let mut dir = PathBuf::from(DEFAULT_DIR);
        self.set(&mut file, "dir", &mut dir, |text| match text {
            "" => Err("is empty: want a directory".to_owned()),
            text => Ok(PathBuf::from(text)),
        });
        let accept_loss = file.boolean("accept_loss", &mut self.problems).unwrap_or(false);
        file.finish(&mut self.problems);
        Store::File { dir, accept_loss }
    }

    fn etcd(&mut self, mut fields: Fields<'_>) -> Store {
        let mut etcd = EtcdConfig::default();
        let before = self.problems.0.len();
        for item in fields.list("endpoints", &mut self.problems).unwrap_or_default() {
            let result = match &item.value {
                Value::Text(text) if etcd.endpoints.contains(text) => {
                    Err(format!("{text} stands here twice"))
                }
                Value::Text(text) => endpoint(text),
                _ => Err(format!("is not an endpoint: {ENDPOINT}")),
            };
            match result {
                Ok(endpoint) => etcd.endpoints.push(endpoint),
                Err(message) => self.problems.add_at("store.etcd.endpoints", message, item.at),
            }
        }
        if etcd.endpoints.is_empty() && self.problems.0.len() == before {
            let message = format!("is missing: name the members of the etcd cluster; {ENDPOINT}");
            self.add("store.etcd.endpoints", message);
        }
        self.set(&mut fields, "prefix", &mut etcd.prefix, prefix);
        let shortest = Duration::from_millis(200);
        self.duration(&mut fields, "timeout", &mut etcd.timeout, shortest, Duration::from_secs(60));
        let (least, most) = (Duration::from_secs(2), Duration::from_secs(600));
        self.duration(&mut fields, "session_ttl", &mut etcd.session_ttl, least, most);
        if etcd.session_ttl.subsec_nanos() > 0 {
            self.add("store.etcd.session_ttl", "has a fraction of a second: etcd counts whole ones");
        }
        let user = fields.text("user", &mut self.problems).map(str::to_owned);
        let password_file = self.path(&mut fields, "password_file");
        etcd.user = match (user, password_file) {
            (Some(name), Some(password_file)) => Some(EtcdUser { name, password_file }),
            (Some(_), None) => {
                self.add(
                    "store.etcd.user",
                    "wants `password_file` too: a file with the password of the user",
                );
                None
            }
            (None, Some(_)) => {
                self.add("store.etcd.password_file", "wants `user` too: whose password it is");
                None
            }
            (None, None) => None,
        };
        let tls = fields.fields("tls", &mut self.problems);
        let names_tls = tls.is_some();
        etcd.tls = tls.and_then(|tls| self.etcd_tls(tls));
        let secured = etcd.endpoints.iter().any(|endpoint| endpoint.starts_with("https:"));
        if names_tls && !secured && !etcd.endpoints.is_empty() {
            self.add("store.etcd.tls", "is for endpoints that begin with https://, and there is none");
        }
        if secured && !names_tls {
            let message = "want `tls: {ca: FILE}` too: who vouches for endpoints that begin with https://";
            self.add("store.etcd.endpoints", message);
        }
        fields.finish(&mut self.problems);
        Store::Etcd(etcd)
    }

    fn etcd_tls(&mut self, mut tls: Fields<'_>) -> Option<EtcdTls> {
        let ca = self.path(&mut tls, "ca");
        let (cert, key) = (self.path(&mut tls, "cert"), self.path(&mut tls, "key"));
        if ca.is_none() {
            self.add("store.etcd.tls.ca", "is missing: want a file of PEM with who vouches for etcd");
        }
        if cert.is_some() != key.is_some() {
            self.add("store.etcd.tls", "has only one of `cert` and `key`: a certificate goes with its key");
        }
        tls.finish(&mut self.problems);
        Some(EtcdTls { ca: ca?, identity: cert.zip(key) })
    }

    fn path(&mut self, fields: &mut Fields<'_>, name: &'static str) -> Option<PathBuf> {
        fields.parse(name, &mut self.problems, |text| match text {
            "" => Err("is empty: want a file"),
            text => Ok(PathBuf::from(text)),
        })
    }
}

const ENDPOINT: &str = "want http://HOST:PORT or https://HOST:PORT, e.g. http://10.0.0.1:2379";

fn endpoint(text: &str) -> Result<String, String> {
    let wrong = || format!("{} is not an endpoint: {ENDPOINT}", excerpt(text));
    let uri: http::Uri = text.parse().map_err(|_| wrong())?;
    let scheme = matches!(uri.scheme_str(), Some("http" | "https"));
    let whole = uri.port_u16().is_some() && matches!(uri.path(), "" | "/") && uri.query().is_none();
    if scheme && whole { Ok(text.trim_end_matches('/').to_owned()) } else { Err(wrong()) }
}

fn prefix(text: &str) -> Result<String, String> {
    if text.starts_with('/') && text.ends_with('/') {
        return Ok(text.to_owned());
    }
    Err(format!("{} does not begin and end with a slash: want e.g. /disco/", excerpt(text)))
}
