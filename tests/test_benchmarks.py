"""The pages of figures are what the commands under them gave."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import results
import split
from families import families, family_of

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


EMBEDDED = families(embedded=True)


@pytest.mark.parametrize("row", [0.5, 0.3333, 0.1111])
@pytest.mark.parametrize("name", EMBEDDED)
def test_splits_are_compared_at_equal_flops(name: str, row: float) -> None:
    """A later cut costs more at the same `keep`, so that it gets a smaller one, if any is as cheap."""
    wanted = split.published_flops(name, row, split.SQUARE_ROOT)
    later, earlier = (split.as_cheap(name, row, exponent) for exponent in (0.25, 0.75))
    assert later is not None and earlier is not None and later < row < earlier
    for keep, exponent in ((later, 0.25), (earlier, 0.75)):
        assert split.published_flops(name, keep, exponent) == pytest.approx(wanted, abs=0.003)
    assert split.as_cheap(name, 0.05, 0) is None, "all layers in front of the merge are as long as ever"


@pytest.mark.parametrize("flags", [[], ["--equal-flops"]], ids=["equal keep", "equal FLOPs"])
@pytest.mark.parametrize("name", EMBEDDED)
def test_the_table_of_splits(name: str, flags: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model, rows = str(family_of(name).embedded), tmp_path / "rows.jsonl"
    asked = ["--questions", "8", "--keep", "0.3333", "--exponents", "0.5,0.75", "--output", str(rows)]
    split.main(["--model", model, *asked, *flags])
    table = [line.split("|") for line in capsys.readouterr().out.splitlines()]
    assert len(table) == 4 and len(rows.read_text().splitlines()) == 2
    for cells in table[2:]:
        assert float(cells[3]) == pytest.approx(float(cells[1]), abs=0.02)
    assert (float(table[2][1]) == float(table[3][1])) == (not flags)
