//! The `disco` program.

fn main() -> std::process::ExitCode {
    disco::cli::main()
}
