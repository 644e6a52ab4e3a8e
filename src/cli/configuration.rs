//! `disco config`: looks at configuration files without running them.

use std::path::PathBuf;

use clap::Subcommand;

use super::{Failure, output::print};
use crate::config::{Config, Overrides};

/// Verbs of `disco config`.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Check a file and report every problem, with line and column
    #[command(after_help = "Example:\n  disco config check disco.yaml")]
    Check {
        /// The file
        file: PathBuf,
    },
    /// Print a file with all its defaults filled in; without a file, the defaults with all roles
    #[command(after_help = "Example:\n  disco config show > disco.yaml")]
    Show {
        /// The file
        file: Option<PathBuf>,
    },
}

pub(super) fn run(command: Command) -> Result<(), Failure> {
    let overrides = Overrides::default();
    match command {
        Command::Check { file } => {
            let config = Config::load(&file, &overrides)?;
            let roles: Vec<&str> = config.roles.iter().map(|role| role.name()).collect();
            print(&format!("{}: good; roles {}\n", file.display(), roles.join(", ")))
        }
        Command::Show { file: Some(file) } => print(&Config::load(&file, &overrides)?.to_yaml()),
        Command::Show { file: None } => print(&Config::default().to_yaml()),
    }
}
