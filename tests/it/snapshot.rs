//! `disco snapshot`: what was saved is there again, and nothing is given out twice.

use std::process::Output;

use anyhow::{Context as _, ensure};

use crate::harness::{Disco, PATIENCE, eventually, scene};

fn ran(disco: &Disco, line: &str) -> anyhow::Result<Output> {
    let output = disco.command()?.args(line.split_whitespace()).output()?;
    ensure!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(output)
}

#[test]
fn a_restored_store_has_everything_and_gives_nothing_out_twice() {
    scene(|folder| {
        let [one, two, three] = ["one", "two", "three"].map(|name| folder.join(name));
        for folder in [&one, &two, &three] {
            std::fs::create_dir(folder)?;
        }
        let mut disco = Disco::start(&one)?;
        let register = |disco: &Disco, id: &str, ttl: &str| -> anyhow::Result<u64> {
            let body = format!(r#"{{"address":"127.0.0.1","port":50051,"ttl":"{ttl}"}}"#);
            let path = format!("/v1/services/greeter/instances/{id}");
            let answer = disco.request("PUT", &path, body.as_bytes())?.json()?;
            answer["revision"].as_u64().with_context(|| answer.to_string())
        };
        let take = |disco: &Disco, name: &str| -> anyhow::Result<u64> {
            let body = br#"{"holder":"me","ttl":"1h"}"#;
            let answer = disco.request("PUT", &format!("/v1/locks/{name}"), body)?.json()?;
            answer["lock"]["token"].as_u64().with_context(|| answer.to_string())
        };
        register(&disco, "a", "1s")?;
        let token = take(&disco, "job")?;
        let file = folder.join("saved");
        let file = file.display();
        ran(&disco, &format!("snapshot save {file}"))?;
        ensure!(!disco.command()?.args(["snapshot", "save"]).arg(folder.join("saved")).status()?.success());
        // After the snapshot: lost with the machine, and never given out again.
        let last = register(&disco, "b", "10m")?.max(take(&disco, "other")?);
        disco.kill();

        // Into a server that runs.
        let disco = Disco::start(&two)?;
        ran(&disco, &format!("snapshot restore {file}"))?;
        ensure!(disco.serving()? == ["a"], "{:?}", disco.serving());
        let lock = &disco.get("/v1/locks/job")?["lock"];
        ensure!(lock["token"] == token && lock["holder"] == "me", "{lock}");
        ensure!(register(&disco, "c", "10m")? > last && take(&disco, "other")? > last);
        let renewed = disco.request("POST", &format!("/v1/locks/job/renew?token={token}"), b"")?;
        ensure!(renewed.status == 200, "{renewed:?}");
        // Its lease is counted again, whole.
        eventually("end of a's lease", PATIENCE, || (disco.serving().ok()? == ["c"]).then_some(()))?;
        let again = disco.command()?.args(["snapshot", "restore"]).arg(folder.join("saved")).output()?;
        ensure!(String::from_utf8_lossy(&again.stderr).contains("not empty"), "{again:?}");
        ran(&disco, &format!("snapshot restore {file} --replace"))?;
        ensure!(disco.serving()? == ["a"], "{:?}", disco.serving());

        // Into the directory of one that does not run yet.
        ran(&disco, &format!("snapshot restore {file} --data {}", three.join("data").display()))?;
        let disco = Disco::start(&three)?;
        ensure!(disco.serving()? == ["a"] && take(&disco, "other")? > last);
        Ok(())
    });
}
