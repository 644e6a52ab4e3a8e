//! An Envoy that asks for clusters and listeners by the services of these types (rule G2).

use anyhow::ensure;

use crate::harness::{Disco, Envoy, Greeter, PATIENCE, Protocol, eventually, scene};

#[test]
fn g2_envoy_with_services_of_one_type_delta() {
    prove(Protocol::Delta);
}

#[test]
fn g2_envoy_with_services_of_one_type_sotw() {
    prove(Protocol::Sotw);
}

fn prove(protocol: Protocol) {
    scene(|folder| {
        let disco = Disco::start(folder)?;
        let _greeter = Greeter::start(&disco, "g1")?;
        disco.wait_serving(&["g1"])?;
        let envoy = Envoy::start_per_type(&disco, protocol)?;
        let said = envoy.call("greeter")?;
        ensure!(said.as_ref().is_ok_and(|said| said.contains("g1")), "{said:?}");

        // A service that comes later gets through: its cluster by one stream, endpoints and routes by another.
        disco.register_alias("later")?;
        eventually("a call of the new service", PATIENCE, || envoy.call("later").ok()?.ok())?;
        Ok(())
    });
}
