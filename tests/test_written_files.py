"""The commands write what was asked for, where it was asked for, and touch nothing beside it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from families import families, family_of
from illava_hooks import tiny
from illava_hooks.cli import app
from illava_hooks.tools.bench.plot import axes, save

SHAPE = next(iter(family_of(families(shapes=True, with_tiles=True)[0]).shapes))
BENCH = f"bench --shape {SHAPE} --narrow --tiles 2 --rounds 1 --new-tokens 1".split()
EVALUATE = "evaluate --questions 6 --methods nearest --kept 0.5".split()


def everything(folder: Path) -> dict[str, bytes | None]:
    """All files and folders below one."""
    return {str(f.relative_to(folder)): f.read_bytes() if f.is_file() else None for f in folder.rglob("*")}


def run(*arguments: str | Path) -> Any:
    """A command in this process that works."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


def refused(*arguments: str | Path) -> str:
    """The line of a command that cannot work."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2 and result.stdout == "", result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return str(result.stderr)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with files that must stay as they are."""
    for name in (".env", ".out.png", ".rows.jsonl", "notes"):
        (tmp_path / name).write_text(f"precious {name}")
    (tmp_path / "pictures").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["scene.png", "..hidden.png", "a b;touch x.png", "$(touch x).png", "-x.png"])
def test_visualize_writes_into_its_folder_only(home: Path, name: str) -> None:
    Image.open(tiny.media("scene.png")).resize((40, 40)).save(home / name)
    before = everything(home)
    run("visualize", "--input", home / name, "--output", home / "out")
    after = everything(home)
    assert {n: v for n, v in after.items() if not n.startswith("out")} == before
    new = [Path(n) for n in after if n.startswith(f"out{os.sep}")]
    assert new and all(n.name.startswith(Path(name).stem) and n.parent == Path("out") for n in new)


@pytest.mark.parametrize("where", [".", "..", "../pictures"])
def test_visualize_of_a_folder_without_a_name(home: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    inner = home / "pictures" / "inner"
    inner.mkdir()
    for folder in (home / "pictures", inner):
        Image.open(tiny.media("scene.png")).resize((40, 40)).save(folder / "a.png")
    monkeypatch.chdir(inner if where != "../pictures" else home / "pictures")
    run("visualize", "--input", where, "--output", home / "out")
    names = [file.name for file in (home / "out").iterdir()]
    assert names and all(name.startswith("inner-" if where == "." else "pictures-") for name in names)


def test_visualize_into_a_file(home: Path) -> None:
    before = everything(home)
    assert "--output is 'notes', which is a file; give a folder" in refused("visualize", "--output", "notes")
    assert everything(home) == before


@pytest.mark.parametrize("name", ["out.png", "env"])
def test_a_plot_leaves_hidden_files_of_like_names_alone(home: Path, name: str) -> None:
    before = everything(home)
    figure, _ = axes(2, 2)
    save(figure, Path(name))
    after = everything(home)
    assert set(after) - set(before) == {name} and {n: after[n] for n in before} == before
    with Image.open(home / name) as picture:
        assert picture.format == "PNG"


def test_a_plot_that_fails_leaves_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = everything(home)
    figure, _ = axes(2, 2)

    def full(file: Path, **_: Any) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device", "out.png")

    monkeypatch.setattr(figure, "savefig", full)
    with pytest.raises(OSError, match="No space"):
        save(figure, Path("out.png"))
    assert everything(home) == before


@pytest.mark.parametrize("name", ["nowhere/out.png", "pictures", "out.xyz", "out.png.exe"])
def test_a_plot_that_cannot_be_written_is_refused_before_the_work(home: Path, name: str) -> None:
    before = everything(home)
    assert f"--plot is '{name}'" in refused(*BENCH, "--plot", name)
    assert everything(home) == before


def test_rows_of_an_evaluation(home: Path) -> None:
    before = everything(home)
    run(*EVALUATE, "--output", "rows.jsonl")
    assert set(everything(home)) - set(before) == {"rows.jsonl"}
    first = (home / "rows.jsonl").read_bytes()
    run(*EVALUATE, "--output", "rows.jsonl")  # what is there is not run again
    assert (home / "rows.jsonl").read_bytes() == first
    assert {n: v for n, v in everything(home).items() if n in before} == before


@pytest.mark.parametrize("name", ["nowhere/rows.jsonl", "pictures"])
def test_rows_that_cannot_be_written_are_refused_before_the_work(home: Path, name: str) -> None:
    assert f"--output is '{name}'" in refused(*EVALUATE, "--output", name)


@pytest.mark.parametrize("content", ["no json", '{"method": "none"}', '{"right": 5}', "[]", "[" * 100_000])
def test_rows_of_something_else_are_left_as_they_are(home: Path, content: str) -> None:
    (home / "rows.jsonl").write_text(content)
    said = refused(*EVALUATE, "--output", "rows.jsonl")
    assert "'rows.jsonl' does not say what its rows were measured with" in said and "give another file" in said
    assert (home / "rows.jsonl").read_text() == content


def test_a_full_disk_is_one_line(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", "out.png")

    monkeypatch.setattr(Image.Image, "save", full)
    assert "No space left on device" in refused("visualize", "--output", "out")
    assert list((home / "out").iterdir()) == []
