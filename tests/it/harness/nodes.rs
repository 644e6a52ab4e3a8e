use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, ensure};

use super::{Disco, Etcd, PATIENCE, Place, disco::Start, eventually, free_port};

/// Several Discos over several etcds, as the files of `examples/ha…` say.
#[derive(Debug)]
pub(crate) struct Nodes {
    pub(crate) etcd: Etcd,
    /// In the order of their names.
    pub(crate) all: Vec<Disco>,
}

impl Nodes {
    /// Starts three etcds and a node for each file of `examples/<example>`, on this machine.
    pub(crate) fn start(folder: &Path, example: &str, more: &str) -> anyhow::Result<Self> {
        Self::start_in(folder, example, more, |_| Place::here())
    }

    /// Likewise, each process in a place by its name (`e1` to `e3` are the etcds). `more` is added to the part of each file that
    /// says how to speak to etcd.
    pub(crate) fn start_in(
        folder: &Path,
        example: &str,
        more: &str,
        place: impl Fn(&str) -> Place,
    ) -> anyhow::Result<Self> {
        let etcd = Etcd::start(folder, &["e1", "e2", "e3"].map(&place))?;
        let mut all = Vec::new();
        for file in example_files(example)? {
            let name = file.file_stem().and_then(|name| name.to_str()).context("no name")?.to_owned();
            let text = adapt(&fs::read_to_string(&file)?, folder, &name, &etcd, more)?;
            let place = place(&name);
            let text = if place.network.is_some() { format!("{text}\ninsecure: true\n") } else { text };
            let file = folder.join(format!("{name}.yaml"));
            fs::write(&file, text)?;
            let arguments = ["serve".into(), "--config".into(), file.into()];
            let port = || anyhow::Ok(SocketAddr::new(place.listen(), free_port()?));
            let start = Start { name, place: place.clone(), arguments: arguments.into() };
            all.push(Disco::run(folder, start, port()?, port()?)?);
        }
        let mut nodes = Self { etcd, all };
        nodes.introduce();
        nodes.wait_ready()?;
        Ok(nodes)
    }

    /// Tells what is started by one of them of the others that do the same, those whose names begin alike, and then of those
    /// that serve proxies: they know who has acknowledged a drain.
    fn introduce(&mut self) {
        let known: Vec<_> = self.all.iter().map(|disco| (disco.name().to_owned(), disco.own())).collect();
        for disco in &mut self.all {
            let group = disco.name().chars().next();
            let of = |wanted| known.iter().filter(move |(name, _)| name.chars().next() == wanted);
            let others: Vec<_> = of(group).chain(of(Some('x')).filter(|_| group != Some('x'))).collect();
            disco.introduce(others.into_iter().map(|(_, addresses)| *addresses));
        }
    }

    pub(crate) fn node(&self, name: &str) -> anyhow::Result<&Disco> {
        self.all.iter().find(|disco| disco.name() == name).with_context(|| format!("no node {name}"))
    }

    pub(crate) fn node_mut(&mut self, name: &str) -> anyhow::Result<&mut Disco> {
        self.all.iter_mut().find(|disco| disco.name() == name).with_context(|| format!("no node {name}"))
    }

    /// Waits until all say that they are ready.
    pub(crate) fn wait_ready(&self) -> anyhow::Result<()> {
        self.all.iter().try_for_each(Disco::wait_ready)
    }

    /// The node that serves the one proxy, once it has all that there is.
    pub(crate) fn serves(&self) -> anyhow::Result<String> {
        eventually("a node with a proxy that has everything", PATIENCE, || {
            let synced = |disco: &Disco| {
                let proxies = disco.get("/v1/proxies").ok()?;
                let [proxy] = proxies["proxies"].as_array()?.as_slice() else { return None };
                let whole = proxy["types"].as_array()?.len() == 4;
                (whole && proxy["synced"] == true).then(|| disco.name().to_owned())
            };
            self.all.iter().find_map(synced)
        })
    }
}

/// The configurations of an example, by name.
pub(crate) fn example_files(example: &str) -> anyhow::Result<Vec<PathBuf>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples").join(example);
    let files =
        fs::read_dir(&folder)?.map(|entry| anyhow::Ok(entry?.path())).collect::<Result<Vec<_>, _>>()?;
    let mut files: Vec<_> =
        files.into_iter().filter(|file| file.extension().is_some_and(|it| it == "yaml")).collect();
    files.sort();
    ensure!(!files.is_empty(), "nothing in {}", folder.display());
    Ok(files)
}

/// The file of an example for the etcd of a test.
fn adapt(text: &str, folder: &Path, name: &str, etcd: &Etcd, more: &str) -> anyhow::Result<String> {
    let endpoints =
        "endpoints: ['http://127.0.0.1:23791', 'http://127.0.0.1:23792', 'http://127.0.0.1:23793']";
    let directory = text.lines().find(|line| line.starts_with("data_dir: "));
    let directory = directory.filter(|_| text.contains(endpoints)).with_context(|| text.to_owned())?;
    let data = format!("data_dir: {}", folder.join(format!("{name}.data")).display());
    let real = format!("endpoints: {:?}\n{more}", etcd.endpoints());
    Ok(text.replace(endpoints, &real).replace(directory, &data))
}
