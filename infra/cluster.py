"""A Ray cluster of three hosts on this machine, with PostgreSQL and MLflow: see infra/README.md."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from infra import hosts, nodes, processes, services
from infra.errors import BadCommand, Impossible, Problem
from infra.layout import (
    CLIENT,
    HEAD,
    HOSTS,
    RAY_HOSTS,
    STORE,
    USUAL_PORTS,
    Layout,
    check_name,
    folder,
    free_ports,
    load,
    locked,
    secret,
)
from infra.one_host import OneHost

READY_SECONDS = 180.0
END_SECONDS = 5.0  # beyond the grace period, for what drains a node to end it


def machine(layout: Layout) -> hosts.Hosts | OneHost:
    """The hosts of a cluster."""
    return (hosts.Hosts if layout.isolated else OneHost)(layout.name, layout.folder)


def up(name: str, plain: bool, cpus: int) -> None:
    """Starts the cluster, or what of it does not run, and waits until it answers.

    Raises:
        Impossible: This machine lacks what it takes.
        Problem: It is up with other settings, or does not answer in time.
    """
    services.check()
    with locked(name):
        layout = load(name) or _plan(name, plain, cpus)
        if (plain and layout.isolated) or layout.cpus != cpus:
            raise Problem("the cluster is up with other settings: end it first (infra/cluster.py down)")
        secret(layout.secrets / "token")
        machine(layout).make(HOSTS)
        services.prepare(layout)
        boot(layout, (STORE, *RAY_HOSTS, CLIENT))
    wait(layout, len(RAY_HOSTS), READY_SECONDS)
    print(f"dashboard {layout.at(HEAD, 'dashboard')}")


def _plan(name: str, plain: bool, cpus: int) -> Layout:
    isolated = not plain
    if isolated:
        try:
            hosts.check()
        except Impossible as reason:
            print(f"{reason}: the hosts are plain processes of this machine", file=sys.stderr)
            isolated = False
    path = folder(name)
    for shared in ("home", "ray"):
        (path / shared).mkdir(exist_ok=True)
    (path / "secrets").mkdir(mode=0o700, exist_ok=True)
    if isolated:
        layout = Layout(name, True, cpus, hosts.Hosts(name, path).make(HOSTS), USUAL_PORTS)
    else:
        wanted = [*USUAL_PORTS, *RAY_HOSTS, "client"]
        ports = dict(zip(wanted, free_ports(len(wanted)), strict=True))
        layout = Layout(name, False, cpus, OneHost(name, path).make(HOSTS), ports)
    layout.save()
    return layout


def boot(layout: Layout, names: Sequence[str]) -> None:
    """Switches hosts on, with their services."""
    known = machine(layout)
    for host in names:
        if known.first_process(host) is not None:
            continue
        run = [nodes.service(layout, host)] if host in RAY_HOSTS else []
        run += services.services(layout) if host == STORE else []
        told = {"services": run, "grace_seconds": nodes.GRACE_SECONDS + END_SECONDS}
        file = layout.folder / host / "services.json"
        file.write_text(json.dumps(told, indent=1), encoding="utf-8")
        supervisor = Path(__file__).with_name("supervisor.py")
        environment = nodes.of_node(layout, host, os.environ)
        known.boot(host, [sys.executable, str(supervisor), str(file)], environment)


def wait(layout: Layout, living: int, seconds: float) -> None:
    """Waits until so many Ray nodes are alive, no more and no less, and MLflow answers.

    Raises:
        Problem: The time is over.
    """
    began = time.monotonic()
    found = answers(layout, living, seconds)
    if not found["complete"]:
        where = f"see {layout.folder}/*/*.log"
        raise Problem(f"after {seconds:g} s the cluster has {_described(found)}: {where}")
    print(f"{_described(found)} after {time.monotonic() - began:.1f} s")


def answers(layout: Layout, living: int = len(RAY_HOSTS), seconds: float = 0.0) -> dict[str, Any]:
    """What answers on the cluster, once it is what is waited for, or after so many seconds."""
    ask = [sys.executable, str(Path(__file__).with_name("answers.py"))]
    ask += [f"http://{layout.at(HEAD, 'dashboard')}", f"http://{layout.at(STORE, 'mlflow')}"]
    done = subprocess.run(
        machine(layout).enter(CLIENT, [*ask, str(living), str(seconds)]),
        env=nodes.of_command(layout, CLIENT, os.environ),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        return {**json.loads(done.stdout), "complete": done.returncode == 0}
    except ValueError:
        raise Problem(f"the cluster cannot be asked from its host {CLIENT}") from None


def _described(found: dict[str, Any]) -> str:
    return f"{len(found['nodes'])} Ray nodes and {'MLflow' if found['mlflow'] else 'no MLflow'}"


def down(name: str) -> None:
    """Ends and removes all of a cluster, also where its folder is lost."""
    with locked(name) as path:
        try:
            hosts.check()
        except Impossible:
            pass  # there can be none
        else:
            hosts.Hosts(name, path).down()
        OneHost(name, path).down()
        shutil.rmtree(path)


def execute(layout: Layout, host: str, command: Sequence[str]) -> None:
    """Becomes a command on a host."""
    words = machine(layout).enter(host, command)
    sys.stdout.flush()
    os.execvpe(words[0], words, nodes.of_command(layout, host, os.environ))


def forward(layout: Layout) -> None:
    """Makes MLflow and the dashboard reachable for a browser on this machine, until it is interrupted."""
    pairs = []
    for name, host, service in (("MLflow", STORE, "mlflow"), ("Ray's dashboard", HEAD, "dashboard")):
        if not layout.isolated:
            print(f"{name}: http://{layout.at(host, service)}")
            continue
        listening = _listen(layout.ports[service])
        print(f"{name}: http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
        pairs.append(f"{listening.detach()}={layout.at(host, service)}")
    if pairs:
        print(f"the dashboard's token: {layout.secrets / 'token'}; Ctrl-C ends this")
        execute(layout, CLIENT, [sys.executable, str(Path(__file__).with_name("forward.py")), *pairs])


def _listen(port: int) -> socket.socket:
    """A socket on loopback that a program which replaces this one keeps; another port where it is taken."""
    listening = socket.socket()
    try:
        listening.bind(("127.0.0.1", port))
    except OSError:
        listening.bind(("127.0.0.1", 0))
    listening.listen()
    listening.set_inheritable(True)
    return listening


def kill(layout: Layout, host: str, text: str | None) -> None:
    """Ends processes of a host with SIGKILL: all at once, or those whose command line has a text.

    Raises:
        Problem: There is none.
    """
    known = machine(layout)
    first = known.first_process(host)
    if text is None:
        processes.end_all(lambda: known.processes(host))
        return
    found = [p for p in known.processes(host) if p != first and text in processes.command_line(p)]
    if not found:
        raise Problem(f"no process on {host} has {text!r} in its command line")
    processes.send(found)
    print(f"{host}: killed {len(found)}")


def preempt(layout: Layout, host: str) -> None:
    """Gives a host notice that it is about to be taken away."""
    first = machine(layout).first_process(host)
    if first is None:
        raise Problem(f"{host} is switched off")
    os.kill(first, signal.SIGTERM)


def status(layout: Layout, as_json: bool) -> None:
    """Prints the hosts, and what answers on them."""
    known, rows = machine(layout), []
    for host in HOSTS:
        running = known.processes(host)
        rows.append(
            {
                "host": host,
                "address": layout.addresses[host],
                "up": known.first_process(host) is not None,
                "cut": known.is_cut(host),
                "processes": len(running),
                "memory_mib": round(processes.memory_mib(running)),
            }
        )
    found = answers(layout)
    if as_json:
        print(json.dumps({"hosts": rows, **found}))
        return
    print(f"{'host':9}{'address':16}{'state':7}{'processes':>9}{'MiB':>7}")
    for row in rows:
        state = "off" if not row["up"] else "cut" if row["cut"] else "up"
        print(f"{row['host']:9}{row['address']:16}{state:7}{row['processes']:9}{row['memory_mib']:7}")
    print(_described(found))


def environment(layout: Layout, host: str) -> None:
    """Prints what a command on a host is told of the cluster, for a shell."""
    for key, value in sorted(nodes.of_command(layout, host, {}).items()):
        print(f"export {key}={shlex.quote(value)}")


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Reads a command line."""
    parser = argparse.ArgumentParser(prog="infra/cluster.py", description=__doc__, allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, help: str, host: bool = True) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=help, description=help, allow_abbrev=False)
        if host:
            added.add_argument("host", choices=HOSTS)
        return added

    started = verb("up", "start the cluster, or what of it is switched off", host=False)
    started.add_argument("--processes", action="store_true", help="plain processes instead of namespaces")
    started.add_argument("--cpus", type=int, default=1, help="of each of the two workers (1)")
    verb("down", "end and remove all of it", host=False)
    waiting = verb("wait", "until so many Ray nodes are alive and MLflow answers", host=False)
    waiting.add_argument("--nodes", type=int, default=len(RAY_HOSTS), help=f"({len(RAY_HOSTS)})")
    waiting.add_argument("--seconds", type=float, default=READY_SECONDS, help=f"({READY_SECONDS:g})")
    shown = verb("status", "what there is and what answers", host=False)
    shown.add_argument("--json", action="store_true", help="on one line")
    told = verbs.add_parser("environment", help="what a command on a host is told, for a shell")
    told.add_argument("host", choices=HOSTS, nargs="?", default=CLIENT)
    verb("exec", "run a command on a host").add_argument("command", nargs=argparse.REMAINDER)
    verb("forward", "MLflow and Ray's dashboard for a browser on this machine", host=False)
    verb("cut", "pull a host's network cable")
    verb("heal", "plug it in again")
    text = verb("kill", "power a host off, or SIGKILL the processes on it that have a text")
    text.add_argument("text", nargs="?", help="in the command line")
    verb("boot", "switch a host on again, with its services")
    verb("preempt", f"SIGTERM: the host drains its Ray node for at most {nodes.GRACE_SECONDS} s, and ends")
    return parser.parse_args(words)


def run(name: str, asked: argparse.Namespace) -> None:
    """Does what a command line asks for.

    Raises:
        Problem: It cannot be done.
    """
    check_name(name)
    if asked.verb == "up":
        up(name, asked.processes, asked.cpus)
        return
    if asked.verb == "down":
        down(name)
        return
    layout = load(name)
    if layout is None:
        raise BadCommand(f"no cluster {name!r} is up: infra/cluster.py up")
    if asked.verb == "exec" and not asked.command:
        raise BadCommand("exec: name a command after the host")
    verbs: dict[str, Callable[[], None]] = {
        "wait": lambda: wait(layout, asked.nodes, asked.seconds),
        "status": lambda: status(layout, asked.json),
        "environment": lambda: environment(layout, asked.host),
        "exec": lambda: execute(layout, asked.host, asked.command),
        "forward": lambda: forward(layout),
        "cut": lambda: machine(layout).cut(asked.host),
        "heal": lambda: machine(layout).heal(asked.host),
        "kill": lambda: kill(layout, asked.host, asked.text),
        "boot": lambda: boot(layout, [asked.host]),
        "preempt": lambda: preempt(layout, asked.host),
    }
    verbs[asked.verb]()


def main() -> int:
    """Runs a command line; the exit code."""
    try:
        run(os.environ.get("PISTE_CLUSTER", "piste"), parse(sys.argv[1:]))
    except Problem as problem:
        print(problem, file=sys.stderr)
        return problem.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
