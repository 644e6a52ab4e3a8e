//! Users, passwords, tokens, certificates.

use std::{fs, path::Path};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

use super::{
    super::*,
    cluster::{Cluster, until},
};
use crate::store::conformance::put;

/// Waits until the store says what is wrong with it.
async fn fault(store: &EtcdStore) -> String {
    until(store, "at fault", |status| status.fault.is_some()).await.fault.unwrap().reason
}

#[tokio::test]
async fn who_is_refused_says_why_and_goes_on_when_that_is_mended() {
    let mut cluster = Cluster::start(1);
    for command in [
        "user add root:r00t",
        "user grant-role root root",
        "role add mesh",
        "role grant-permission mesh --prefix=true readwrite /disco/",
        "user add disco:secret",
        "user grant-role disco mesh",
        "auth enable",
    ] {
        let arguments: Vec<&str> = command.split(' ').collect();
        // Roles come before the users that have them.
        if command == "user grant-role root root" {
            cluster.ctl(&["role", "add", "root"]);
        }
        cluster.ctl(&arguments);
    }
    let password_file = cluster.path().join("password");
    fs::write(&password_file, "wrong\n").unwrap();
    let user = Some(EtcdUser { name: "disco".into(), password_file: password_file.clone() });
    let config = EtcdConfig { user, ..cluster.config() };

    let nobody = EtcdStore::open(&cluster.config()).unwrap();
    let reason = fault(&nobody).await;
    assert!(reason.contains("etcd wants a user"), "{reason}");

    let store = EtcdStore::open(&config).unwrap();
    let reason = fault(&store).await;
    assert!(reason.contains("refuses the name or the password of user disco"), "{reason}");
    fs::write(&password_file, "secret\n").unwrap();
    until(&store, "let in", |status| status.fault.is_none() && status.session.is_some()).await;
    let first = store.commit(vec![put("k", "1")]).await.unwrap();
    let mut watch = store.watch("", first).await.unwrap();

    let stranger = EtcdStore::open(&EtcdConfig { prefix: "/other/".into(), ..config }).unwrap();
    let reason = fault(&stranger).await;
    assert!(reason.contains("does not let user disco read and write /other/"), "{reason}");

    // etcd keeps tokens in memory, so now ours is void.
    cluster.kill(0);
    cluster.begin(0);
    let second = loop {
        match store.commit(vec![put("k", "2")]).await {
            Ok(revision) => break revision,
            Err(error) => assert!(error.to_string().contains("did not answer"), "{error}"),
        }
    };
    let mut told = watch.next().await.unwrap().revision;
    while told < second {
        told = watch.next().await.unwrap().revision;
    }
    assert_eq!(told, second);
}

/// Writes a certificate for 127.0.0.1 and its key.
fn certificate(dir: &Path, name: &str, issuer: &Issuer<'_, KeyPair>) {
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new(["127.0.0.1".to_owned()]).unwrap();
    let certificate = params.signed_by(&key, issuer).unwrap();
    fs::write(dir.join(format!("{name}.pem")), certificate.pem()).unwrap();
    fs::write(dir.join(format!("{name}.key")), key.serialize_pem()).unwrap();
}

/// Certificates of etcd and of ours, and of an authority that vouches for neither.
fn certificates(dir: &Path) -> EtcdTls {
    for (authority, names) in [("ca", &["etcd", "disco"][..]), ("stranger", &[])] {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        fs::write(dir.join(format!("{authority}.pem")), params.self_signed(&key).unwrap().pem()).unwrap();
        let issuer = Issuer::new(params, key);
        names.iter().for_each(|name| certificate(dir, name, &issuer));
    }
    EtcdTls { ca: dir.join("ca.pem"), identity: Some((dir.join("disco.pem"), dir.join("disco.key"))) }
}

#[tokio::test]
async fn both_sides_show_certificates() {
    let arguments = |dir: &Path| {
        let file = |name: &str| dir.join(name).display().to_string();
        vec![
            "--client-cert-auth".to_owned(),
            format!("--trusted-ca-file={}", file("ca.pem")),
            format!("--cert-file={}", file("etcd.pem")),
            format!("--key-file={}", file("etcd.key")),
        ]
    };
    let cluster = Cluster::start_with(1, arguments, Some(certificates));
    let store = cluster.store().await;
    let revision = store.commit(vec![put("k", "1")]).await.unwrap();
    assert_eq!(store.get("k").await.unwrap().unwrap().revision, revision);

    let good = cluster.config().tls.unwrap();
    for (tls, what) in [
        (EtcdTls { identity: None, ..good.clone() }, "ertificate"),
        (EtcdTls { ca: cluster.path().join("stranger.pem"), ..good.clone() }, "ertificate"),
    ] {
        let store = EtcdStore::open(&EtcdConfig { tls: Some(tls), ..cluster.config() }).unwrap();
        let reason = fault(&store).await;
        assert!(reason.contains(what), "{reason}");
    }
    let missing = EtcdTls { ca: cluster.path().join("nothing.pem"), ..good };
    let error = EtcdStore::open(&EtcdConfig { tls: Some(missing), ..cluster.config() }).unwrap_err();
    assert!(error.to_string().contains("nothing.pem cannot be read"), "{error}");
}
