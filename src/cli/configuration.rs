//! `disco config`: looks at configuration files without running them.

use std::path::PathBuf;

use clap::Subcommand;

use super::{Failure, output::print};
use crate::config::{Config, Overrides};

/// Verbs of `disco config`.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Check files and report every problem, with line and column
    #[command(
        after_help = "Examples:\n  disco config check disco.yaml\n  disco config check n1.yaml n2.yaml n3.yaml"
    )]
    Check {
        /// The files
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
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
        Command::Check { files } => {
            let mut wrong = Vec::new();
            for file in files {
                match Config::load(&file, &overrides) {
                    Ok(config) => {
                        let roles: Vec<&str> = config.roles.iter().map(|role| role.name()).collect();
                        print(&format!("{}: good; roles {}\n", file.display(), roles.join(", ")))?;
                    }
                    Err(error) => wrong.push(Failure::from(error).message),
                }
            }
            if wrong.is_empty() { Ok(()) } else { Err(Failure::bad_data(wrong.join("\nerror: "))) }
        }
        Command::Show { file: Some(file) } => print(&Config::load(&file, &overrides)?.to_yaml()),
        Command::Show { file: None } => print(&Config::default().to_yaml()),
    }
}
