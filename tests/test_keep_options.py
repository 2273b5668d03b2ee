"""`--keep` and files of settings wherever settings are given: commands, the demo's form, harnesses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from families import families, family_of
from helpers import assert_says, needs_ready_features
from illava_hooks import METHODS, MergeConfig, MergeConfigError, MergeSchedule, patch, tiny
from illava_hooks.cli import app
from illava_hooks.demo import forms
from illava_hooks.errors import InputError
from illava_hooks.integrations import vlmevalkit
from illava_hooks.integrations.arguments import split_arguments
from illava_hooks.tools.evaluate.budgets import budget_settings
from illava_hooks.tools.loading import parse_fraction

#: The embedded models as the command line calls them, and their families.
MODELS = {family_of(name).embedded: name for name in families(embedded=True)}
BENCH = ["bench", "--rounds", "1", "--new-tokens", "1", "--narrow", "--shape"]
#: A small shape that takes images of any size.
SHAPE = next(iter(family_of(families(embedded=True, one_to_one=True, with_tiles=False)[0]).shapes))
COMMANDS = {"ask": ["ask"], "visualize": ["visualize"], "bench": [*BENCH, SHAPE]}
NOWHERE = ["--model", "no-such-folder/no-such-model"]


def done(*arguments: str | Path) -> str:
    """What a command prints."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: str | Path) -> str:
    """The line of a command that cannot work."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def settings_file(folder: Path, model: str, **given: Any) -> Path:
    """Settings of an embedded model in a file."""
    file = folder / "mine.json"
    patch(tiny.load(MODELS[model])[0], **given).config.save(file)
    return file


@pytest.mark.parametrize("text", ["1/3", "0.3333"])
@pytest.mark.parametrize("model", MODELS)
def test_ask(model: str, text: str) -> None:
    (answer,) = json.loads(done("ask", "--model", model, "--keep", text, "--json"))["answers"]
    assert answer["report"]["kept_fraction"] == pytest.approx(1 / 3, abs=0.02)


@pytest.mark.parametrize("model", MODELS)
def test_visualize(model: str, tmp_path: Path) -> None:
    """The pictures are named by what is left."""
    done("visualize", "--model", model, "--output", tmp_path, "--keep", "1/3")
    last = max(file.stem for file in tmp_path.glob("*-language-layer*.png"))
    left, whole = map(int, last.rpartition("-")[2].split("of"))
    assert left / whole == pytest.approx(1 / 3, abs=0.02)


@needs_ready_features
@pytest.mark.parametrize("way", [[], pytest.param(["--fresh"], marks=pytest.mark.nightly)], ids=["here", "fresh"])
def test_bench(way: list[str]) -> None:
    report = json.loads(done(*BENCH, SHAPE, "--patches", "256", "--json", "--keep", "1/4", *way))["report"]
    (visual,) = report["visuals"]
    assert visual["language_tokens"][-1] == visual["prompt_tokens"] / 4


@pytest.mark.parametrize("model", MODELS)
def test_evaluate(model: str) -> None:
    table = done(
        *("evaluate", "--model", model, "--items", "small-scenes", "--questions", "8"),
        *("--methods", "illava", "--keep", "1/2,0.25"),
    )
    rows = [[cell.strip() for cell in line.split("|")] for line in table.splitlines() if "illava" in line]
    assert len(rows) == 2
    for row, keep in zip(rows, (0.5, 0.25), strict=True):
        assert row[2] == "keep" and float(row[3]) == keep
        assert float(row[4]) == pytest.approx(keep, abs=0.02)


def test_settings_of_a_budget() -> None:
    assert budget_settings(MergeSchedule((1,), 4, (2,), 0.5), "keep", 0.25) == {"keep": 0.25}


@pytest.mark.parametrize("command", COMMANDS)
class TestExclusion:
    """Nothing is loaded for it: the model does not exist."""

    @pytest.mark.parametrize("amount", [["--vit-r", "4"], ["--vit-r", "0"], ["--llm-ratio", "0.5"]])
    def test_amounts(self, command: str, amount: list[str]) -> None:
        model = [] if command == "bench" else NOWHERE
        told = refused(*COMMANDS[command], *model, "--keep", "1/3", *amount)
        assert f"--keep and {amount[0]} exclude each other" in told

    @pytest.mark.parametrize("text", ["a third", "1/0", "", "1/3/3", "nan"])
    def test_no_fraction(self, command: str, text: str) -> None:
        model = [] if command == "bench" else NOWHERE
        assert f"--keep is {text!r}; give a fraction such as 1/3" in refused(
            *COMMANDS[command], *model, "--keep", text
        )

    def test_a_file_that_is_not_there(self, command: str, tmp_path: Path) -> None:
        model = [] if command == "bench" else NOWHERE
        told = refused(*COMMANDS[command], *model, "--preset", tmp_path / "none.json")
        assert "none.json: the file cannot be read" in told

    @pytest.mark.parametrize("text", ["0", "1.5", "-1/3"])
    def test_out_of_range(self, command: str, text: str) -> None:
        assert "keep is" in (told := refused(*COMMANDS[command], "--keep", text)) and "(0, 1]" in told


@pytest.mark.parametrize("other", [["--kept", "0.5"], ["--stages", "both"]])
def test_evaluate_excludes_what_says_the_same(other: list[str]) -> None:
    assert f"--keep and {other[0]} exclude each other" in refused("evaluate", *NOWHERE, "--keep", "0.5", *other)


@pytest.mark.parametrize("text", ["half", "0.5,x", ""])
def test_evaluate_refuses_what_is_no_fraction(text: str) -> None:
    assert "give a fraction such as 1/3" in refused("evaluate", *NOWHERE, "--keep", text)


@pytest.mark.parametrize("text", ["0", "2"])
def test_evaluate_refuses_what_is_out_of_range(text: str) -> None:
    assert "(0, 1]" in refused("evaluate", "--questions", "8", "--methods", "illava", "--keep", text)


@pytest.mark.parametrize("model", MODELS)
def test_a_file_says_method_and_amounts(model: str, tmp_path: Path) -> None:
    """And what stands beside it comes first."""
    file = settings_file(tmp_path, model, keep=0.4, method="tome")

    def kept(*more: str) -> float:
        (answer,) = json.loads(done("ask", "--model", model, "--json", "--preset", file, *more))["answers"]
        found: float = answer["report"]["kept_fraction"]
        return found

    assert kept() == pytest.approx(0.4, abs=0.02)
    assert kept("--keep", "0.8", "--method", "illava") == pytest.approx(0.8, abs=0.02)


# ---------------------------------------------------------------------------- the demo's form

FIELDS = ("", "", "", "")


@pytest.mark.parametrize("model", MODELS)
class TestForm:
    def test_one_number(self, model: str) -> None:
        network, _ = tiny.load(MODELS[model])
        settings = forms.settings_of("tome", "auto", (*FIELDS, " 1/3 "))
        assert settings == {"method": "tome", "preset": "auto", "keep": 1 / 3}
        words, good = forms.describe(network, "illava", "auto", (*FIELDS, "1/4"))
        assert good and "encoder layers 3, 4 together leave 50% of the patches" in words
        assert "25% of the tokens" in words
        assert forms.describe(network, "illava", "auto", (*FIELDS, "1")) == ("nothing is removed.", True)

    def test_what_cannot_be(self, model: str) -> None:
        network, _ = tiny.load(MODELS[model])
        for numbers, told in (
            (("", "4", "", "", "0.5"), "keep is 0.5 and vit_r is 4"),
            ((*FIELDS, "2"), "'Visual tokens kept' is 2; give a fraction up to 1"),
            ((*FIELDS, "much"), "Visual tokens kept is 'much'; give a fraction"),
        ):
            words, good = forms.describe(network, "illava", "auto", numbers)
            assert not good and told in words
        assert forms.limits_of(network).keys() == set(forms.FIELDS)


# ---------------------------------------------------------------------------- the harnesses


class TestHarnesses:
    @pytest.mark.parametrize("value", ["1/3", 1 / 3])
    def test_arguments(self, value: Any) -> None:
        assert split_arguments({"keep": value, "vit_layers": "3-4", "pretrained": "x"}) == (
            {"keep": 1 / 3, "vit_layers": [3, 4]},
            {"pretrained": "x"},
        )

    @pytest.mark.parametrize(
        ("given", "told"),
        [
            ({"keep": 0.5, "vit_r": 4}, "^keep and vit_r are both given"),
            ({"keep": "1/2", "llm_ratio": 1.0}, "^keep and llm_ratio are both given"),
            ({"keep": 0.5, "enable_illava_vit": False}, "^keep and enable_illava_vit are both given"),
            ({"keep": "some"}, "^keep is 'some'; give a fraction"),
        ],
    )
    def test_exclusion(self, given: dict[str, Any], told: str) -> None:
        with pytest.raises((MergeConfigError, InputError)) as caught:
            split_arguments(given)
        assert_says(caught.value, told)


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The kit's models, over a stand-in for the kit."""
    from functools import partial

    found = {name: partial(object) for names in vlmevalkit.STOCK.values() for name in names}
    monkeypatch.setattr(vlmevalkit, "_entries", lambda: found)
    return found


class TestKit:
    def test_entries_carry_it(self, entries: dict[str, Any]) -> None:
        (name, *_) = vlmevalkit.register(keep="1/3")
        assert entries[name].keywords == {"keep": 1 / 3, "method": "illava", "preset": "auto"}
        (name, *_) = vlmevalkit.register()
        assert "keep" not in entries[name].keywords

    def test_a_file_says_its_method_there_too(self, entries: dict[str, Any], tmp_path: Path) -> None:
        model = next(iter(MODELS))
        file = settings_file(tmp_path, model, keep=0.4, method="tome")
        (name, *_) = vlmevalkit.register(preset=str(file))
        settings, _ = split_arguments(entries[name].keywords)
        assert patch(tiny.load(MODELS[model])[0], **settings).config == MergeConfig.load(file)
        (name, *_) = vlmevalkit.register(preset=str(file), method="nearest")
        settings, _ = split_arguments(entries[name].keywords)
        assert patch(tiny.load(MODELS[model])[0], **settings).config.method == METHODS["nearest"]

    @pytest.mark.parametrize(
        ("call", "told"),
        [
            (lambda: vlmevalkit.register(keep=0.5, vit_r=4), "^keep and vit_r are both given"),
            (lambda: vlmevalkit.register(preset="film"), "^preset is 'film'"),
            (lambda: vlmevalkit.register(preset="film.json"), r"^film\.json: the file cannot be read"),
        ],
    )
    def test_what_cannot_be(self, entries: dict[str, Any], call: Callable[[], Any], told: str) -> None:
        before = dict(entries)
        with pytest.raises(MergeConfigError) as caught:
            call()
        assert_says(caught.value, told)
        assert entries == before

    def test_its_command_line(self, entries: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            vlmevalkit.main(["--keep", "1/2", "--vit-r", "4"])
        assert ended.value.code == 2 and "keep and vit_r are both given" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["1/3", "0.25", " 1/2 ", "1e-1", "1", "3/2"])
def test_fractions(text: str) -> None:
    """Their range is for whoever takes them."""
    numerator, _, denominator = text.partition("/")
    assert parse_fraction(text, "x") == float(numerator) / float(denominator or 1)
    assert parse_fraction(None, "x") is None


@pytest.mark.parametrize("model", MODELS)
def test_evaluate_measures_nothing_if_a_method_cannot_keep_as_little(model: str, tmp_path: Path) -> None:
    """`tome` halves a layer's tokens at most; the methods before it would have taken a long time."""
    rows = tmp_path / "rows.jsonl"
    suite = ("--items", "small-scenes", "--questions", "8", "--methods", "illava,tome")
    told = refused("evaluate", "--model", model, *suite, "--keep", "1/3,1/100", "--output", rows)
    assert "method 'tome' removes at most half in a layer" in told
    assert rows.read_text().count("\n") <= 1, "a header at most"
