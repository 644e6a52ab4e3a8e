//! Builds the go-control-plane server of `benches/peers`.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use crate::common::guard::Server;

/// For the download of Go and of the modules, and for the build. Without anything to do it takes a blink.
const WITHIN: Duration = Duration::from_secs(180);

/// The program, or nothing and a word about why: the rest can be measured without it.
pub(crate) fn build() -> Option<PathBuf> {
    let top = Path::new(env!("CARGO_MANIFEST_DIR"));
    let tools = env::var_os("DISCO_TEST_TOOLS").map_or_else(|| top.join(".tools"), PathBuf::from);
    let python = env::var("PYTHON").unwrap_or_else(|_| "python3".into());
    let mut command = Command::new(&python);
    command.arg(top.join("tests/tools/install.py")).args(["go", "bench-peer"]);
    let problem = match command.spawn() {
        Err(error) => format!("{python} does not start: {error}"),
        Ok(child) => match wait(Server::new(child)) {
            Some(true) => return Some(tools.join("bench-peer/peer")),
            Some(false) => "see above".to_owned(),
            None => format!("it took more than {} s", WITHIN.as_secs()),
        },
    };
    println!("go-control-plane is left out, because its server could not be built: {problem}");
    println!("`tests/tools/install.py go bench-peer` installs a pinned Go into .tools/ and builds it.\n");
    None
}

/// Whether it succeeded within the time.
fn wait(mut child: Server) -> Option<bool> {
    let end = Instant::now() + WITHIN;
    while Instant::now() < end {
        if let Ok(Some(status)) = child.0.try_wait() {
            return Some(status.success());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    None
}
