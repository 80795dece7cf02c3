"""A cluster of three hosts, and what it survives."""

from __future__ import annotations

import json
import shutil
import signal
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from infra import processes
from infra.errors import Impossible
from infra.hosts import check
from infra.layout import WORKERS
from infra.nodes import PLACE
from tests.infra.clusters import ClusterCommand, every_process, leftovers, own_name, started
from tests.platform.driving import paced_recipe, steps_taken, wait_until

pytestmark = pytest.mark.fault

NOTICED_SECONDS = 15.0
CUT_SECONDS = 20.0
RAYLET = "/raylet/raylet "
# An actor on worker2 that is busy until a file is there.
HOLDING = """
import pathlib, ray, time
ray.init()

@ray.remote(resources={"worker2": 0.1}, num_cpus=0)
class Holding:
    def hold(self, path):
        while not pathlib.Path(path).exists():
            time.sleep(0.05)

ray.get(Holding.remote().hold.remote("PATH"))
print("held to the end")
"""
# Takes a lock in the ledger's database, and keeps it in a transaction that goes on.
LOCKING = """
import time, psycopg
with psycopg.connect("host=store user=piste dbname=ledger") as connection:
    connection.execute("select pg_advisory_xact_lock(7)")
    print("locked", flush=True)
    while "{then}":
        time.sleep(1)
"""
RECORDED = """
import json, mlflow
from piste.ledger import open_ledger
ledger = open_ledger()
[run] = ledger.runs()
client = mlflow.MlflowClient()
places = [experiment.experiment_id for experiment in client.search_experiments()]
[shown] = client.search_runs(places, f"tags.`piste.run_id` = '{run.id}'")
history = client.get_metric_history(shown.info.run_id, "train/loss")
print(json.dumps([run.status, ledger.history(run.id, "train/loss"), [[m.step, m.value] for m in history]]))
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[ClusterCommand]:
    try:
        check()
    except Impossible as reason:
        pytest.skip(str(reason))
    with started(own_name("c")) as made:
        yield made


@pytest.fixture
def whole(cluster: ClusterCommand) -> ClusterCommand:
    """The cluster with all its nodes, as the test before may have left it without some."""
    cluster.tell("wait")
    return cluster


def on(cluster: ClusterCommand, host: str, text: str) -> list[int]:
    """The processes on a host whose command line has a text."""
    here = [p for p in every_process(cluster.name) if processes.setting(p, PLACE) == f"{cluster.name}/{host}"]
    return [pid for pid in here if text in processes.command_line(pid)]


def test_no_password_is_on_a_command_line_or_in_an_environment(whole: ClusterCommand) -> None:
    secrets = [(whole.folder / "secrets" / name).read_text() for name in ("password", "token")]
    assert all(len(secret) >= 32 for secret in secrets)
    running = every_process(whole.name)
    assert len(running) > 20
    for pid in running:
        for file in ("environ", "cmdline"):
            try:
                told = Path(f"/proc/{pid}/{file}").read_text(errors="replace")
            except OSError:
                continue
            assert not [secret for secret in secrets if secret in told], processes.command_line(pid)
    told = whole.tell("environment")
    assert "PISTE_LEDGER=postgresql+psycopg://piste@" in told
    assert not [secret for secret in secrets if secret in told]
    for path in (whole.folder / "secrets").iterdir():
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_run_on_two_hosts_is_in_the_ledger_and_in_mlflow(whole: ClusterCommand) -> None:
    records = whole.folder / "home" / "records"
    recipe = paced_recipe(records, "workers = 2", steps=6)
    whole.tell("exec", "head", "piste", "run", str(recipe))
    assert [step for step, _ in steps_taken(records)] == list(range(1, 7))
    last_line = whole.tell("exec", "client", "python", "-c", RECORDED).splitlines()[-1]
    status, in_ledger, in_mlflow = json.loads(last_line)
    assert status == "finished"
    assert [step for step, _ in in_ledger] == list(range(1, 7))
    assert in_mlflow == in_ledger
    ran_on = {host for host in WORKERS if list(whole.folder.glob(f"{host}/ray/session_*/logs/worker-*.out"))}
    assert ran_on == set(WORKERS)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_raylet_that_has_ended_is_started_again(whole: ClusterCommand, number: signal.Signals) -> None:
    """`ray start --block` takes SIGTERM for its raylet's proper end, and goes on without it."""
    before = whole.nodes("worker2")
    processes.send(on(whole, "worker2", RAYLET), number)
    wait_until(lambda: len(now := whole.nodes("worker2")) == 1 and now != before, "there is a new one")
    whole.seconds_until(3)


def test_a_host_that_is_cut_off_is_noticed_loses_its_locks_and_comes_back(whole: ClusterCommand) -> None:
    with whole.start("exec", "worker2", "python", "-c", LOCKING.format(then="holding")) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with whole.start("wait", "--nodes=2", "--seconds=60") as watching:
            cut = time.monotonic()
            whole.tell("cut", "worker2")
            assert watching.wait(70) == 0
            noticed = time.monotonic() - cut
        assert whole.tell("exec", "client", "python", "-c", LOCKING.format(then="")) == "locked\n"
        freed = time.monotonic() - cut
        holder.kill()
    assert noticed <= NOTICED_SECONDS
    assert freed <= CUT_SECONDS
    assert {row["host"]: row["cut"] for row in whole.status()["hosts"]}["worker2"]
    wait_until(lambda: time.monotonic() - cut >= CUT_SECONDS, "it was cut off long enough")
    whole.tell("heal", "worker2")
    whole.seconds_until(3)


def test_a_host_that_is_to_be_taken_away_ends_what_runs_on_it_first(
    whole: ClusterCommand, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    with whole.start("exec", "head", "python", "-c", HOLDING.replace("PATH", str(go))) as job:
        wait_until(lambda: bool(on(whole, "worker2", "ray::Holding.hold")), "the actor is busy", 60.0)
        whole.tell("preempt", "worker2")
        log = whole.folder / "worker2" / "boot.log"
        wait_until(lambda: "asked to end" in log.read_text(), "the host has got the notice", 10.0)
        assert on(whole, "worker2", RAYLET)
        go.touch()
        assert "held to the end" in job.communicate(timeout=30)[0]
    wait_until(lambda: not on(whole, "worker2", ""), "the host is off", 20.0)
    whole.seconds_until(2)
    whole.tell("boot", "worker2")
    whole.seconds_until(3)


def test_a_killed_head_comes_back_at_its_address_with_all_nodes(whole: ClusterCommand) -> None:
    before = whole.nodes("head")
    assert whole.tell("kill", "head", "/gcs_server") == "head: killed 1\n"
    wait_until(lambda: len(now := whole.nodes("head")) == 1 and now != before, "there is a new one")
    whole.seconds_until(3)


def test_killed_services_of_the_store_come_back_with_what_they_had(whole: ClusterCommand) -> None:
    def runs() -> list[list[str]]:  # name, status, optimizer; their age is another a minute later
        return [line.split()[:3] for line in whole.tell("exec", "client", "piste", "ls", "runs").splitlines()]

    told = runs()
    whole.tell("kill", "store", "/bin/postgres -D")
    whole.tell("kill", "store", "mlflow")
    whole.seconds_until(3)
    assert runs() == told
    assert len(told) > 1


def test_a_browser_outside_reaches_mlflow(whole: ClusterCommand) -> None:
    with whole.start("forward") as forwarding:
        assert forwarding.stdout is not None
        address = forwarding.stdout.readline().split()[-1]
        for _ in range(2):  # not only the first connection
            with urllib.request.urlopen(f"{address}/health", timeout=10) as answer:
                assert answer.read() == b"OK"
        forwarding.terminate()


def test_down_removes_everything_although_the_folder_is_lost(whole: ClusterCommand) -> None:
    """The last one: it ends the cluster of this module."""
    address = whole.status()["hosts"][0]["address"]
    assert leftovers(whole.name, address)
    shutil.rmtree(whole.folder)
    whole.tell("down")
    assert leftovers(whole.name, address) == []
    assert whole.ask("status").returncode == 2


def test_plain_processes_where_namespaces_are_not_to_be_had() -> None:
    with started(own_name("p"), "--processes", "--cpus=2") as plain:
        refused = plain.ask("cut", "worker1")
        assert refused.returncode == 2
        assert refused.stderr.count("\n") == 1
        status = plain.status()
        assert len(set(status["nodes"].values())) == 3
        program = "import ray; ray.init(); print('CPUs:', ray.cluster_resources()['CPU'])"
        job = plain.tell("exec", "client", "ray", "job", "submit", "--", "python", "-c", program)
        assert "CPUs: 4.0\n" in job
        before = plain.nodes("worker1")
        plain.tell("kill", "worker1", RAYLET)
        wait_until(lambda: len(now := plain.nodes("worker1")) == 1 and now != before, "there is a new one")
        address = status["hosts"][0]["address"]
    assert leftovers(plain.name, address) == []
