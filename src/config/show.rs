//! A checked configuration as YAML again.

use std::path::Path;

use super::{Config, LogFormat, Store, check::format_bytes};
use crate::{model::format_duration, store::EtcdConfig};

pub(super) fn yaml(config: &Config) -> String {
    let Config {
        node,
        roles,
        listen,
        insecure,
        store,
        data_dir,
        limits,
        shutdown,
        log,
        registry,
        health,
        guards,
        history,
        xds,
    } = config;
    let roles: Vec<&str> = roles.iter().map(|role| role.name()).collect();
    let store = match store {
        Store::Memory => "store: memory\n".to_owned(),
        Store::File { dir, accept_loss } => {
            format!(
                "store:\n  file:\n    dir: {}\n    accept_loss: {accept_loss}\n",
                quoted(&dir.to_string_lossy())
            )
        }
        Store::Etcd(etcd) => self::etcd(etcd),
    };
    let format = match log.format {
        LogFormat::Text => "text",
        LogFormat::Json => "json",
    };
    let resend: Vec<&str> = xds.resend_on_reconnect.iter().map(|kind| kind.name()).collect();
    let registration = &limits.registration;
    let blocks = [
        (
            "listen",
            [("grpc", Some(listen.grpc)), ("http", Some(listen.http)), ("advertise", listen.advertise)]
                .into_iter()
                .filter_map(|(name, address)| Some((name, quoted(&address?.to_string()))))
                .collect(),
        ),
        (
            "limits",
            vec![
                ("ttl_min", format_duration(registration.ttl_min)),
                ("ttl_max", format_duration(registration.ttl_max)),
                ("ttl_default", format_duration(registration.ttl_default)),
                ("check_interval_min", format_duration(registration.check_interval_min)),
                ("weight_max", registration.weight_max.to_string()),
                ("metadata_entries", registration.metadata_entries.to_string()),
                ("metadata_key", registration.metadata_key.to_string()),
                ("metadata_value", format_bytes(registration.metadata_value)),
                ("locality", registration.locality.to_string()),
                ("instances_per_service", registration.instances_per_service.to_string()),
                ("services", registration.services.to_string()),
                ("body", format_bytes(limits.body)),
                ("xds_request", format_bytes(limits.xds_request)),
                ("names_per_stream", limits.names_per_stream.to_string()),
                ("name_bytes", limits.name_bytes.to_string()),
                ("grpc_connections", limits.grpc_connections.to_string()),
                ("http_connections", limits.http_connections.to_string()),
                ("http_requests", limits.http_requests.to_string()),
            ],
        ),
        ("shutdown", vec![("drain", format_duration(shutdown.drain))]),
        ("log", vec![("filter", quoted(&log.filter)), ("format", format.to_owned())]),
        (
            "registry",
            vec![
                ("session_grace", format_duration(registry.session_grace)),
                ("empty_service_retention", format_duration(registry.empty_service_retention)),
            ],
        ),
        (
            "health",
            vec![
                ("concurrency", health.concurrency.to_string()),
                ("suspend_share", health.suspend_share.to_string()),
            ],
        ),
        (
            "guards",
            vec![
                ("min_share", guards.min_share.to_string()),
                ("window", format_duration(guards.window)),
                ("ask_timeout", format_duration(guards.ask_timeout)),
                ("ask_interval", format_duration(guards.ask_interval)),
                ("flaps", guards.flaps.to_string()),
                ("flap_window", format_duration(guards.flap_window)),
                ("flap_penalty", format_duration(guards.flap_penalty)),
            ],
        ),
        (
            "history",
            vec![
                ("keep", format_duration(history.keep)),
                ("entries", history.entries.to_string()),
                ("per_service", history.per_service.to_string()),
            ],
        ),
        (
            "xds",
            vec![
                ("ack_timeout", format_duration(xds.ack_timeout)),
                ("warming_timeout", format_duration(xds.warming_timeout)),
                ("reconnect_grace", format_duration(xds.reconnect_grace)),
                ("first_request_timeout", format_duration(xds.first_request_timeout)),
                ("load_report_interval", format_duration(xds.load_report_interval)),
                ("streams", xds.streams.to_string()),
                ("max_connection_age", format_duration(xds.max_connection_age.unwrap_or_default())),
                ("resend_on_reconnect", format!("[{}]", resend.join(", "))),
                ("leds_from", xds.leds_from.to_string()),
            ],
        ),
    ];
    let node = node.as_ref().map(|node| format!("node: {}\n", quoted(node.as_str()))).unwrap_or_default();
    let data_dir = quoted(&data_dir.to_string_lossy());
    let mut text =
        format!("{node}roles: [{}]\ninsecure: {insecure}\ndata_dir: {data_dir}\n{store}", roles.join(", "));
    for (name, fields) in blocks {
        text.push_str(&format!("{name}:\n"));
        for (field, value) in fields {
            text.push_str(&format!("  {field}: {value}\n"));
        }
    }
    text
}

fn etcd(etcd: &EtcdConfig) -> String {
    let EtcdConfig { endpoints, prefix, user, tls, timeout, session_ttl } = etcd;
    let path = |path: &Path| quoted(&path.to_string_lossy());
    let endpoints: Vec<String> = endpoints.iter().map(|endpoint| quoted(endpoint)).collect();
    let mut lines = vec![
        format!("endpoints: [{}]", endpoints.join(", ")),
        format!("prefix: {}", quoted(prefix)),
        format!("timeout: {}", format_duration(*timeout)),
        format!("session_ttl: {}", format_duration(*session_ttl)),
    ];
    if let Some(user) = user {
        lines.push(format!("user: {}", quoted(&user.name)));
        lines.push(format!("password_file: {}", path(&user.password_file)));
    }
    if let Some(tls) = tls {
        lines.push(format!("tls:\n      ca: {}", path(&tls.ca)));
        if let Some((cert, key)) = &tls.identity {
            lines.push(format!("  cert: {}\n      key: {}", path(cert), path(key)));
        }
    }
    let lines: String = lines.iter().map(|line| format!("    {line}\n")).collect();
    format!("store:\n  etcd:\n{lines}")
}

/// A JSON text is a YAML text; one that no reader of YAML could take for something else goes without quotes.
fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '/' | '.' | '-' | '_' | '=' | ',');
    let name = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '/') || text.starts_with("./");
    let word =
        matches!(text.to_ascii_lowercase().as_str(), "null" | "true" | "false" | "yes" | "no" | "on" | "off");
    let number = text.parse::<f64>().is_ok();
    if name && !word && !number && text.chars().all(plain) {
        return text.to_owned();
    }
    serde_json::Value::from(text).to_string()
}
