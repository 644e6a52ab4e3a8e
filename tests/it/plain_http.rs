//! README's five minutes: a plain web server under `disco run`, called through a sidecar with HTTP/1.

use crate::harness::{Disco, Envoy, PATIENCE, Process, Protocol, eventually, free_port, request, scene};

#[test]
fn a_web_server_is_called_through_a_sidecar() {
    scene(|folder| {
        let disco = Disco::start(folder)?;
        let port = free_port()?.to_string();
        let mut command = disco.command()?;
        command.args(["run", "--service", "hello", "--port", &port, "--"]);
        command.args(["python3", "-m", "http.server", "--bind", "127.0.0.1", &port]);
        let _server = Process::start("hello", disco.folder(), &mut command)?;
        let envoy = Envoy::start(&disco, Protocol::Delta)?;
        // The whole URL in the request line names the service, as a Host header would.
        eventually("page", PATIENCE, || {
            let answer = request(envoy.proxy, "GET", "http://hello/", b"").ok()?;
            (answer.status == 200 && answer.body.contains("Directory listing")).then_some(())
        })
    });
}
