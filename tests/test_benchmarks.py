"""The pages of figures are what the commands under them gave."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import commands
import reproduce_7b
import results
import split
import tuned
from families import families, family_of
from illava_hooks import METHODS, patch, tiny, unpatch
from illava_hooks.cli import app
from illava_hooks.tools.datasets import scene_items
from illava_hooks.tools.evaluate import predict, read_header, read_rows
from illava_hooks.tools.evaluate.lines import add_line

BENCHMARKS = Path(results.__file__).parent


def test_ceiling_prints_the_table_of_the_docs() -> None:
    command = [sys.executable, str(BENCHMARKS / "ceiling.py")]
    rows = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout.splitlines()
    assert len(rows) == 8
    page = (BENCHMARKS.parent / "docs" / "how-it-works.md").read_text()
    assert all(row in page for row in rows)


def test_the_page_of_results_is_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docs = commands.DOCS
    shutil.copytree(docs / "results", tmp_path / "results", ignore=shutil.ignore_patterns("*.md", "*.png"))
    for name, most in (("RESULTS.md", 0.7), ("methods.md", 1.0)):
        text = (docs / name).read_text()
        emptied = re.sub(r"(<!-- (?!end)[^>]* -->\n).*?(?=<!-- end)", r"\1", text, flags=re.DOTALL)
        assert len(emptied) < most * len(text)
        (tmp_path / name).write_text(emptied)
    monkeypatch.setattr(commands, "DOCS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["results.py"])
    results.main()
    pages = [str(page.relative_to(docs)) for page in (docs / "results").glob("*.md")]
    assert len(pages) == 8 and sorted(page.name for page in (tmp_path / "results").glob("*.md")) == sorted(
        Path(page).name for page in pages
    )
    for name in ("RESULTS.md", "methods.md", *pages):
        assert (tmp_path / name).read_text() == (docs / name).read_text()
    for name in re.findall(r"\((results/.*?png)\)", (docs / "RESULTS.md").read_text()):
        assert (tmp_path / name).stat().st_size > 10_000


def test_commands_of_the_page_measure_anew_in_a_fresh_clone() -> None:
    """No row that comes with the repository lies where a printed command looks for rows."""
    pages = [commands.DOCS / "RESULTS.md", *(commands.DOCS / "results").glob("*.md")]
    printed = re.findall(r"^`illava-hooks (evaluate .*)`$", "\n".join(map(Path.read_text, pages)), re.MULTILINE)
    assert sorted(printed) == sorted(command.arguments for command in commands.evaluations().values())
    for line in printed:
        output = Path(shlex.split(line)[-1])
        assert output.name == str(output) and not (BENCHMARKS.parent / output).exists()


def test_rows_that_come_with_the_repository_are_reused_by_no_run(tmp_path: Path) -> None:
    """By no run of other versions; those of earlier ones by none at all."""
    command = commands.evaluations()["tiny choices"]
    file = tmp_path / command.file
    shutil.copy(command.path, file)
    if read_header(file) is not None:
        file.write_text(file.read_text().replace('"code": "', '"code": "0', 1))
    before = file.read_bytes()
    line = command.arguments.replace("--questions 2000", "--questions 5").replace(command.file, str(file))
    done = CliRunner().invoke(app, shlex.split(line))
    assert done.exit_code == 2 and "delete it to measure anew" in done.stderr and done.stdout == ""
    assert file.read_bytes() == before


def test_a_table_is_measured_by_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs" / "results").mkdir(parents=True)
    monkeypatch.setattr(commands, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(commands, "BUILD", tmp_path / "build")
    arguments = "evaluate --items small-scenes --questions 5 --methods illava --kept 0.5 --output rows.jsonl"
    command = commands.Command(arguments, "rows.jsonl")
    command.run()
    header, rows = read_header(command.path), read_rows(command.path)
    assert [row.method for row in rows] == ["none", "illava"] and header is not None
    table = results.quality_of([command])
    assert f"| both | 0.500 | {rows[1].measured:.3f} | illava | 5 |" in table
    assert table.splitlines()[-1].startswith(f"Measured with torch {header['versions']['torch']} and transformers")
    before = command.path.read_bytes()
    command.run()
    assert command.path.read_bytes() == before, "what is there stays"


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


class TestReproduce:
    """`make reproduce-7b`, with a harness that only writes what the real one writes."""

    MODEL, PUBLISHED = list(reproduce_7b.MODELS.items())[-1]

    def harness(self, folder: Path, code: int = 0) -> str:
        """A Python that notes how it was called and writes one figure, better with each run."""
        program = folder / "harness"
        program.write_text(
            f"#!{sys.executable}\n"
            "import json, pathlib, sys\n"
            "words = sys.argv[1:]\n"
            f"log = pathlib.Path({str(folder / 'log')!r})\n"
            "calls = log.read_text().splitlines() if log.exists() else []\n"
            "log.write_text(chr(10).join([*calls, ' '.join(words)]))\n"
            "out = pathlib.Path(words[words.index('--output_path') + 1]) / 'weights'\n"
            "out.mkdir(parents=True)\n"
            "figures = {'alias': 'mmstar', 'average,none': 0.5 + len(calls) / 8, 'average_stderr,none': 'N/A'}\n"
            "task = words[words.index('--tasks') + 1]\n"
            "said = {'results': {task: figures}, 'total_evaluation_time_seconds': '12.5'}\n"
            f"if not {code}: (out / '20260101_results.json').write_text(json.dumps(said))\n"
        )
        program.chmod(0o755)
        return str(program)

    def test_runs_what_is_missing_and_prints_what_was_found(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(reproduce_7b, "BUILD", tmp_path / "build")
        wanted = ["--python", self.harness(tmp_path), "--models", self.MODEL, "--tasks", "mmstar", "--limit", "20"]
        reproduce_7b.main([*wanted, "--dry-run"])
        assert not (tmp_path / "log").exists() and "mmstar | average" not in capsys.readouterr().out
        reproduce_7b.main(wanted)
        row = f"| {self.MODEL} | mmstar | average | 0.5 | 0.625 | 0.75 |"
        assert row in capsys.readouterr().out
        reproduce_7b.main(wanted)
        printed = capsys.readouterr().out
        assert row in printed and printed.count("done before: ") == 3
        calls = (tmp_path / "log").read_text().splitlines()
        assert [call.split()[3] for call in calls] == [self.PUBLISHED.stock, *2 * [self.PUBLISHED.merged]]
        assert "method" not in calls[0] and "method=illava" in calls[1] and "method=diverse" in calls[2]
        reproduce_7b.main([*wanted[:-1], "30", "--dry-run"])  # another number of questions is another run
        assert "done before" not in capsys.readouterr().out

    def test_a_run_without_figures_ends_with_one_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(reproduce_7b, "BUILD", tmp_path / "build")
        with pytest.raises(SystemExit, match=f"{self.MODEL}, mme, unpatched: the harness wrote no figures"):
            reproduce_7b.main(["--python", self.harness(tmp_path, 1), "--models", self.MODEL, "--tasks", "mme"])

    def test_names_are_those_of_the_families(self) -> None:
        for name, published in zip(families(lmms_eval=True, embedded=True), reproduce_7b.MODELS.values(), strict=True):
            harness = family_of(name).lmms_eval
            assert harness is not None and (published.stock, published.merged) == (harness.stock, f"{name}_illava")
        assert set(reproduce_7b.METHODS) < set(METHODS)


def test_a_tuned_file_beside_the_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that holds the preset gains nothing; each figure is that of the answers one by one."""
    model, processor = tiny.load(EMBEDDED[0])
    items = scene_items(10, "test")
    patch(model).config.save(tmp_path / "same.json")
    answers = predict(model, processor, items)
    unpatch(model)
    runs = tuned.compare(model, processor, items, [str(tmp_path / "same.json")])
    assert [run.values for run in runs] == [runs[0].values] * 2 and runs[0].flops == runs[1].flops < 1
    assert runs[0].values["accuracy"] == [said == item.answer for said, item in zip(answers, items, strict=True)]
    tuned.print_runs(runs)
    assert "| same.json | " in capsys.readouterr().out


def test_a_table_says_what_its_command_has_not_measured_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(commands, "DOCS", tmp_path)
    rows = tmp_path / "results" / "rows.jsonl"
    shutil.copy(BENCHMARKS.parent / "docs" / "results" / "tiny-choices.jsonl", rows)
    lines = rows.read_text().splitlines()
    asked = "evaluate --stages encoder --kept 0.5625,0.25,1/3 --methods illava,illava-reference,fastv"
    assert results.still_missing(commands.Command(asked, "rows.jsonl")) == [
        "encoder, 0.562: fastv",
        "encoder, 0.250: fastv",
        "encoder, 0.333: illava, illava-reference, fastv",
    ]
    measured = commands.evaluations()["tiny choices"].arguments
    assert results.still_missing(commands.Command(measured, "rows.jsonl")) == []
    variant = f"evaluate --stages encoder --kept 0.25 --methods illava,{commands.WITHOUT_SIZES}"
    assert results.still_missing(commands.Command(variant, "rows.jsonl")) == [
        "encoder, 0.250: novel-agnostic, no sizes"
    ]
    row = {**json.loads(lines[1]), "method": "novel-agnostic, no sizes", "stage": "encoder", "kept": 0.25}
    add_line(rows, row)
    assert results.still_missing(commands.Command(variant, "rows.jsonl")) == [], "a name may hold a comma"
    keep = commands.Command("evaluate --keep 1/3 --methods illava", "rows.jsonl")
    assert results.still_missing(keep) == ["keep, 0.333: illava"]
