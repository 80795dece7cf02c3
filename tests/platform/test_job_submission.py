"""Jobs on a real Ray head: every workload, the user's folder, a stop and what goes on after it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.platform.driving import (
    assert_same_weights,
    ledger_of,
    paced_recipe,
    steps_taken,
    wait_until,
    write,
)
from tests.platform.heads import Head, piste_job
from tests.workloads.small_recipes import small_recipe

import piste
from piste import catalog
from piste.config import to_toml

pytest_plugins = ["tests.platform.fixtures"]


QUICK = "quadratic"
WORKLOADS = [
    pytest.param(name, marks=() if name == QUICK else pytest.mark.slow)
    for name in catalog.members("workloads")
]


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_workload_runs_as_a_job(name: str, ray_head: Head, shown_home: Path, tmp_path: Path) -> None:
    recipe = write(tmp_path / "sent" / f"{name}.toml", to_toml(small_recipe(name, tmp_path / "small")))
    code, out, err = piste_job(ray_head, shown_home, "submit", "run", recipe, "--id", f"the-{name}")
    assert code == 0, out + err
    ledger = ledger_of(shown_home)
    job = ledger.jobs.get(f"the-{name}")
    run = ledger.run(job.subject or "")
    assert (job.status, run.status, run.workload) == ("succeeded", "finished", name)
    assert "step" in out  # the log was followed
    here = piste.run(recipe, local=True)
    keys = [key for key in here.metrics if not key.startswith(("time/", "system/"))]
    assert keys
    assert all(ledger.history(run.id, key) == here.history(key) for key in keys)
    again, out, err = piste_job(ray_head, shown_home, "submit", "run", recipe, "--id", f"the-{name}")
    assert again == 0, out + err
    assert len(ledger.runs()) == 2  # the same command under the same id: nothing was sent


DESCENT = """import torch
class HalfSpeed(torch.optim.SGD):
    def __init__(self, params, lr=1.0):
        super().__init__(params, lr=lr / 2)
"""
OWN = """workload = "quadratic"
[problem]
steps = 4
[optimizer]
name = "half_speed.HalfSpeed"
lr = 1.0
[tracking]
system_metrics = false
"""


@pytest.mark.slow
def test_the_users_folder_travels_with_the_job(ray_head: Head, shown_home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "laboratory"
    write(folder / "half_speed.py", DESCENT)
    write(folder / ".git" / "config", "is not sent")
    recipe = write(folder / "recipes" / "own.toml", OWN)
    submit = ("submit", "run", recipe, "--folder", folder, "--id", "own")
    code, out, err = piste_job(ray_head, shown_home, *submit, path=folder)
    assert code == 0, out + err
    ledger = ledger_of(shown_home)
    plain = write(tmp_path / "plain.toml", OWN.replace("half_speed.HalfSpeed", "sgd").replace("1.0", "0.5"))
    run_id = ledger.jobs.get("own").subject or ""
    assert ledger.history(run_id, "train/loss") == piste.run(plain, local=True).history("train/loss")
    write(folder / "half_speed.py", DESCENT.replace("/ 2", "/ 4"))
    code, _, err = piste_job(ray_head, shown_home, *submit, path=folder)
    assert code == 2
    assert err == "piste: job own is there already, with other code: use another --id\n"


@pytest.mark.slow
def test_a_stopped_job_keeps_a_checkpoint_and_goes_on_as_another(
    ray_head: Head, shown_home: Path, tmp_path: Path
) -> None:
    undisturbed = piste.run(paced_recipe(tmp_path / "undisturbed"), local=True)
    folder = tmp_path / "records"
    recipe = paced_recipe(folder, hold_at=13)
    sent = piste_job(ray_head, shown_home, "submit", "run", recipe, "--id", "held", "--no-follow")
    assert sent[0] == 0, sent[2]
    wait_until(lambda: any(step == 13 for step, _ in steps_taken(folder)), "step 13")
    ledger = ledger_of(shown_home)
    run_id = ledger.jobs.get("held").subject or ""
    code, _, err = piste_job(ray_head, shown_home, "submit", "resume", run_id)
    assert (code, err) == (
        2,
        f"piste: {run_id} is in the hands of job held: `piste jobs stop held` ends that\n",
    )
    code, out, err = piste_job(ray_head, shown_home, "jobs", "stop", "held")
    assert code == 0, err
    assert f"piste submit resume {run_id} --address {ray_head.address}" in out
    assert (ledger.jobs.get("held").status, ledger.run(run_id).status) == ("stopped", "interrupted")
    (folder / "go").touch()
    code, out, err = piste_job(ray_head, shown_home, "submit", "resume", run_id, "--id", "goes-on")
    assert code == 0, out + err
    assert ledger.jobs.get("goes-on").subject == run_id
    assert [step for step, _ in steps_taken(folder)] == list(range(1, 21))  # none was taken twice
    assert_same_weights(undisturbed.directory, Path(ledger.run(run_id).directory))


def test_bad_input_is_one_line_and_nothing_is_sent(ray_head: Head, shown_home: Path, tmp_path: Path) -> None:
    refused = {
        ("run", "llm-rge"): "unknown recipe 'llm-rge'; did you mean 'llm-reg'?",
        ("run", "mlp-steps", "--resources.workers", "8"): "needs 8 CPUs, the cluster at",
        ("run", "mlp-steps", "--python", "/nowhere/python"): "has no interpreter /nowhere/python",
        ("sweep", "llm-adamw"): "llm-adamw has no [sweep]",
        ("study", "rge"): "unknown study 'rge'; did you mean 'reg'?",
    }
    processes = {
        arguments: subprocess.Popen(
            [sys.executable, "-m", "piste", "submit", *arguments, "--address", ray_head.address],
            env=ray_head.environment(shown_home),
            stderr=subprocess.PIPE,
            text=True,
        )
        for arguments in refused
    }
    for arguments, process in processes.items():
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2, err
        assert refused[arguments] in err
        assert err.startswith("piste: ")
        assert err.count("\n") == 1
    assert ledger_of(shown_home).jobs.newest() == []
    listed = piste_job(ray_head, shown_home, "jobs", "--json")
    assert listed[1] == '{"jobs": []}\n'


@pytest.mark.parametrize(
    ("token", "said"),
    [("0" * 64, "refuses the token that was found"), (None, "asks for a token, and none was found")],
)
def test_a_wrong_token_is_one_line(
    token: str | None, said: str, ray_head: Head, shown_home: Path, tmp_path: Path
) -> None:
    path = tmp_path / "token"
    if token is not None:
        path.write_text(token)
    done = subprocess.run(
        [sys.executable, "-m", "piste", "submit", "run", "mlp-steps", "--address", ray_head.address],
        env=ray_head.environment(shown_home) | {"RAY_AUTH_TOKEN_PATH": str(path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert "RAY_AUTH_TOKEN_PATH" in done.stderr
    assert done.stderr.count("\n") == 1
