//! From the tree of a file to a checked configuration.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use super::{Config, ConfigError, LogFormat, Overrides, Role, Store, yaml};
use crate::{
    model::{Fields, Node, Problem, Problems, Value, excerpt, format_duration, nearest, parse_duration},
    xds::ResourceType,
};

/// Roles of the design that this version does not have.
const LATER: [&str; 1] = ["federation"];

/// Where the state is kept when the file does not say.
pub(super) const DEFAULT_DIR: &str = "./disco-data";

const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(60 * 60);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

pub(super) fn parse(file: &str, text: &str, overrides: &Overrides) -> Result<Config, ConfigError> {
    let tree = match yaml::read(text) {
        Ok(tree) => tree,
        Err(problem) => return Err(ConfigError::invalid(file, text, Problems(vec![problem]))),
    };
    let mut reader = Reader { problems: Problems::default(), root: Some(&tree.root) };
    let mut config = reader.config(&tree.root);
    apply(&mut config, overrides);
    reader.check_whole(&config);

    let mut problems = reader.problems;
    for problem in &mut problems.0 {
        if problem.about_name {
            problem.at = problem.at.and_then(|value| tree.key_of(value)).or(problem.at);
        }
    }
    if problems.is_empty() { Ok(config) } else { Err(ConfigError::invalid(file, text, problems)) }
}

/// Applies the overrides to a configuration that no file gave.
pub(super) fn finish(mut config: Config, overrides: &Overrides) -> Result<Config, ConfigError> {
    let mut reader = Reader { problems: Problems::default(), root: None };
    apply(&mut config, overrides);
    reader.check_whole(&config);
    if reader.problems.is_empty() {
        return Ok(config);
    }
    Err(ConfigError::invalid("command line", "", reader.problems))
}

fn apply(config: &mut Config, overrides: &Overrides) {
    let Overrides { grpc, http, data, accept_loss, log, insecure } = overrides;
    config.listen.grpc = grpc.unwrap_or(config.listen.grpc);
    config.listen.http = http.unwrap_or(config.listen.http);
    if let Some(dir) = data {
        config.store = Store::File { dir: dir.clone(), accept_loss: false };
    }
    if let Store::File { accept_loss: accepted, .. } = &mut config.store {
        *accepted |= accept_loss;
    }
    if let Some(filter) = log {
        config.log.filter.clone_from(filter);
    }
    config.insecure |= insecure;
}

pub(super) struct Reader<'a> {
    pub(super) problems: Problems,
    root: Option<&'a Node>,
}

impl Reader<'_> {
    fn config(&mut self, root: &Node) -> Config {
        let mut config = Config::default();
        let mut fields = Fields::of(root, "", &mut self.problems);
        config.node = fields.parse("node", &mut self.problems, str::parse);
        self.set(&mut fields, "data_dir", &mut config.data_dir, |text| match text {
            "" => Err("is empty: want a directory".to_owned()),
            text => Ok(PathBuf::from(text)),
        });
        self.roles(&mut fields, &mut config);
        if let Some(mut listen) = fields.fields("listen", &mut self.problems) {
            self.set(&mut listen, "grpc", &mut config.listen.grpc, address);
            self.set(&mut listen, "http", &mut config.listen.http, address);
            self.set(&mut listen, "advertise", &mut config.listen.advertise, |text| {
                reachable(text).map(Some)
            });
            listen.finish(&mut self.problems);
        }
        if let Some(insecure) = fields.boolean("insecure", &mut self.problems) {
            config.insecure = insecure;
        }
        self.store(&mut fields, &mut config);
        self.limits(&mut fields, &mut config);
        if let Some(mut shutdown) = fields.fields("shutdown", &mut self.problems) {
            self.duration(&mut shutdown, "drain", &mut config.shutdown.drain, Duration::ZERO, DAY);
            shutdown.finish(&mut self.problems);
        }
        if let Some(mut log) = fields.fields("log", &mut self.problems) {
            self.set(&mut log, "filter", &mut config.log.filter, |text| Ok(text.to_owned()));
            self.set(&mut log, "format", &mut config.log.format, |text| match text {
                "text" => Ok(LogFormat::Text),
                "json" => Ok(LogFormat::Json),
                _ => Err(format!("{} is not a log format: want text or json", excerpt(text))),
            });
            log.finish(&mut self.problems);
        }
        if let Some(mut registry) = fields.fields("registry", &mut self.problems) {
            let settings = &mut config.registry;
            self.duration(&mut registry, "session_grace", &mut settings.session_grace, Duration::ZERO, DAY);
            let retention = &mut settings.empty_service_retention;
            self.duration(&mut registry, "empty_service_retention", retention, Duration::ZERO, 365 * DAY);
            registry.finish(&mut self.problems);
        }
        if let Some(mut health) = fields.fields("health", &mut self.problems) {
            let concurrency = health.integer("concurrency", 1..=100_000, &mut self.problems);
            if let Some(concurrency) = concurrency.and_then(|n| usize::try_from(n).ok()) {
                config.health.concurrency = concurrency;
            }
            let share = health.integer("suspend_share", 1..=100, &mut self.problems);
            if let Some(share) = share.and_then(|n| u8::try_from(n).ok()) {
                config.health.suspend_share = share;
            }
            health.finish(&mut self.problems);
        }
        if let Some(mut guards) = fields.fields("guards", &mut self.problems) {
            let settings = &mut config.guards;
            self.share(&mut guards, "min_share", &mut settings.min_share);
            self.duration(&mut guards, "window", &mut settings.window, SECOND, DAY);
            let shortest = Duration::from_millis(10);
            self.duration(&mut guards, "ask_timeout", &mut settings.ask_timeout, shortest, 60 * SECOND);
            self.duration(&mut guards, "ask_interval", &mut settings.ask_interval, SECOND, DAY);
            if let Some(flaps) = guards.integer("flaps", 0..=1000, &mut self.problems) {
                settings.flaps = u32::try_from(flaps).unwrap_or_default();
            }
            self.duration(&mut guards, "flap_window", &mut settings.flap_window, SECOND, DAY);
            self.duration(&mut guards, "flap_penalty", &mut settings.flap_penalty, SECOND, DAY);
            guards.finish(&mut self.problems);
        }
        if let Some(mut history) = fields.fields("history", &mut self.problems) {
            let settings = &mut config.history;
            self.duration(&mut history, "keep", &mut settings.keep, HOUR, 365 * DAY);
            for (name, target) in
                [("entries", &mut settings.entries), ("per_service", &mut settings.per_service)]
            {
                let value = history.integer(name, 0..=10_000_000, &mut self.problems);
                if let Some(value) = value.and_then(|value| usize::try_from(value).ok()) {
                    *target = value;
                }
            }
            history.finish(&mut self.problems);
        }
        if let Some(mut xds) = fields.fields("xds", &mut self.problems) {
            let settings = &mut config.xds;
            self.duration(&mut xds, "ack_timeout", &mut settings.ack_timeout, SECOND, DAY);
            self.duration(&mut xds, "warming_timeout", &mut settings.warming_timeout, Duration::ZERO, DAY);
            self.duration(&mut xds, "reconnect_grace", &mut settings.reconnect_grace, Duration::ZERO, DAY);
            let first_request = &mut settings.first_request_timeout;
            self.duration(&mut xds, "first_request_timeout", first_request, SECOND, DAY);
            let load_report = &mut settings.load_report_interval;
            self.duration(&mut xds, "load_report_interval", load_report, SECOND, HOUR);
            let streams = xds.integer("streams", 1..=10_000_000, &mut self.problems);
            if let Some(streams) = streams.and_then(|streams| usize::try_from(streams).ok()) {
                settings.streams = streams;
            }
            let mut age = Duration::ZERO;
            self.duration(&mut xds, "max_connection_age", &mut age, Duration::ZERO, 365 * DAY);
            settings.max_connection_age = Some(age).filter(|age| !age.is_zero());
            for item in xds.list("resend_on_reconnect", &mut self.problems).unwrap_or_default() {
                match resource_type(&item.value) {
                    Ok(kind) => settings.resend_on_reconnect.push(kind),
                    Err(message) => self.problems.add_at("xds.resend_on_reconnect", message, item.at),
                }
            }
            let leds_from = xds.integer("leds_from", 0..=10_000_000, &mut self.problems);
            if let Some(from) = leds_from.and_then(|from| usize::try_from(from).ok()) {
                settings.leds_from = from;
            }
            xds.finish(&mut self.problems);
        }
        fields.finish(&mut self.problems);
        config
    }

    fn roles(&mut self, fields: &mut Fields<'_>, config: &mut Config) {
        config.roles.clear();
        let items = fields.list("roles", &mut self.problems);
        let Some(items) = items.filter(|items| !items.is_empty()) else {
            if !self.problems.0.iter().any(|problem| problem.field == "roles") {
                let message = format!(
                    "is missing: name at least one role for this process; available: {}",
                    available()
                );
                self.add("roles", message);
            }
            return;
        };
        for item in items {
            let result = match &item.value {
                Value::Text(text) => role(text),
                _ => Err(format!("is not the name of a role; available: {}", available())),
            };
            match result {
                Ok(role) if config.roles.insert(role) => {}
                Ok(role) => self.problems.add_at("roles", format!("`{role}` stands here twice"), item.at),
                Err(message) => self.problems.add_at("roles", message, item.at),
            }
        }
    }

    fn limits(&mut self, fields: &mut Fields<'_>, config: &mut Config) {
        let Some(mut limits) = fields.fields("limits", &mut self.problems) else { return };
        let own = &mut config.limits;
        let registration = &mut own.registration;
        let shortest = Duration::from_millis(100);
        self.duration(&mut limits, "ttl_min", &mut registration.ttl_min, shortest, DAY);
        self.duration(&mut limits, "ttl_max", &mut registration.ttl_max, shortest, 365 * DAY);
        self.duration(&mut limits, "ttl_default", &mut registration.ttl_default, shortest, 365 * DAY);
        self.duration(
            &mut limits,
            "check_interval_min",
            &mut registration.check_interval_min,
            shortest,
            HOUR,
        );
        if let Some(weight) = limits.integer("weight_max", 1..=i128::from(u32::MAX), &mut self.problems) {
            registration.weight_max = u32::try_from(weight).unwrap_or(registration.weight_max);
        }
        let counts: [(&'static str, &mut usize, i128); 10] = [
            ("metadata_entries", &mut registration.metadata_entries, 10_000),
            ("metadata_key", &mut registration.metadata_key, 4096),
            ("locality", &mut registration.locality, 4096),
            ("instances_per_service", &mut registration.instances_per_service, 10_000_000),
            ("services", &mut registration.services, 10_000_000),
            ("names_per_stream", &mut own.names_per_stream, 10_000_000),
            ("name_bytes", &mut own.name_bytes, 65_536),
            ("grpc_connections", &mut own.grpc_connections, 10_000_000),
            ("http_connections", &mut own.http_connections, 10_000_000),
            ("http_requests", &mut own.http_requests, 10_000_000),
        ];
        for (name, target, most) in counts {
            let value = limits.integer(name, 1..=most, &mut self.problems);
            if let Some(value) = value.and_then(|value| usize::try_from(value).ok()) {
                *target = value;
            }
        }
        self.bytes(&mut limits, "metadata_value", &mut registration.metadata_value, 1, 1 << 20);
        self.bytes(&mut limits, "body", &mut own.body, 1 << 10, 1 << 30);
        self.bytes(&mut limits, "xds_request", &mut own.xds_request, 1 << 20, 1 << 30);
        limits.finish(&mut self.problems);
    }

    /// What no field can tell alone.
    fn check_whole(&mut self, config: &Config) {
        for (name, address) in [("listen.grpc", config.listen.grpc), ("listen.http", config.listen.http)] {
            if !address.ip().is_loopback() && !config.insecure {
                let message = format!(
                    "{address} listens beyond loopback without TLS, so anybody who reaches it may register and see \
                     everything: use 127.0.0.1, or accept that with `insecure: true` in the file or `disco dev \
                     --insecure` (TLS is not available in this version)"
                );
                self.add(name, message);
            }
        }
        if config.listen.grpc == config.listen.http && config.listen.grpc.port() != 0 {
            let message = format!("{} is also listen.grpc: want another port", config.listen.http);
            self.add("listen.http", message);
        }
        let shared = matches!(config.store, Store::Etcd(_));
        if !shared && !config.roles.is_empty() && !config.roles.contains(&Role::Registry) {
            let message = "want `registry` too: this store belongs to one process, so without it the other roles would \
                           know nothing; a store in etcd is shared";
            self.add("roles", message);
        }
        if let Err(error) = tracing_subscriber::EnvFilter::try_new(&config.log.filter) {
            let message = format!(
                "{} is not a filter ({error}): want levels by module, e.g. info,disco::xds=debug",
                excerpt(&config.log.filter)
            );
            self.add("log.filter", message);
        }
        let limits = &config.limits.registration;
        if limits.ttl_min > limits.ttl_max {
            let message = format!(
                "{} is less than limits.ttl_min, which is {}",
                format_duration(limits.ttl_max),
                format_duration(limits.ttl_min)
            );
            self.add("limits.ttl_max", message);
        } else if !(limits.ttl_min..=limits.ttl_max).contains(&limits.ttl_default) {
            let message = format!(
                "{} is out of range: want {} to {}, which are limits.ttl_min and limits.ttl_max",
                format_duration(limits.ttl_default),
                format_duration(limits.ttl_min),
                format_duration(limits.ttl_max)
            );
            self.add("limits.ttl_default", message);
        }
    }

    /// Notes a problem of a field that was read before, at its place or that of the innermost map that is there.
    pub(super) fn add(&mut self, field: &str, message: impl Into<String>) {
        let mut at = self.root.and_then(|root| root.at);
        let mut node = self.root;
        for name in field.split('.') {
            node = match node.map(|node| &node.value) {
                Some(Value::Map(entries)) => {
                    entries.iter().find(|(key, _)| key == name).map(|(_, node)| node)
                }
                _ => None,
            };
            at = node.and_then(|node| node.at).or(at);
        }
        self.problems.add_at(field, message, at);
    }

    pub(super) fn set<T>(
        &mut self,
        fields: &mut Fields<'_>,
        name: &'static str,
        target: &mut T,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) {
        if let Some(value) = fields.parse(name, &mut self.problems, parse) {
            *target = value;
        }
    }

    pub(super) fn duration(
        &mut self,
        fields: &mut Fields<'_>,
        name: &'static str,
        target: &mut Duration,
        least: Duration,
        most: Duration,
    ) {
        let range = || format!("want {} to {}", format_duration(least), format_duration(most));
        let Some(node) = fields.node(name) else { return };
        let result = match &node.value {
            Value::Text(text) => parse_duration(text),
            Value::Int(number) => {
                Err(format!("{number} has no unit: want a number and a unit, such as {number}s"))
            }
            _ => Err("is not a duration: want a number and a unit, such as 30s, 5m or 500ms".to_owned()),
        };
        let result = result.and_then(|value| {
            if (least..=most).contains(&value) {
                return Ok(value);
            }
            Err(format!("{} is out of range: {}", format_duration(value), range()))
        });
        self.keep(fields, name, node, result, target);
    }

    fn share(&mut self, fields: &mut Fields<'_>, name: &'static str, target: &mut f64) {
        let Some(node) = fields.node(name) else { return };
        let value = match node.value {
            Value::Float(value) => Some(value),
            Value::Int(0) => Some(0.0),
            Value::Int(1) => Some(1.0),
            _ => None,
        };
        let result = value.filter(|value| (0.0..=1.0).contains(value));
        let result =
            result.ok_or_else(|| "is not a share: want a number from 0 to 1, such as 0.5".to_owned());
        self.keep(fields, name, node, result, target);
    }

    fn bytes(
        &mut self,
        fields: &mut Fields<'_>,
        name: &'static str,
        target: &mut usize,
        least: usize,
        most: usize,
    ) {
        let Some(node) = fields.node(name) else { return };
        let result = match &node.value {
            Value::Text(text) => parse_bytes(text),
            Value::Int(number) => {
                usize::try_from(*number).map_err(|_| format!("{number} is not a size: {BYTES}"))
            }
            _ => Err(format!("is not a size: {BYTES}")),
        };
        let result = result.and_then(|value| {
            if (least..=most).contains(&value) {
                return Ok(value);
            }
            let range = format!("want {} to {}", format_bytes(least), format_bytes(most));
            Err(format!("{} is out of range: {range}", format_bytes(value)))
        });
        self.keep(fields, name, node, result, target);
    }

    fn keep<T>(
        &mut self,
        fields: &Fields<'_>,
        name: &str,
        node: &Node,
        result: Result<T, String>,
        target: &mut T,
    ) {
        match result {
            Ok(value) => *target = value,
            Err(message) => self.problems.0.push(Problem::new(fields.path(name), message, node.at)),
        }
    }
}

fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| {
        format!("{} is not an address to listen on: want IP:PORT, e.g. 127.0.0.1:18000", excerpt(text))
    })
}

fn reachable(text: &str) -> Result<SocketAddr, String> {
    address(text).ok().filter(|address| !address.ip().is_unspecified() && address.port() != 0).ok_or_else(
        || {
            let text = excerpt(text);
            format!("{text} is not where other processes could connect to: want IP:PORT, e.g. 10.0.0.1:18000")
        },
    )
}

fn available() -> String {
    Role::ALL.map(Role::name).join(", ")
}

fn role(text: &str) -> Result<Role, String> {
    if let Some(role) = Role::ALL.into_iter().find(|role| role.name() == text) {
        return Ok(role);
    }
    if LATER.contains(&text) {
        return Err(format!("`{text}` is not available in this version; available: {}", available()));
    }
    let hint = nearest(text, Role::ALL.into_iter().map(Role::name))
        .map(|near| format!("; did you mean `{near}`?"))
        .unwrap_or_default();
    Err(format!("{} is not a role{hint}; available: {}", excerpt(text), available()))
}

fn resource_type(value: &Value) -> Result<ResourceType, String> {
    let known = ResourceType::ALL.map(ResourceType::name).join(", ");
    let Value::Text(text) = value else { return Err(format!("is not the name of a type; want {known}")) };
    let found = ResourceType::ALL.into_iter().find(|kind| kind.name() == text);
    found.ok_or_else(|| format!("{} is not a type; want {known}", excerpt(text)))
}

const BYTES: &str = "want a number of bytes, or one with a unit such as 64KiB or 1MiB";

const UNITS: [(&str, usize); 4] = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

fn parse_bytes(text: &str) -> Result<usize, String> {
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor = UNITS.iter().find(|(name, _)| *name == unit.trim()).map(|(_, factor)| *factor);
    let number: Option<usize> = number.parse().ok();
    number
        .zip(factor)
        .and_then(|(number, factor)| number.checked_mul(factor))
        .ok_or_else(|| format!("{} is not a size: {BYTES}", excerpt(text)))
}

/// Writes a size the way the file may have it.
pub(super) fn format_bytes(bytes: usize) -> String {
    let unit = UNITS.into_iter().find(|(_, factor)| bytes >= *factor && bytes.is_multiple_of(*factor));
    unit.map_or_else(|| "0B".to_owned(), |(name, factor)| format!("{}{name}", bytes / factor))
}
