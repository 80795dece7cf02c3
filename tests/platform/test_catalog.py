"""Names to members: a file is a member at once, and nothing is imported before it is asked for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from piste import catalog
from piste.errors import BadInput

OPTIMIZER = '''"""Walks downhill.

More.
"""
import torch


class Walker(torch.optim.Optimizer):
    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})
'''
WORKLOAD = '"""Does nothing."""\nfrom piste.config import Recipe as Config\n\n\ndef train(config, run): ...\n'


def forget() -> None:
    catalog.packages.cache_clear()
    catalog.members.cache_clear()
    importlib.invalidate_caches()
    for name in [n for n in sys.modules if n.partition(".")[0] == "acme_slopes"]:
        del sys.modules[name]


@pytest.fixture
def acme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A third party's installed package, which joins by its entry point."""
    site = tmp_path / "site"
    package = site / "acme_slopes"
    files = {
        "acme_slopes/__init__.py": "",
        "acme_slopes/optimizers/walker.py": OPTIMIZER,
        "acme_slopes/optimizers/explodes.py": '"""Cannot be imported."""\nraise RuntimeError("boom")\n',
        "acme_slopes/optimizers/broken.py": "def half(:\n",
        "acme_slopes/optimizers/_private.py": "",
        "acme_slopes/workloads/idle.py": WORKLOAD,
        "acme_slopes/workloads/bomb.py": f"{WORKLOAD}\nraise RuntimeError\n",
        "acme_slopes/workloads/helper.py": '"""No workload: it has no train."""\n',
        "acme_slopes/recipes/idle-slowly.toml": '# Idles for a while\nworkload = "idle"\n',
        "acme_slopes-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: acme-slopes\nVersion: 1.0\n",
        "acme_slopes-1.0.dist-info/entry_points.txt": "[piste.members]\na = acme_slopes\ngone = not_there\n",
    }
    for name, text in files.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
    monkeypatch.syspath_prepend(str(site))
    forget()
    yield package
    monkeypatch.undo()
    forget()


def test_a_third_partys_files_are_members_without_being_imported(acme: Path) -> None:
    optimizers = catalog.members("optimizers")
    assert optimizers["walker"].summary == "Walks downhill."
    assert optimizers["walker"].path == acme / "optimizers" / "walker.py"
    assert optimizers["explodes"].summary == "Cannot be imported."
    assert optimizers["broken"].summary.startswith("cannot be parsed: ")
    assert "_private" not in optimizers
    assert {"reg", "muon"} <= optimizers.keys()
    workloads = catalog.members("workloads")
    assert {"idle", "bomb", "quadratic", "llm"} <= workloads.keys()
    assert "helper" not in workloads
    assert catalog.members("recipes")["idle-slowly"].summary == "Idles for a while"
    assert not [name for name in sys.modules if name.startswith("acme_slopes.")]


def test_a_new_file_is_a_member_at_once(acme: Path) -> None:
    assert "ski" not in catalog.members("optimizers")
    (acme / "optimizers" / "ski.py").write_text(OPTIMIZER.replace("Walker", "Ski"))
    (acme / "recipes" / "ski-fast.toml").write_text('workload = "idle"\n')
    forget()  # what the next process sees
    assert catalog.load_optimizer("ski").__name__ == "Ski"
    assert catalog.recipe_path("ski-fast") == acme / "recipes" / "ski-fast.toml"


def test_members_load_by_name_and_by_dotted_path(acme: Path) -> None:
    assert catalog.load_optimizer("walker") is catalog.load_optimizer("acme_slopes.optimizers.walker.Walker")
    assert catalog.load_workload("idle") is catalog.load_workload("acme_slopes.workloads.idle")


@pytest.mark.parametrize("name", ["adamw", "AdamW", "ADAMW", "AdAmW"])
def test_torchs_classes_load_in_any_case(name: str) -> None:
    assert catalog.load_optimizer(name) is torch.optim.AdamW


def test_all_of_torchs_optimizers_are_known() -> None:
    known = [c for c in vars(torch.optim).values() if isinstance(c, type) and hasattr(c, "step")]
    known = [c for c in known if c is not torch.optim.Optimizer and issubclass(c, torch.optim.Optimizer)]
    assert len(known) > 10
    piste_owns = catalog.members("optimizers").keys()
    for cls in known:
        if cls.__name__.lower() not in piste_owns:
            assert catalog.load_optimizer(cls.__name__) is cls


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nadamm", "unknown optimizer 'nadamm'; did you mean 'nadam'?"),
        ("rge", "unknown optimizer 'rge'; did you mean 'reg'?"),
        ("optimizer", "unknown optimizer 'optimizer'"),
        ("no_such_package.Thing", "'no_such_package' cannot be imported: no module named 'no_such_package'"),
        ("torch.optim.Missing", "optimizer 'torch.optim.Missing': torch.optim has no 'Missing'"),
        ("torch.nn.Linear", "optimizer 'torch.nn.Linear' is not a torch.optim.Optimizer"),
    ],
)
def test_an_unknown_optimizer_is_one_line(name: str, message: str) -> None:
    with pytest.raises(BadInput) as caught:
        catalog.load_optimizer(name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_member_file_defines_one_optimizer(acme: Path) -> None:
    (acme / "optimizers" / "two.py").write_text(OPTIMIZER + "\n\nclass Second(Walker): ...\n")
    (acme / "optimizers" / "none.py").write_text("from torch.optim import SGD\n")
    forget()
    with pytest.raises(BadInput, match=r"two defines 2 torch\.optim\.Optimizer classes instead of one"):
        catalog.load_optimizer("two")
    with pytest.raises(BadInput, match="none defines 0 "):
        catalog.load_optimizer("none")


def test_unknown_workloads_and_recipes_name_the_nearest() -> None:
    with pytest.raises(BadInput, match=r"^unknown workload 'quadratik'; did you mean 'quadratic'\?$"):
        catalog.load_workload("quadratik")
    with pytest.raises(BadInput, match=r"^unknown recipe 'llm-regg'; did you mean 'llm-reg'\?$"):
        catalog.recipe_path("llm-regg")
    with pytest.raises(BadInput, match=r"workload 'json\.decoder': json\.decoder has no 'Config'"):
        catalog.load_workload("json.decoder")
    with pytest.raises(BadInput, match='r: workload is missing: add `workload = "NAME"`'):
        catalog.recipe_workload({"seed": 1}, "r")


def test_a_path_is_taken_as_it_is() -> None:
    for given in ("here.toml", "some/where"):
        assert catalog.recipe_path(given) == Path(given)
