//! The `disco` program.

/// When all proxies connect at once each is sent much, and what that takes is to be given back afterwards. Its settings are in
/// `.cargo/config.toml`.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> std::process::ExitCode {
    disco::cli::main()
}
