"""Every code block of the pages runs, and the site builds without a warning."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from helpers import TAKES_READY_FEATURES
from illava_hooks.cli import app
from illava_hooks.engine import finding

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
CLIENTS = "clients.md"  # its blocks need other libraries: tests/clients/test_page.py runs them


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    found = [line for page in PAGES for block in blocks(page, "bash") for line in block.splitlines()]
    return [line.split("  #")[0] for line in found if line.startswith("illava-hooks")]


def write_files(folder: Path) -> list[str]:
    """Writes the Python blocks of all pages that begin with a file's name, for the commands that take such a file."""
    found: dict[str, str] = {}
    for page in PAGES:
        for block in blocks(page, "python"):
            named = re.match(r"# (\w+\.py)\n", block)
            if named:
                assert found.setdefault(named[1], block) == block, f"{named[1]} is two files"
                (folder / named[1]).write_text(block)
    return list(found)


@pytest.mark.parametrize("page", [page.name for page in PAGES if blocks(page, "python") and page.name != CLIENTS])
def test_python(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page run in one namespace; what they write is left nowhere, what they register is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(finding, "_registered", {})
    names: dict[str, Any] = {"__name__": page}
    for number, block in enumerate(blocks(ROOT / "docs" / page, "python")):
        exec(compile(block, f"{page}, block {number}", "exec"), names)


@pytest.mark.parametrize("command", [c for c in commands() if " demo" not in c])
def test_commands(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if " bench " in command and not TAKES_READY_FEATURES:
        pytest.skip("bench needs transformers 5.18")
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    done = CliRunner().invoke(app, shlex.split(command)[1:])
    assert done.exit_code == 0, done.output


def test_a_method_of_three_lines_is_measured_by_following_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert write_files(tmp_path) == ["mine.py"]
    lines = [line for line in (tmp_path / "mine.py").read_text().splitlines()[1:] if line]
    assert len(lines) <= 3
    (command,) = [line for line in commands() if "mine.py:mine" in line]
    done = CliRunner().invoke(app, shlex.split(command)[1:])
    assert done.exit_code == 0, done.output
    rows = {line.split(" | ")[0]: line.split(" | ")[3:] for line in done.stdout.splitlines()[2:]}
    assert list(rows) == ["| none", "| rows", "| illava", "| random"]
    assert rows["| rows"] not in (rows["| illava"], rows["| random"]), "it is not one of the others"


def test_settings_of_the_json_block_are_read(tmp_path: Path) -> None:
    from illava_hooks import MergeConfig

    (block,) = (block for block in blocks(ROOT / "docs" / "settings.md", "json") if '"illava_hooks"' in block)
    (tmp_path / "own.json").write_text(block)
    config = MergeConfig.load(tmp_path / "own.json")
    config.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == block


def test_items_of_the_json_block_are_read(tmp_path: Path) -> None:
    from PIL import Image

    from illava_hooks.tools.datasets import read_items

    (block,) = blocks(ROOT / "docs" / "evaluation.md", "json")
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.jpg")
    (tmp_path / "own.jsonl").write_text(block)
    (item,) = read_items(tmp_path / "own.jsonl")
    assert item.question == json.loads(block)["question"]


def test_all_languages_are_tested() -> None:
    known = {"python", "bash", "json", ""}
    used = {word for page in PAGES for word in re.findall(r"^```(\w*)\n(?:.*?)^```", page.read_text(), re.M | re.S)}
    assert used <= known


def test_bash_blocks_hold_nothing_else() -> None:
    """What a test cannot run (it installs or serves) stands in words or is named here."""
    lines = [line for page in PAGES for block in blocks(page, "bash") for line in block.splitlines() if line]
    others = [line for line in lines if not line.startswith(("illava-hooks", "#"))]
    allowed = (
        "make ",
        "pip install",
        "lmms-eval ",
        "python -m illava_hooks.integrations",
        "PYTHONPATH=",
        "accelerate launch",
    )
    assert [line for line in others if not line.startswith(allowed)] == []


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is in the docs extra")
def test_the_site_builds_strictly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not re.findall(r"^WARNING", done.stderr, re.M), done.stdout + done.stderr
    pages = [file.read_text() for file in (tmp_path / "site").rglob("*.html")]
    assert len(pages) >= len(PAGES)
    fetched = {
        url for text in pages for url in re.findall(r'<(?:script|link|img)[^>]+?(?:src|href)="(https?:[^"]+)"', text)
    }
    assert fetched == set(), "the site needs no other host"
