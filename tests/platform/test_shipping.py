"""What a job takes along: what is sent, what is not, and the hash of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.platform.driving import write

from piste import catalog, shipping
from piste.errors import BadInput


def folder(root: Path) -> Path:
    made = root / "laboratory"
    write(made / "mine.py", "x = 1")
    write(made / "data" / "small.csv", "1,2")
    for hidden in (".git/config", "__pycache__/mine.pyc", "mine.pyc", ".env", "venv/bin/python"):
        write(made / hidden, "not sent")
    write(made / "environment" / "pyvenv.cfg", "not sent")
    write(made / "environment" / "lib.py", "not sent")
    return made


def pack(root: Path, source: Path | None, name: str = "a") -> shipping.Shipment:
    target = root / name
    target.mkdir()
    return shipping.pack(source, target)


def test_hidden_files_caches_and_environments_stay_here(tmp_path: Path) -> None:
    packed = pack(tmp_path, folder(tmp_path))
    assert packed.folder == "laboratory"
    [mine] = [path for path in packed.modules if path.name == "laboratory"]
    sent = {path.relative_to(mine).as_posix() for path in mine.rglob("*") if path.is_file()}
    assert sent == {"mine.py", "data/small.csv"}
    assert {path.name for path in packed.modules} == {"piste", *catalog.packages(), "laboratory"}
    assert all((path / "__init__.py").exists() for path in packed.modules if path != mine)
    assert (tmp_path / "a" / "piste_workloads" / "recipes" / "llm-reg.toml").exists()


def test_the_hash_is_of_what_is_sent_alone(tmp_path: Path) -> None:
    source = folder(tmp_path)
    first = pack(tmp_path, source, "a").content
    write(source / ".env", "other")
    assert pack(tmp_path, source, "b").content == first
    write(source / "data" / "small.csv", "1,3")
    assert pack(tmp_path, source, "c").content != first
    assert pack(tmp_path, None, "d").content != first


def test_a_folder_that_is_too_large_is_named_with_its_largest_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder(tmp_path)
    for name, size in {"one.bin": 3, "two.bin": 5, "three.bin": 2, "four.bin": 1}.items():
        (source / name).write_bytes(bytes(size * 2**20))
    monkeypatch.setattr(shipping, "UPLOAD_LIMIT", 8 * 2**20)
    with pytest.raises(BadInput) as refused:
        pack(tmp_path, source)
    assert "11 MiB are too much to send, the limit is 8 MiB" in str(refused.value)
    assert "two.bin (5 MiB), one.bin (3 MiB), three.bin (2 MiB): move data" in str(refused.value)


def test_a_folder_that_would_hide_a_package_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "piste" / "mine.py", "")
    with pytest.raises(BadInput, match="would hide that package"):
        pack(tmp_path, tmp_path / "piste")
