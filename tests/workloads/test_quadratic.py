import pytest
import torch
from tests.workloads.local_runs import RunOf

from piste.config import Checkpoints, Optimizer
from piste_workloads import quadratic


def bowl(**problem: float) -> quadratic.Quadratic:
    return quadratic.Quadratic(quadratic.Problem.model_validate(problem), torch.Generator().manual_seed(0))


def config(lr: float = 1.0, name: str = "sgd", **problem: float) -> quadratic.Config:
    return quadratic.Config(
        optimizer=Optimizer.model_validate({"name": name, "lr": lr}),
        problem=quadratic.Problem.model_validate(problem),
    )


def test_condition_number_and_largest_eigenvalue_are_as_stated() -> None:
    eigenvalues = torch.linalg.eigvalsh(bowl(dimension=7, condition=50.0).matrix)
    assert float(eigenvalues[-1]) == pytest.approx(1.0)
    assert float(eigenvalues[-1] / eigenvalues[0]) == pytest.approx(50.0)


def test_the_excess_equals_the_quadratic_less_its_minimum() -> None:
    model = bowl(dimension=5, condition=20.0)
    with torch.no_grad():
        model.x.copy_(torch.arange(5.0))
        b = model.matrix @ model.minimum
        value = 0.5 * model.x @ model.matrix @ model.x - b @ model.x
        lowest = -0.5 * b @ model.minimum
        assert float(model()) == pytest.approx(float(value - lowest), rel=1e-12)


@pytest.mark.parametrize("lr", [0.3, 1.0, 20.0 / 11.0, 1.95])
def test_gradient_descent_contracts_by_the_closed_form(lr: float, run_of: RunOf) -> None:
    steps = 20
    losses = run_of(quadratic, config(lr, dimension=6, condition=10.0, steps=steps)).history("train/loss")
    model = bowl(dimension=6, condition=10.0)
    # In the eigenbasis the offset is (1 - lr lambda_i)^k times the first one, which is -x*.
    eigenvalues, vectors = torch.linalg.eigh(model.matrix)
    first = vectors.T @ model.minimum
    expected = [
        float(0.5 * (eigenvalues * (first * (1 - lr * eigenvalues) ** k) ** 2).sum())
        for k in range(steps + 1)
    ]
    assert [step for step, _ in losses] == list(range(1, steps + 2))
    assert [loss for _, loss in losses] == pytest.approx(expected, rel=1e-9)


def test_the_best_step_size_contracts_by_its_factor(run_of: RunOf) -> None:
    condition, steps = 10.0, 60
    lr = 2.0 / (1.0 + 1.0 / condition)
    losses = run_of(quadratic, config(lr, dimension=6, condition=condition, steps=steps)).history(
        "train/loss"
    )
    factor = (condition - 1.0) / (condition + 1.0)
    assert losses[-1][1] / losses[-2][1] == pytest.approx(factor**2, rel=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_stopped_run_goes_on_bit_for_bit(name: str, run_of: RunOf) -> None:
    whole = run_of(quadratic, config(0.5, name, steps=30))
    assert whole.history("train/loss")[-1][1] < whole.history("train/loss")[0][1]
    stopped = run_of(quadratic, config(0.5, name, steps=30), stop_after=11)
    assert len(stopped.history("train/loss")) == 11
    assert stopped.resume().history("train/loss") == whole.history("train/loss")


def test_checkpoints_follow_the_policy(run_of: RunOf) -> None:
    policy = Checkpoints(every=10, keep="all")
    finished = run_of(quadratic, config(steps=25).model_copy(update={"checkpoints": policy}))
    names = [path.name for path in sorted((finished.directory / "checkpoints").glob("step-*"))]
    assert names == ["step-000000010", "step-000000020", "step-000000025"]
