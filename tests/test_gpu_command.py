"""`make gpu` works at the first try: every piece is rehearsed with narrow models on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

import gpu
import gpu_tables

GOOD: dict[str, Any] = {
    "label": "4,096 patches",
    "unpatched": {"median": {gpu_tables._PREFILL: 0.2, "encoder": 0.1, "language model": 0.1}},
    "merged": {"median": {gpu_tables._PREFILL: 0.1, "encoder": 0.05, "language model": 0.05}},
    "ratio": {gpu_tables._PREFILL: 0.5, "decoding, per token": 0.9, gpu_tables._PEAKS[0]: 0.9},
    "ideal_ratio": 0.5,
    "merge_share": 0.01,
    "decoding_at_equal_kv": 1.0,
}


def command(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    given = [sys.executable, gpu.__file__, "--device", "cpu", "--tiny", "--results", str(folder), *options]
    return subprocess.run(given, capture_output=True, text=True, check=False)


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / f"gpu-{name}.json").read_text())


#: One model with one workload, and those that a CPU has no back-end for.
SHORT = [f"speed-{name}" for name, speed in gpu.SPEEDS.items() if len(speed.loads) == 1 or speed.attention != "sdpa"]


@pytest.mark.parametrize("name", ["kernels", "frames", *SHORT])
def test_a_piece_leaves_its_figures(name: str, tmp_path: Path) -> None:
    """In this process; all of them as `make gpu` runs them at night."""
    file = tmp_path / f"gpu-{name}.json"
    gpu.PIECES[name].run(gpu.Setting("cpu", tiny=True, until=time.time() + 300, file=file))
    assert gpu.is_complete(file)
    assert any(name in line for line in gpu_tables.gpu_section(tmp_path, tmp_path / "none"))


@pytest.mark.nightly
def test_all_pieces_one_after_the_other(tmp_path: Path) -> None:
    done = command(tmp_path, "--seconds", "7200", "--stretch", "60")
    assert done.returncode == 0, done.stdout
    assert done.stdout.split() == [word for name in gpu.PIECES for word in (f"{name}:", "done")]
    again = command(tmp_path)
    assert again.stdout.splitlines() == [f"{name}: there already" for name in gpu.PIECES]
    page = "\n".join(gpu_tables.gpu_section(tmp_path, tmp_path / "none"))
    for name in gpu.PIECES:
        assert f"**{name}** (CPU, a rehearsal" in page
    for speed in (speed for speed in gpu.SPEEDS.values() if speed.attention == "sdpa"):
        assert all(f"| {label} |" in page for label in speed.loads)


def test_where_time_is_up_the_rest_waits_for_another_call(tmp_path: Path) -> None:
    done = command(tmp_path, "--seconds", "1", "--pieces", "check,frames")
    assert done.returncode == 0 and done.stdout.count("no time left; call again") == 2


def test_a_piece_that_is_cut_off_keeps_what_it_has(tmp_path: Path) -> None:
    file = tmp_path / "gpu-frames.json"
    gpu.PIECES["frames"].run(gpu.Setting("cpu", tiny=True, until=0.0, file=file))
    assert not gpu.is_complete(file)
    assert "Not complete" in "\n".join(gpu_tables.gpu_section(tmp_path, tmp_path / "none"))


@pytest.mark.parametrize(
    ("options", "why"),
    [(["--tiny"], "give --results FOLDER"), (["--pieces", "all"], "--pieces has 'all'; choose from check")],
)
def test_what_makes_no_sense_is_refused(options: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(options)
    assert why in capsys.readouterr().err


def test_without_a_device_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_has_cuda", lambda: False)
    assert gpu.main([]) == 1


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({}, []),
        ({"ideal_ratio": 0.47}, ["not ratio"]),
        ({"merge_share": 0.021}, ["not merging"]),
        ({"decoding_at_equal_kv": 1.02}, ["not step"]),
        ({"ratio": {**GOOD["ratio"], gpu_tables._PEAKS[0]: 1.01}}, ["not peak"]),
    ],
)
def test_goals_are_told_apart(change: dict[str, Any], missed: list[str]) -> None:
    row = {**GOOD, **change}
    line = gpu_tables.speed_table([row])[-1]
    assert line.endswith(f"| {', '.join(missed) or 'yes'} |")


def test_only_what_the_machine_lacks_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "PACK", tmp_path)
    for name in ("nobody_has_this-1.0", "transformers-5.24.0", "tokenizers-99.0"):
        with zipfile.ZipFile(tmp_path / f"{name}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name.split('-')[0]}/__init__.py", "")
    has = {"torch": "2.11.0+cu130", "transformers": "5.23.0", "tokenizers": "0.23.2"}

    def version(name: str) -> str:
        if name not in has:
            raise gpu.importlib.metadata.PackageNotFoundError(name)
        return has[name]

    monkeypatch.setattr(gpu.importlib.metadata, "version", version)
    assert gpu.unpack(tmp_path / "site") == ["nobody_has_this"]
    assert (tmp_path / "site" / "nobody_has_this" / "__init__.py").exists()
    has["nobody_has_this"] = "0.9"  # what is packed wants the others as new as they are packed
    assert gpu.unpack(tmp_path / "site") == ["nobody_has_this"]
    has["transformers"] = "5.17.0"  # stages cannot be timed apart there
    assert gpu.unpack(tmp_path / "site") == ["nobody_has_this", "tokenizers", "transformers"]


def test_wheels_for_another_python_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "PACK", tmp_path)
    for tag in ("cp27-abi3", "py3-none", f"cp3{sys.version_info.minor}-cp3{sys.version_info.minor}"):
        with zipfile.ZipFile(tmp_path / f"nobody_{tag[:4]}-1.0-{tag}-any.whl", "w") as wheel:
            wheel.writestr("nobody/__init__.py", "")
    assert len(gpu.unpack(tmp_path / "site")) == 3
    (tmp_path / "compiled_one-1.0-cp27-cp27-any.whl").touch()
    with pytest.raises(SystemExit, match="compiled_one.* is not for this Python, 3.*GPU_PACK_PYTHON=3"):
        gpu.unpack(tmp_path / "site")
