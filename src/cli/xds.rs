use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};

use super::{
    Failure, Global,
    output::{Format, ShowOptions, View, cell, count, print},
};
use crate::{
    client::{Ads, Answer, Ask, Servers},
    proto,
};

/// Verbs of `disco xds`.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Subscribe at any xDS server, and print and acknowledge each response
    #[command(
        long_about = "Subscribe at any xDS server over ADS, and print and acknowledge each response until Ctrl-C.\n\nTYPE is \
                      cluster, endpoints, lb-endpoint, listener, route, virtual_host, secret or runtime, or a whole type URL. Without names all resources \
                      are asked for; not every server and type has that.",
        after_help = "Examples:\n  disco xds watch cluster\n  disco xds watch endpoints greeter --count 1 -o json\n  \
                      disco xds watch listener --server 10.0.0.7:15010 --sotw --node-id sidecar-7"
    )]
    Watch(Watch),
}

/// Arguments of `disco xds watch`.
#[derive(Debug, Args)]
pub(super) struct Watch {
    /// The type of the resources
    #[arg(value_name = "TYPE", value_parser = type_url)]
    kind: String,
    /// Their names; all when absent
    #[arg(value_name = "NAME")]
    names: Vec<String>,
    /// The server, if it is not the one of --grpc
    #[arg(long, value_name = "IP:PORT")]
    server: Option<String>,
    /// Ask for the state of the world instead of changes
    #[arg(long)]
    sotw: bool,
    /// The node id to show to the server
    #[arg(long, value_name = "ID", default_value = "disco-xds-watch")]
    node_id: String,
    /// End after so many responses
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    #[command(flatten)]
    options: ShowOptions,
}

const SHORT: [(&[&str], &str); 8] = [
    (&["cluster", "clusters", "cds"], "type.googleapis.com/envoy.config.cluster.v3.Cluster"),
    (&["endpoints", "endpoint", "eds"], "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"),
    (&["lb-endpoint", "lb-endpoints", "leds"], "type.googleapis.com/envoy.config.endpoint.v3.LbEndpoint"),
    (&["listener", "listeners", "lds"], "type.googleapis.com/envoy.config.listener.v3.Listener"),
    (&["route", "routes", "rds"], "type.googleapis.com/envoy.config.route.v3.RouteConfiguration"),
    (&["virtual_host", "virtual_hosts", "vhds"], "type.googleapis.com/envoy.config.route.v3.VirtualHost"),
    (&["secret", "secrets", "sds"], "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"),
    (&["runtime", "rtds"], "type.googleapis.com/envoy.service.runtime.v3.Runtime"),
];

fn type_url(text: &str) -> Result<String, String> {
    let short = SHORT.iter().find(|(names, _)| names.contains(&text)).map(|(_, url)| (*url).to_owned());
    let given = || (text.contains('/') && text.contains('.')).then(|| text.to_owned());
    short.or_else(given).ok_or_else(|| {
        "want cluster, endpoints, lb-endpoint, listener, route, virtual_host, secret, runtime, or a type URL such as \
         type.googleapis.com/envoy.config.cluster.v3.Cluster"
            .to_owned()
    })
}

/// The short name of a type, the URL of one that has none.
fn type_name(url: &str) -> &str {
    let short = SHORT.iter().find(|(_, known)| *known == url);
    short.and_then(|(names, _)| names.first()).copied().unwrap_or(url)
}

pub(super) async fn run(command: Command, global: &Global) -> Result<(), Failure> {
    let Command::Watch(arguments) = command;
    tokio::select! {
        result = watch(arguments, global) => result,
        _ = tokio::signal::ctrl_c() => Ok(()),
    }
}

async fn watch(arguments: Watch, global: &Global) -> Result<(), Failure> {
    let Watch { kind, mut names, server, sotw, node_id, count, options } = arguments;
    let address = server.unwrap_or_else(|| global.grpc.clone());
    let servers = Servers::parse(&address, global.token.as_deref()).map_err(Failure::usage)?;
    // Clusters and listeners have a wildcard that every server knows: no names. The others have one that must be said.
    if names.is_empty() && !matches!(type_name(&kind), "cluster" | "listener") {
        names.push("*".to_owned());
    }
    let ask = Ask { type_url: kind, names, node_id, sotw };
    let mut ads = Ads::open(&servers, ask).await.map_err(|reason| {
        Failure::failed(format!(
            "cannot subscribe at {reason}: start a server with `disco dev`, or name one with --server, --grpc or DISCO_GRPC"
        ))
    })?;
    let lost = |reason: String| Failure::failed(format!("the xDS stream at {address} failed: {reason}"));
    let mut seen = 0;
    while count.is_none_or(|count| seen < count) {
        let Some(answer) = ads.next().await.map_err(lost)? else {
            return Err(lost("the server ended it".to_owned()));
        };
        let view = View { document: shown(&answer), items: None, table: text, empty: "" };
        if options.output == Format::Yaml && seen > 0 {
            print("---\n")?;
        }
        view.print(options.output)?;
        seen += 1;
    }
    Ok(())
}

/// A response as JSON; what cannot be decoded is left out.
fn shown(answer: &Answer) -> Value {
    let resources = answer.resources.iter().map(|(name, version, any)| {
        let body = proto::message_json(&any.type_url, &any.value);
        // SotW does not say the name; the resource knows it.
        let own = body.as_ref().and_then(|body| body.get("name").or_else(|| body.get("cluster_name")));
        let name = if name.is_empty() { own.cloned().unwrap_or_default() } else { json!(name) };
        let mut shown = Map::new();
        shown.insert("name".to_owned(), name);
        shown.insert("version".to_owned(), json!(version));
        shown.insert("bytes".to_owned(), json!(any.value.len()));
        if let Some(body) = body {
            shown.insert("body".to_owned(), body);
        }
        Value::Object(shown)
    });
    json!({
        "type": type_name(&answer.type_url),
        "type_url": answer.type_url,
        "version": answer.version,
        "nonce": answer.nonce,
        "resources": resources.collect::<Vec<_>>(),
        "removed": answer.removed,
    })
}

fn text(document: &Value, _: Option<usize>) -> String {
    let list =
        |name: &str| document.get(name).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let (resources, removed) = (list("resources"), list("removed"));
    let number = |of: &[Value]| u64::try_from(of.len()).unwrap_or(u64::MAX);
    let mut text = format!(
        "{}  version {}  nonce {}  {}, {} removed\n",
        cell(document, "/type"),
        cell(document, "/version"),
        cell(document, "/nonce"),
        count(number(resources), "resource"),
        number(removed),
    );
    for resource in resources {
        let version = match cell(resource, "/version").as_str() {
            "-" => String::new(),
            version => format!("  {version}"),
        };
        text.push_str(&format!(
            "  + {}{version}  {} bytes\n",
            cell(resource, "/name"),
            cell(resource, "/bytes")
        ));
    }
    for name in removed {
        text.push_str(&format!("  - {}\n", cell(name, "")));
    }
    text
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::{envoy::config::endpoint::v3::ClusterLoadAssignment, google::protobuf::Any};
    use prost::Message as _;

    use super::*;

    #[test]
    fn responses_are_shown_with_what_can_be_decoded() {
        let url = type_url("eds").unwrap();
        let load = ClusterLoadAssignment { cluster_name: "greeter".into(), ..Default::default() };
        let known = Any { type_url: url.clone(), value: load.encode_to_vec() };
        let unknown = Any { type_url: "x/none.such".into(), value: vec![1, 2] };
        let answer = Answer {
            type_url: url,
            version: "7".into(),
            nonce: "a".into(),
            resources: vec![
                (String::new(), String::new(), known),
                ("odd\u{1b}".into(), "v1".into(), unknown),
            ],
            removed: vec!["gone".into()],
        };
        let document = shown(&answer);
        assert_eq!(document["resources"][0]["body"], json!({"cluster_name": "greeter"}));
        assert_eq!(
            text(&document, None),
            "endpoints  version 7  nonce a  2 resources, 1 removed\n  + greeter  9 bytes\n  \
             + odd\\u{1b}  v1  2 bytes\n  - gone\n"
        );
    }

    #[test]
    fn types_have_short_names() {
        for (names, url) in SHORT {
            for name in names {
                assert_eq!(type_url(name).unwrap(), url);
            }
            assert_eq!(type_url(url).unwrap(), url);
        }
        assert!(type_url("clutser").unwrap_err().contains("want cluster, "));
        assert_eq!(type_name("x/y.Z"), "x/y.Z");
    }
}
