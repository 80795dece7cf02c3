"""A disk that fills up under the ledger or the checkpoints: said in one line, and nothing is lost."""

from __future__ import annotations

import functools
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.faults.disturbed import HELD, STEPS, assert_whole, resumed, rows_of, start_run
from tests.platform.driving import (
    assert_same_weights,
    done_again,
    end,
    ledger_of,
    paced_recipe,
    steps_taken,
    wait_until,
)

import piste
from piste.buffer import MetricBuffer
from piste.errors import PisteError
from piste.ledger import open_ledger

pytest_plugins = ["tests.platform.fixtures"]
MIB = 2**20


class SmallDisk:
    """A file system of one MiB.

    Args:
        path: Where it is mounted.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._filler = path / "filler"

    def fill(self) -> None:
        """Leaves no byte free."""
        with self._filler.open("wb", buffering=0) as file:
            for size in (4096, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    pass

    def free(self) -> None:
        """Takes away what fills it."""
        self._filler.unlink()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A small disk, where this user may mount one."""
    path = tmp_path / "small"
    path.mkdir()
    tool = shutil.which("mount")
    command = [tool or "mount", "-t", "tmpfs", "-o", f"size={MIB}", "tmpfs", str(path)]
    if tool is None or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("a small disk is mounted by root alone")
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.mark.fault
def test_a_full_disk_under_the_checkpoints_ends_a_run_that_is_resumed(
    two: tuple[Path, str], shown_home: Path, tmp_path: Path, small_disk: SmallDisk
) -> None:
    (shown_home / "runs").symlink_to(small_disk.path)
    folder = tmp_path / "records"
    process = start_run(shown_home, folder)
    small_disk.fill()
    (folder / "go").touch()
    code, _, err = end(process)
    assert code == 1, err
    for words in ("000000015 cannot be written: No space left on device", "free space", "piste resume"):
        assert words in err
    assert "Traceback" not in err
    [row] = ledger_of(shown_home).runs()
    assert row.status == "failed"
    assert "No space left on device" in (row.error or "")
    small_disk.free()
    resumed(shown_home, row.id)
    assert_whole(shown_home, row.id, two, folder)


def test_a_run_waits_for_a_full_ledger_and_goes_on_when_it_is_freed(
    piste_home: Path, tmp_path: Path, small_disk: SmallDisk, no_view: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its next checkpoint it waits; what it has logged since the disk was full is there in the end."""
    monkeypatch.setenv("PISTE_LEDGER", f"sqlite:///{small_disk.path / 'ledger.db'}")
    folder = tmp_path / "records"
    recipe = paced_recipe(folder, hold_at=HELD)

    def disturb() -> None:
        wait_until(lambda: any(step == HELD for step, _ in steps_taken(folder)), f"step {HELD}")
        small_disk.fill()
        (folder / "go").touch()
        wait_until(lambda: any(step == 15 for step, _ in steps_taken(folder)), "the step of a checkpoint")
        wait_until(lambda: refused.is_set(), "the ledger has refused")
        small_disk.free()

    refused = threading.Event()
    apply = piste.ledger.Ledger.apply

    def watched(self: piste.ledger.Ledger, message: piste.ledger.Message) -> int:
        try:
            return apply(self, message)
        except PisteError:
            refused.set()
            raise

    monkeypatch.setattr("piste.ledger.Ledger.apply", watched)
    disturber = threading.Thread(target=disturb)
    disturber.start()
    result = piste.run(recipe, local=True)
    disturber.join()
    assert (result.status, open_ledger().run(result.id).attempt) == ("finished", 1)
    assert rows_of(open_ledger(), result.id) == STEPS
    assert [step for step, _ in steps_taken(folder)] == list(range(1, STEPS + 1))
    assert_same_weights(result.directory, piste.run(recipe, local=True).directory)


def test_a_run_that_has_waited_too_long_for_a_full_ledger_is_resumed(
    piste_home: Path, tmp_path: Path, small_disk: SmallDisk, no_view: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PISTE_LEDGER", f"sqlite:///{small_disk.path / 'ledger.db'}")
    monkeypatch.setattr("piste.workload.MetricBuffer", functools.partial(MetricBuffer, retry_seconds=0.5))
    folder = tmp_path / "records"
    recipe = paced_recipe(folder, hold_at=HELD)

    def disturb() -> None:
        wait_until(lambda: any(step == HELD for step, _ in steps_taken(folder)), f"step {HELD}")
        small_disk.fill()
        (folder / "go").touch()

    disturber = threading.Thread(target=disturb)
    disturber.start()
    with pytest.raises(PisteError, match="full: free disk space, then `piste resume` continues") as caught:
        piste.run(recipe, local=True)
    disturber.join()
    assert "\n" not in str(caught.value)
    small_disk.free()
    [row] = open_ledger().runs()
    result = piste.resume(row.id, local=True)
    assert rows_of(open_ledger(), row.id) == STEPS
    assert open_ledger().run(row.id).recomputed_different == 0
    assert done_again(folder) <= 5
    whole = piste.run(recipe, local=True)
    assert result.history("train/loss") == whole.history("train/loss")
    assert_same_weights(result.directory, whole.directory)
