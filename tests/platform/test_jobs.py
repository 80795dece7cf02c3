"""Jobs against a cluster in memory: sent once, recorded before Ray has them, kept when Ray forgets them."""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from piste import cluster_preflight, jobs, probe
from piste.cli import main
from piste.clusters import Cluster
from piste.config import Recipe, Resources
from piste.errors import BadInput, PisteError
from piste.home import home
from piste.ledger import Job, Ledger, open_ledger, without_password
from piste.running import load_recipe


class JobStatus(enum.Enum):
    """What Ray says of a job. Its own class would import Ray, which reads its settings then."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    STOPPED = "STOPPED"

    def is_terminal(self) -> bool:
        return self not in {JobStatus.PENDING, JobStatus.RUNNING}


HERE = {"python": "3.11.7", "ray": "2.60.0", "torch": "2.13.0"}


@dataclass
class Ray:
    """The job client of a cluster in memory; what it is to do wrong is said in `faults`, next one first."""

    jobs: dict[str, SimpleNamespace] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    probes: int = 0
    answers: list[dict[str, Any]] = field(default_factory=list)

    def submit_job(self, *, submission_id: str, runtime_env: dict[str, Any], **given: Any) -> str:
        fault = self.faults.pop(0) if self.faults else ""
        if fault == "refused":
            raise RuntimeError("Request failed with status code 500: No available agent to submit job")
        if submission_id in self.jobs:
            raise RuntimeError(
                f"Traceback ...\nValueError: Job with submission_id {submission_id} already exists."
            )
        made = SimpleNamespace(status=JobStatus.PENDING, message=None, metadata=given.get("metadata"))
        made.given = {"runtime_env": runtime_env, **given}
        self.jobs[submission_id] = made
        if submission_id.startswith("piste-probe"):
            self.probes += 1
            made.status = JobStatus.SUCCEEDED
        elif fault == "answer lost":
            raise ConnectionError("the connection was closed")
        return submission_id

    def get_job_info(self, job_id: str) -> SimpleNamespace:
        if job_id not in self.jobs:
            raise RuntimeError(f"Request failed with status code 404: Job {job_id} does not exist.")
        return self.jobs[job_id]

    def get_job_status(self, job_id: str) -> JobStatus:
        return self.get_job_info(job_id).status  # type: ignore[no-any-return]

    def get_job_logs(self, job_id: str) -> str:
        return f"a line before\n{probe.MARK}{json.dumps(self.answers)}\n"

    def delete_job(self, job_id: str) -> None:
        del self.jobs[job_id]

    def stop_job(self, job_id: str) -> None:
        self.jobs[job_id].status = JobStatus.STOPPED


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    monkeypatch.setattr("piste.cluster_preflight.LIBRARIES", ("ray", "torch"))
    monkeypatch.setattr("platform.python_version", lambda: HERE["python"])
    monkeypatch.setattr("importlib.metadata.version", HERE.__getitem__)
    return Ray(answers=[answer()])


def answer(host: str = "a", python: str = "3.11.2", problems: tuple[str, ...] = (), **versions: Any) -> Any:
    there = {name: v for name, v in HERE.items() if name != "python"} | versions
    return {"host": host, "python": python, "versions": there, "problems": list(problems)}


def cluster(ray: Ray, nodes: tuple[str, ...] = ("head",), cpus: float = 4.0, gpus: float = 0.0) -> Cluster:
    return Cluster("http://head:8265", "token", ray, nodes, cpus, gpus)


def submit(ledger: Ledger, there: Cluster, *command: str, **given: Any) -> Job:
    given = {"job_id": "j", "resources": Resources(), "tell": given.pop("tell", print)} | given
    return jobs.submit(ledger, there, command or ("run", "mlp-steps"), **given)


def test_a_job_is_in_the_ledger_and_on_the_cluster_under_one_id(ray: Ray) -> None:
    ledger = open_ledger()
    more = {"python": "/opt/python", "driver_cpus": 1.0, "resources": Resources(grace_seconds=90.0)}
    job = submit(ledger, cluster(ray), "run", "mlp-steps", "--seed=3", **more)
    assert (job.status, job.address, job.session) == ("sent", "http://head:8265", "head")
    given = ray.jobs["j"].given
    assert given["entrypoint"] == "/opt/python -m piste.job_driver run mlp-steps --seed=3"
    assert given["entrypoint_num_cpus"] == 1.0
    names = [Path(path).name for path in given["runtime_env"]["py_modules"]]
    assert names == ["piste", "piste_algorithms", "piste_workloads"]
    environment = given["runtime_env"]["env_vars"]
    assert (environment["PISTE_JOB"], environment["RAY_AUTH_MODE"]) == ("j", "token")
    assert float(environment["RAY_JOB_STOP_WAIT_TIME_S"]) > 90.0  # the recipe's own grace period


def test_the_same_command_is_sent_once_and_another_is_refused(ray: Ray) -> None:
    ledger, there = open_ledger(), cluster(ray)
    first = submit(ledger, there)
    sent = ray.jobs["j"]
    assert submit(ledger, there).created == first.created
    assert ray.jobs == {"j": sent}
    for other, said in {
        ("run", "mlp-steps", "--seed=1"): r"another command \(piste run mlp-steps\)",
        ("sweep", "mlp-steps"): r"another command \(piste run mlp-steps\)",
    }.items():
        with pytest.raises(BadInput, match=f"job j is there already, with {said}: use another --id"):
            submit(ledger, there, *other)
    with pytest.raises(BadInput, match="with other python and driver cpus: use"):
        submit(ledger, there, python="/other", driver_cpus=2.0)


@pytest.mark.parametrize("faults", [["refused"], ["answer lost"], ["refused", "answer lost"]])
def test_a_submission_is_repeated_until_it_has_arrived_and_arrives_once(ray: Ray, faults: list[str]) -> None:
    ledger = open_ledger()
    ray.faults = ["", *faults]  # the probe goes first
    assert submit(ledger, cluster(ray)).status == "sent"
    assert list(ray.jobs) == ["j"]


def test_a_job_of_that_id_from_another_ledger_is_not_taken_for_this_one(ray: Ray) -> None:
    ray.jobs["j"] = SimpleNamespace(status=JobStatus.RUNNING, message=None, metadata={"piste": "other"})
    with pytest.raises(BadInput, match="job j is on the cluster already: use another --id"):
        submit(open_ledger(), cluster(ray))


def test_what_is_refused_is_forgotten_and_nothing_is_sent(ray: Ray) -> None:
    ledger = open_ledger()
    big = Resources(workers=2, cpus_per_worker=3)
    refused: dict[str, tuple[Cluster, dict[str, Any]]] = {
        r"the job needs 6 CPUs, the cluster at http://head:8265 has 4": (cluster(ray), {"resources": big}),
        r"the job needs 2 GPUs, .* has 1:": (
            cluster(ray, gpus=1.0),
            {"resources": Resources(workers=2, gpus_per_worker=1.0)},
        ),
        r"has 2 nodes: a run on several hosts needs a ledger in PostgreSQL .* and an MLflow server": (
            cluster(ray, nodes=("head", "worker")),
            {},
        ),
        "no such folder": (cluster(ray), {"folder": Path("/nowhere/at/all")}),
    }
    for said, (there, given) in refused.items():
        with pytest.raises(BadInput, match=said):
            submit(ledger, there, **given)
    assert (ray.jobs, ledger.jobs.newest()) == ({}, [])


@pytest.mark.parametrize(
    ("there", "said"),
    [
        (answer("b", python="3.10.2"), "Python 3.10.2 on b, 3.11.7 here: name another interpreter"),
        (answer("b", ray="2.59.0"), "ray 2.59.0 on b, 2.60.0 here: install the same on both"),
        (answer("b", torch=None), r"torch is not installed on b \(here: 2.13.0\)"),
        (answer("b", problems=("PISTE_LEDGER: refused",)), "from b: PISTE_LEDGER: refused"),
    ],
)
def test_a_host_that_cannot_run_it_is_named(ray: Ray, there: dict[str, Any], said: str) -> None:
    ledger = open_ledger()
    ray.answers = [answer(), there]
    with pytest.raises(BadInput, match=said):
        submit(ledger, cluster(ray))
    assert (list(ray.jobs), ledger.jobs.newest()) == ([], [])


def test_a_harmless_difference_is_told_and_the_cluster_is_asked_once(ray: Ray) -> None:
    ledger, told = open_ledger(), list[str]()
    ray.answers = [answer(), answer("b", torch="2.12.0")]
    for name in ("j", "k"):
        submit(ledger, cluster(ray), job_id=name, tell=told.append)
    assert told == ["torch 2.12.0 on b, 2.13.0 here"] * 2
    assert ray.probes == 1
    submit(ledger, cluster(ray, nodes=("another head",)), job_id="l", tell=told.append)
    assert ray.probes == 2


def test_passwords_stay_here(monkeypatch: pytest.MonkeyPatch, ray: Ray) -> None:
    ledger = open_ledger()
    monkeypatch.setattr(
        ledger, "url", "postgresql+psycopg://piste:hidden@store/ledger?password=hidden&sslmode=require"
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hidden@store:5000/base")
    assert jobs.settings(ledger) == {
        "PISTE_HOME": str(home()),
        "PISTE_LEDGER": "postgresql+psycopg://piste@store/ledger?sslmode=require",
        "MLFLOW_TRACKING_URI": "http://store:5000/base",
    }
    submit(ledger, cluster(ray, nodes=("head", "worker")))
    assert "hidden" not in repr(ray.jobs["j"])
    assert "hidden" not in repr(vars(ledger.jobs.get("j")))


@pytest.mark.parametrize(
    ("url", "plain", "secret"),
    [
        ("postgresql://me:a%40b@store:5433/l", "postgresql://me@store:5433/l", {"PGPASSWORD": "a@b"}),
        ("postgresql://store/l?password=x&user=me", "postgresql://store/l?user=me", {"PGPASSWORD": "x"}),
        ("postgresql://me@store/l", "postgresql://me@store/l", {}),
        ("sqlite:////tmp/a b/ledger.db", "sqlite:////tmp/a b/ledger.db", {}),
    ],
)
def test_a_ledgers_password_is_taken_out_of_its_url(url: str, plain: str, secret: dict[str, str]) -> None:
    assert without_password(url) == (plain, secret)


STATES = {
    JobStatus.RUNNING: ("running", None),
    JobStatus.SUCCEEDED: ("succeeded", None),
    JobStatus.STOPPED: ("stopped", None),
    JobStatus.FAILED: ("failed", "the driver died"),
}


@pytest.mark.parametrize("state", STATES)
def test_the_ledger_learns_what_the_cluster_knows(ray: Ray, state: JobStatus) -> None:
    ledger, there = open_ledger(), cluster(ray)
    job = submit(ledger, there)
    ray.jobs["j"].status, ray.jobs["j"].message = state, "the driver died\nand left a traceback"
    job = jobs.reconcile(ledger, job, there)
    assert (job.status, job.error) == STATES[state]
    if state.is_terminal():
        ray.jobs.clear()
        assert jobs.reconcile(ledger, job, there).status == job.status  # what has ended is not lost


def run_of(ledger: Ledger, monkeypatch: pytest.MonkeyPatch, run_id: str, job: str) -> None:
    """A run that a job's driver has made and begun."""
    columns = dict.fromkeys(("recipe", "workload", "identity", "cell", "directory"), "x")
    ledger.create(id=run_id, seed=0, config={}, provenance={}, **columns)
    monkeypatch.setenv("PISTE_JOB", job)
    ledger.claim(run_id, "elsewhere:1")
    monkeypatch.delenv("PISTE_JOB")
    ledger.begin_attempt(run_id)


def test_a_job_that_its_head_has_forgotten_is_lost_and_can_be_resumed(
    ray: Ray, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, there = open_ledger(), cluster(ray)
    job = submit(ledger, there)
    run_of(ledger, monkeypatch, "run-1", "j")
    ray.jobs["j"].status = JobStatus.RUNNING
    assert jobs.reconcile(ledger, job, there).status == "running"
    ray.jobs.clear()
    lost = jobs.reconcile(ledger, ledger.jobs.get("j"), there)
    assert (lost.status, lost.subject) == ("lost", "run-1")
    assert (lost.error or "").endswith("does not know it any more")
    assert (ledger.run("run-1").status, ledger.run("run-1").error) == (
        "interrupted",
        "its job j has ended: lost",
    )
    assert jobs.resume_command(lost) == "piste submit resume run-1 --address http://head:8265"


def test_a_new_head_is_named_as_the_reason(ray: Ray) -> None:
    ledger = open_ledger()
    job = submit(ledger, cluster(ray))
    ray.jobs.clear()
    lost = jobs.reconcile(ledger, job, cluster(ray, nodes=("a new head",)))
    assert (lost.status, lost.error) == ("lost", "the cluster at http://head:8265 has another head")


def test_what_the_driver_has_recorded_counts_more_than_what_a_cluster_says(ray: Ray) -> None:
    ledger, there = open_ledger(), cluster(ray)
    job = submit(ledger, there)
    ledger.jobs.set_status("j", "succeeded")
    ray.jobs["j"].status = JobStatus.FAILED
    assert jobs.reconcile(ledger, job, there).status == "succeeded"
    for status in ("sent", "running", "lost"):
        ledger.jobs.set_status("j", status)
    assert ledger.jobs.get("j").status == "succeeded"


def test_a_cluster_that_does_not_answer_says_nothing_of_its_jobs(
    ray: Ray, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, there = open_ledger(), cluster(ray)
    job = submit(ledger, there)

    def unreachable(job_id: str) -> SimpleNamespace:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(ray, "get_job_info", unreachable)
    with pytest.raises(PisteError, match="does not answer: no route to host"):
        jobs.reconcile(ledger, job, there)
    assert ledger.jobs.get("j").status == "sent"


def test_stop_ends_a_job_and_leaves_its_run_to_be_resumed(ray: Ray, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, there = open_ledger(), cluster(ray)
    job = submit(ledger, there)
    run_of(ledger, monkeypatch, "run-1", "j")
    assert jobs.stop(ledger, job, there).status == "stopped"
    assert ledger.run("run-1").status == "interrupted"


@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        (("sweep", "r"), "lost", "piste submit sweep --resume made --address http://head:8265"),
        (("study", "reg"), "failed", "piste submit study made --address http://head:8265"),
        (("resume", "made"), "stopped", "piste submit resume made --address http://head:8265"),
        (("run", "r"), "succeeded", None),
    ],
)
def test_how_to_go_on(ray: Ray, command: tuple[str, ...], status: str, said: str | None) -> None:
    ledger, there = open_ledger(), cluster(ray)
    submit(ledger, there, *command)
    ledger.jobs.set_subject("j", "made")
    ledger.jobs.set_subject("j", "made by somebody else")
    ledger.jobs.set_status("j", status)
    assert jobs.resume_command(ledger.jobs.get("j")) == said


def test_a_probe_finds_what_a_host_cannot_reach(tmp_path: Path) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    ledger.jobs.create(id="j", request={}, content="c", address="a", session="s")
    question = {
        "libraries": ["torch", "no-such-library"],
        "ledger": ledger.url,
        "job": "j",
        "tracking": "sqlite:///x",
        "home": str(tmp_path / "home"),
        "token": ".probe",
        "nodes": 1,
    }
    [found] = probe.ask_all(question)
    assert found["problems"] == []
    assert found["versions"]["no-such-library"] is None
    assert found["versions"]["torch"]
    assert not (tmp_path / "home" / ".probe").exists()
    [found] = probe.ask_all(question | {"job": "k", "tracking": "http://127.0.0.1:1"})
    assert [line.partition(":")[0] for line in found["problems"]] == ["PISTE_LEDGER", "MLFLOW_TRACKING_URI"]
    assert "another ledger than this one" in found["problems"][0]
    missing = probe.survey(question | {"first": False, "ledger": f"sqlite:///{tmp_path}/none.db"})
    assert "does not exist there" in missing["problems"][0]
    assert "is not shared" in missing["problems"][1]
    assert not (tmp_path / "none.db").exists()


def test_streams_are_sent_as_a_job_and_a_recipe_without_any_is_not(
    ray: Ray, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("piste.job_command.connect", lambda address: cluster(ray))
    monkeypatch.setattr("piste.job_command.version", HERE.__getitem__)
    words = ["--address", "http://head:8265", "--no-follow"]
    asked = ["stream", "stream-null", "--name", "nightly", "--resources.workers", "1"]
    assert main(["submit", *asked, "--id", "sent", *words]) == 0
    job = open_ledger().jobs.get("sent")
    assert job.request["command"] == [*asked[:-2], "--resources.workers=1"]
    open_ledger().jobs.set_subject("sent", "nightly")
    open_ledger().jobs.set_status("sent", "failed", "why")
    again = jobs.resume_command(open_ledger().jobs.get("sent"))
    assert again == "piste submit resume nightly --address http://head:8265"
    assert main(["submit", "stream", "mlp-steps", "--id", "none", *words]) == 2
    assert "'mlp' has no streams: `piste run mlp-steps` runs it" in capsys.readouterr().err


def test_an_old_answer_is_not_taken(ray: Ray, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = open_ledger()
    submit(ledger, cluster(ray), job_id="j")
    monkeypatch.setattr(cluster_preflight, "FRESH_SECONDS", 0.0)
    submit(ledger, cluster(ray), job_id="k")
    assert ray.probes == 2


def test_a_recipe_is_validated_once_for_all_jobs_of_the_same_code(
    ray: Ray, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("piste.job_command.connect", lambda address: cluster(ray))
    monkeypatch.setattr("piste.job_command.version", HERE.__getitem__)
    validated: list[dict[str, Any]] = []

    def load(recipe: str, fields: dict[str, Any]) -> Recipe:
        validated.append(fields)
        return load_recipe(recipe, fields)

    monkeypatch.setattr("piste.running.load_recipe", load)
    (tmp_path / "mine").mkdir()
    recipe = tmp_path / "mine" / "bowl.toml"

    def send(name: str, *fields: str) -> int:
        words = ["submit", "run", str(recipe), *fields, "--id", name, "--no-follow"]
        return main([*words, "--address", "http://head:8265"])

    recipe.write_text('workload = "quadratic"\n[resources]\nworkers = 2\n')
    assert [send("a"), send("b"), send("c", "--seed", "1"), send("d", "--seed", "1")] == [0, 0, 0, 0]
    assert validated == [{}, {"seed": 1}]
    recipe.write_text('workload = "quadratic"\n[resources]\nworkers = 5\n')  # other bytes: asked again
    assert [send("e"), send("e")] == [2, 2]
    assert "needs 5 CPUs" in capsys.readouterr().err  # of resources that are remembered
    assert len(validated) == 3
    recipe.write_text('workload = "quadratic"\n[resource]\n')
    assert [send("f"), send("f")] == [2, 2]  # what is wrong is found every time
    assert len(validated) == 5
