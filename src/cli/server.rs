//! `disco dev` and `disco serve`: commands that are the server.

use std::{net::SocketAddr, path::PathBuf};

use clap::Args;

use super::{Failure, output::print, parse};
use crate::{
    app::{self, Addresses},
    config::{Config, Listen, Overrides, Role, Store},
    resources::DEFAULT_OUTBOUND_PORT,
};

/// Arguments of `disco dev`.
#[derive(Debug, Args)]
pub(super) struct Dev {
    /// Keep the state in this directory; without it, it is gone with the process
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Start although accepted changes are damaged, and keep those before the damage
    #[arg(long, requires = "data")]
    accept_loss: bool,
    /// Allow listening beyond loopback, without TLS
    #[arg(long)]
    insecure: bool,
    #[command(flatten)]
    listen: ListenOptions,
}

/// Arguments of `disco serve`.
#[derive(Debug, Args)]
pub(super) struct Serve {
    /// The configuration; `disco config show` prints one to start from
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Start although accepted changes are damaged, and keep those before the damage
    #[arg(long)]
    accept_loss: bool,
    #[command(flatten)]
    listen: ListenOptions,
}

/// Options of both, over what the configuration says.
#[derive(Debug, Args)]
struct ListenOptions {
    /// Where to listen for gRPC; port 0 takes any free one
    #[arg(long, value_name = "IP:PORT", value_parser = parse::listen)]
    grpc_listen: Option<SocketAddr>,
    /// Where to listen for HTTP; port 0 takes any free one
    #[arg(long, value_name = "IP:PORT", value_parser = parse::listen)]
    http_listen: Option<SocketAddr>,
    /// What to log, e.g. info,disco::xds=debug
    #[arg(long, value_name = "FILTER", env = "DISCO_LOG")]
    log: Option<String>,
}

impl ListenOptions {
    fn overrides(self) -> Overrides {
        Overrides { grpc: self.grpc_listen, http: self.http_listen, log: self.log, ..Overrides::default() }
    }
}

pub(super) async fn dev(arguments: Dev) -> Result<(), Failure> {
    let Dev { data, accept_loss, insecure, listen } = arguments;
    let config = Config::dev(&Overrides { data, accept_loss, insecure, ..listen.overrides() })?;
    let store = config.store.clone();
    app::run(config, |addresses| {
        // A banner that nobody reads is no reason to end.
        let _ = print(&banner(addresses, &store));
    })
    .await?;
    Ok(())
}

/// The line that programs read to learn the chosen ports.
fn listening(addresses: &Addresses) -> String {
    let part = |name: &str, address: Option<SocketAddr>| {
        address.map(|address| format!(" {name}={address}")).unwrap_or_default()
    };
    format!("disco: listening{}{}\n", part("grpc", addresses.grpc), part("http", addresses.http))
}

fn banner(addresses: &Addresses, store: &Store) -> String {
    let state = match store {
        Store::Memory => "the state is in memory and gone when this ends; --data DIR keeps it".to_owned(),
        Store::File { dir, .. } => format!("the state is in {}", dir.display()),
        Store::Etcd(etcd) => format!("the state is in etcd: {}", etcd.endpoints.join(", ")),
    };
    // On other ports than usual, the commands to try would miss this server.
    let usual = Listen::default();
    let option = |name: &str, address: Option<SocketAddr>, usual: SocketAddr| match address {
        Some(address) if address != usual => format!(" --{name} {address}"),
        _ => String::new(),
    };
    let grpc = option("grpc", addresses.grpc, usual.grpc);
    let http = option("http", addresses.http, usual.http);
    format!(
        "{}{state}

Try next, in another terminal:
  disco run --service hello --port 8000{grpc} -- python3 -m http.server 8000
  disco envoy run{grpc}
  curl -H 'Host: hello' http://127.0.0.1:{DEFAULT_OUTBOUND_PORT}/
  disco service list{http}
  disco check{http}

",
        listening(addresses)
    )
}

pub(super) async fn serve(arguments: Serve) -> Result<(), Failure> {
    let Serve { config, accept_loss, listen } = arguments;
    let Some(file) = config else { return Err(Failure::usage(no_config())) };
    let config = Config::load(&file, &Overrides { accept_loss, ..listen.overrides() })?;
    app::run(config, |addresses| {
        let _ = print(&listening(addresses));
    })
    .await?;
    Ok(())
}

fn no_config() -> String {
    let roles: Vec<String> =
        Role::ALL.iter().map(|role| format!("  {:<9} {}", role.name(), role.does())).collect();
    format!(
        "`disco serve` runs the roles that a configuration names, and was given none: use --config FILE\n\
         roles:\n{}\n\
         `disco config show > disco.yaml` writes a file with all of them; `disco dev` runs all of them on loopback \
         without a file",
        roles.join("\n")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_banner_names_the_chosen_ports_where_they_differ() {
        let at = |text: &str| Some(text.parse().unwrap());
        let usual = Addresses { grpc: at("127.0.0.1:18000"), http: at("127.0.0.1:18080") };
        let text = banner(&usual, &Store::Memory);
        assert!(text.starts_with("disco: listening grpc=127.0.0.1:18000 http=127.0.0.1:18080\n"), "{text}");
        assert!(text.contains("--data DIR") && !text.contains("--http"), "{text}");
        let other = Addresses { grpc: at("127.0.0.1:4001"), http: at("127.0.0.1:4002") };
        let text = banner(&other, &Store::File { dir: "/tmp/d".into(), accept_loss: false });
        assert!(text.contains("\n  disco service list --http 127.0.0.1:4002\n"), "{text}");
        assert!(
            text.contains("\n  disco envoy run --grpc 127.0.0.1:4001\n") && text.contains("/tmp/d"),
            "{text}"
        );
    }

    #[test]
    fn without_a_file_all_roles_and_the_way_out_are_named() {
        let text = no_config();
        for want in ["registry ", "xds ", "admin ", "--config FILE", "disco dev"] {
            assert!(text.contains(want), "{want} is not in\n{text}");
        }
    }
}
