//! No benchmark hangs, and none leaves a server behind: what it starts is known here, and ends with it.

use std::{
    process::Child,
    sync::{Mutex, MutexGuard},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use tokio::signal::unix::{SignalKind, signal};

static SERVERS: Mutex<Vec<Pid>> = Mutex::new(Vec::new());

fn servers() -> MutexGuard<'static, Vec<Pid>> {
    SERVERS.lock().expect("no panics")
}

/// A server that is killed when this is dropped, and when the benchmark is interrupted or takes too long.
pub(crate) struct Server(pub(crate) Child);

impl Server {
    pub(crate) fn new(child: Child) -> Self {
        servers().push(Pid::from_child(&child));
        Self(child)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let pid = Pid::from_child(&self.0);
        servers().retain(|other| *other != pid);
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// From here on the process ends after `limit` at the latest, and when it is told to, with all its servers.
pub(crate) fn start(limit: Duration) {
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let reason = runtime.block_on(async {
            let mut terminate = signal(SignalKind::terminate()).expect("a handler");
            let mut interrupt = signal(SignalKind::interrupt()).expect("a handler");
            tokio::select! {
                () = tokio::time::sleep(limit) => format!("it took more than {} s", limit.as_secs()),
                _ = terminate.recv() => "it was terminated".to_owned(),
                _ = interrupt.recv() => "it was interrupted".to_owned(),
            }
        });
        for server in servers().iter() {
            let _ = kill_process(*server, Signal::KILL);
        }
        println!("the benchmark ends here: {reason}");
        std::process::exit(1);
    });
}
