"""The pages of figures are what the commands under them gave."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import results

BENCHMARKS = Path(results.__file__).parent


def test_ceiling_prints_the_table_of_the_docs() -> None:
    command = [sys.executable, str(BENCHMARKS / "ceiling.py")]
    rows = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout.splitlines()
    assert len(rows) == 8
    page = (BENCHMARKS.parent / "docs" / "how-it-works.md").read_text()
    assert all(row in page for row in rows)


def test_the_page_of_results_is_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = results.DOCS / "RESULTS.md"
    shutil.copytree(results.DOCS / "results", tmp_path / "results")
    emptied = re.sub(r"(<!-- (?!end)[^>]* -->\n).*?(?=<!-- end)", r"\1", page.read_text(), flags=re.DOTALL)
    assert len(emptied) < len(page.read_text()) / 2
    (tmp_path / "RESULTS.md").write_text(emptied)
    monkeypatch.setattr(results, "DOCS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["results.py"])
    results.main()
    assert (tmp_path / "RESULTS.md").read_text() == page.read_text()
    for name in re.findall(r"\((results/.*?png)\)", page.read_text()):
        assert (tmp_path / name).stat().st_size > 10_000
