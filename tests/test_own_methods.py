"""A method of one's own: everywhere where a method can be named, by ``file.py:NAME`` and as an object."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import illava_hooks
from families import families
from helpers import assert_says, needs_ready_features
from illava_hooks import METHODS, InputError, MergeConfigError, Method, patch, tiny
from illava_hooks.cli import app
from illava_hooks.demo.forms import FIELDS, describe
from illava_hooks.integrations.arguments import split_arguments
from illava_hooks.tools import bench
from illava_hooks.tools.datasets import scene_items
from illava_hooks.tools.draw import merge_maps
from illava_hooks.tools.evaluate import installed
from illava_hooks.tools.evaluate.identity import identity
from illava_hooks.tools.loading import build_inputs
from illava_hooks.tools.media import load_media
from illava_hooks.tools.methods import find_method

FAMILY = families(embedded=True)[0]

CENTRE = """
from illava_hooks import Method
def centre(inputs):
    return -(inputs.positions - inputs.positions.float().mean(-1, keepdim=True)).abs()
mine = Method("centre", encoder_score=centre, llm_score=centre, merge="drop")
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "own.py"
    path.write_text(CENTRE)
    return path


def centre(inputs: Any) -> torch.Tensor:
    positions: torch.Tensor = inputs.positions
    return -(positions - positions.float().mean(-1, keepdim=True)).abs()


OBJECT = Method("centre", encoder_score=centre, llm_score=centre, merge="drop")


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, done.output
    return done.stdout


class TestNaming:
    def test_everything_that_stands_for_a_method(self, file: Path) -> None:
        assert all(find_method(name) is method for name, method in METHODS.items())
        assert find_method("uniform").name == "uniform" and find_method(OBJECT) is OBJECT
        for spelled in ("own.py:mine", "./own.py:mine", f"{file}:mine"):
            assert find_method(spelled).name == "centre"

    def test_a_file_may_use_what_lies_beside_it(self, file: Path) -> None:
        (file.parent / "beside_own.py").write_text("MERGE = 'nearest'")
        file.write_text(
            "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom beside_own import MERGE\n"
            "from illava_hooks import Method\n@dataclass\nclass Score:\n    power: int = 2\n"
            "    def __call__(self, inputs):\n        return inputs.positions ** self.power\n"
            "mine = Method('raised', encoder_score=Score(), merge=MERGE)"
        )
        before = list(sys.path)
        assert find_method("own.py:mine").merge == "nearest" and sys.path == before
        del sys.modules["beside_own"]

    def test_an_edited_file_is_read_again(self, file: Path) -> None:
        for name in ("one", "two", "six"):  # of one length, within a second: a cached compilation would be the old one
            file.write_text(CENTRE.replace("centre", name))
            assert find_method("own.py:mine").name == name
        assert not list(file.parent.rglob("*.pyc"))

    @pytest.mark.parametrize(
        ("choice", "parts"),
        [
            ("best", ["method is 'best'", "illava", "file.py:NAME"]),
            ("own:mine", ["method is 'own:mine'", "file.py:NAME"]),
            ("nowhere.py:mine", ["there is no file 'nowhere.py'"]),
            (".:mine", ["method is '.:mine'"]),
            ("own.py", ["names no Method", r"the file holds \['mine'\]"]),
            ("own.py:", ["names no Method", "mine"]),
            ("own.py:other", ["names no Method", r"the file holds \['mine'\]"]),
            ("own.py:centre", ["is a function and no Method", r"the file holds \['mine'\]"]),
            ("empty.py:mine", [r"the file holds none; write mine = Method\(...\)"]),
            ("broken.py:mine", ["broken.py cannot be run", "SyntaxError"]),
            ("raising.py:mine", ["raising.py cannot be run", "ZeroDivisionError"]),
            ("leaving.py:mine", ["leaving.py cannot be run", "SystemExit"]),
            (5, ["method is 5"]),
        ],
    )
    def test_what_is_none_is_told_in_one_line(self, file: Path, choice: Any, parts: list[str]) -> None:
        for name, text in {"empty": "", "broken": "def", "raising": "1 / 0", "leaving": "exit(3)"}.items():
            (file.parent / f"{name}.py").write_text(text)
        with pytest.raises((InputError, MergeConfigError)) as caught:
            find_method(choice)
        assert_says(caught.value, *parts)

    def test_only_the_users_own_command_runs_a_file(self, file: Path) -> None:
        """Neither `patch`, whose settings may come from elsewhere, nor the page, which others can reach."""
        file.write_text(f"open({str(file.parent / 'ran')!r}, 'w').close()\n{CENTRE}")
        model, _ = tiny.load(FAMILY)
        with pytest.raises(MergeConfigError, match="method is 'own.py:mine'"):
            patch(model, method="own.py:mine")
        words, possible = describe(model, "own.py:mine", "auto", [""] * len(FIELDS))
        assert not possible and "method is 'own.py:mine'" in words
        patch(model).config.save(file.parent / "settings.json")
        settings = (file.parent / "settings.json").read_text()
        assert '"illava"' in settings
        (file.parent / "settings.json").write_text(settings.replace('"illava"', '"own.py:mine"'))
        with pytest.raises(MergeConfigError, match="own.py:mine"):
            patch(model, preset=str(file.parent / "settings.json"))
        assert not (file.parent / "ran").exists()
        find_method("own.py:mine")
        assert (file.parent / "ran").exists()


class TestCommands:
    def test_ask(self, file: Path) -> None:
        file.write_text(CENTRE.replace("    return", "    open('scored', 'a').close()\n    return"))
        answer = json.loads(run("ask", "--json", "--method", "own.py:mine"))["answers"][0]
        assert answer["merged"] and answer["report"]["visuals"] and (file.parent / "scored").exists()

    @pytest.mark.parametrize("command", ["ask --method", "visualize --method", "evaluate --questions 2 --methods"])
    def test_that_fails_is_told_in_one_line(self, file: Path, command: str) -> None:
        file.write_text(CENTRE.replace("    return", "    inputs.hidden_states\n    return"))
        done = CliRunner().invoke(app, [*command.split(), "own.py:mine"])
        assert done.exit_code == 2
        said = done.stderr.splitlines()[-1]
        assert said.startswith("error: your method failed (own.py, line 4: AttributeError: ") and "--debug" in said
        again = CliRunner().invoke(app, [*command.split(), "own.py:mine", "--debug"])
        assert isinstance(again.exception, AttributeError)

    def test_visualize(self, file: Path) -> None:
        for method in ("own.py:mine", "fastv"):
            run("visualize", "--method", method, "--output", method.partition(".")[0])
        one, other = (sorted((file.parent / folder).glob("*.png")) for folder in ("own", "fastv"))
        assert len(one) == len(other) > 0
        assert any(a.read_bytes() != b.read_bytes() for a, b in zip(one, other, strict=True))

    @needs_ready_features
    def test_bench(self, file: Path) -> None:
        options = "--model tiny --rounds 1 --new-tokens 1 --method own.py:mine".split()
        assert "Worth it?" in run("bench", *options)

    def test_evaluate(self, file: Path) -> None:
        table = run("evaluate", "--questions", "5", "--methods", "own.py:mine,fastv", "--kept", "0.3333")
        mine, stock = (line.split("|")[2:] for line in table.splitlines() if "| 0.333 |" in line)
        assert "| centre | both | 0.333 |" in table and mine != stock

    @pytest.mark.parametrize("command", ["ask", "visualize", "evaluate", "bench --shape any"])
    def test_a_wrong_one_is_told_before_anything_is_loaded(self, file: Path, command: str) -> None:
        option = "--methods" if command == "evaluate" else "--method"
        done = CliRunner().invoke(app, [*command.split(), option, "own.py:other"])
        assert done.exit_code == 2 and done.stderr.count("\n") == 1 and "method is 'own.py:other'" in done.stderr

    def test_batch(self, file: Path) -> None:
        """Each process looks the file up for itself."""
        file.write_text(CENTRE.replace("    return", "    open('scored', 'a').close()\n    return"))
        line = {"image": str(tiny.media("scene.png")), "question": "how many circles are there ?"}
        (file.parent / "rows.jsonl").write_text(json.dumps(line))
        run("batch", "--input", "rows.jsonl", "--output", "answers", "--method", "own.py:mine")
        assert (file.parent / "scored").exists()

    def test_arguments_of_a_harness(self, file: Path) -> None:
        settings, left = split_arguments({"pretrained": "x", "method": "own.py:mine"})
        assert settings["method"].name == "centre" and left == {"pretrained": "x"}
        assert split_arguments({"method": "nearest"})[0] == {"method": "nearest"}
        with pytest.raises(MergeConfigError, match="method is 'best'"):
            split_arguments({"method": "best"})


class TestObjects:
    def test_evaluate(self, file: Path) -> None:
        model, processor = tiny.load(FAMILY)
        items = scene_items(5)
        settings: dict[str, Any] = {"kept": 1 / 3, "progress": False}
        rows = illava_hooks.evaluate(model, processor, items, [OBJECT, "fastv"], **settings)
        assert [row.method for row in rows] == ["none", "centre", "fastv"] and rows[1].divergence != rows[2].divergence
        (_, named) = illava_hooks.evaluate(model, processor, items, "own.py:mine", **settings)
        assert (named.answers, named.divergence) == (rows[1].answers, rows[1].divergence)
        session = patch(model, method=OBJECT)
        assert session.config.method is OBJECT

    @pytest.mark.parametrize(
        "methods",
        [
            [OBJECT, Method("centre")],
            [Method("illava", merge="drop")],
            [Method("none")],
            [Method("downsample")],
            ["fastv", Method("fastv", merge="nearest")],
        ],
        ids=["two of one's own", "one of ours", "none", "a control", "ours beside it"],
    )
    def test_two_of_one_name_are_refused(self, methods: list[Any]) -> None:
        model, processor = tiny.load(FAMILY)
        with pytest.raises(InputError, match="two methods are called"):
            illava_hooks.evaluate(model, processor, scene_items(1), methods, progress=False)

    @needs_ready_features
    def test_bench_and_pictures(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, processor = tiny.load(FAMILY)
        found = bench.compare(model, bench.Workload(text=8, new=1), {"method": OBJECT}, rounds=1, warm_up=False)
        assert found.merged[0].merged
        monkeypatch.setitem(bench.SWEEPS, "methods", ("fastv",))
        load = bench.Workload(text=8, new=1)
        rows = list(bench.sweep(model, "methods", load, {"method": OBJECT}, 1, lambda label: None))
        assert [row.label for row in rows] == ["fastv", "centre"]
        inputs = build_inputs(processor, load_media(tiny.media("scene.png")), "how many circles are there ?")
        assert merge_maps(model, processor, inputs, method=OBJECT)


class TestIdentity:
    """What a method is: equal for equal code, another for any change that can change what it does."""

    @pytest.mark.parametrize("name", METHODS)
    def test_of_the_librarys_own(self, name: str) -> None:
        assert identity(METHODS[name]) == identity(METHODS[name]) is not None
        assert len({identity(method) for method in METHODS.values()}) == len(METHODS)

    def test_a_file_that_is_run_again_is_the_same(self, file: Path) -> None:
        first = identity(find_method("own.py:mine"))
        file.write_text("# a comment\n" + CENTRE)
        assert identity(find_method("own.py:mine")) == first is not None

    @pytest.mark.parametrize(
        "change",
        [
            ("-(inputs", "(inputs"),
            (".float()", ".double()"),
            ("keepdim=True", "keepdim=bool(1)"),
            ('merge="drop"', 'merge="nearest"'),
            ("def centre(inputs):", "def centre(inputs, by=1):"),
            ("    return -(", "    return -SCALE * ("),
            ("    return -(", "    return helped(1) * ("),
        ],
    )
    def test_any_change_shows(self, file: Path, change: tuple[str, str]) -> None:
        first = identity(find_method("own.py:mine"))
        head = "SCALE = 2\ndef helped(x):\n    return [x for _ in range(1)][0]\n"
        file.write_text(head + CENTRE.replace(*change))
        assert identity(find_method("own.py:mine")) not in (first, None)

    @pytest.mark.parametrize(("before", "after"), [("SCALE = 2", "SCALE = 3"), ("return x", "return x + 1")])
    def test_what_it_refers_to_counts(self, file: Path, before: str, after: str) -> None:
        """Globals, helpers, and names that only a function inside of it uses."""
        text = "SCALE = 2\ndef helped(x):\n    return x\n" + CENTRE.replace(
            "return -(", "return (lambda: helped(SCALE))() * -("
        )
        file.write_text(text)
        first = identity(find_method("own.py:mine"))
        file.write_text(text.replace(before, after))
        assert identity(find_method("own.py:mine")) not in (first, None)

    def test_closures_objects_and_tensors(self) -> None:
        def made(power: float, weights: torch.Tensor) -> Method:
            return Method("made", encoder_score=lambda inputs: weights.sum() * inputs.positions**power)

        class Scaled:
            def __init__(self, by: float) -> None:
                self.by = by

            def __call__(self, inputs: Any) -> Any:
                return inputs.positions * self.by

        one = torch.ones(2)
        assert identity(made(2, one)) == identity(made(2, one.clone()))
        assert len({identity(made(2, one)), identity(made(3, one)), identity(made(2, one * 2))}) == 3
        scaled = [identity(Method("made", encoder_score=Scaled(by))) for by in (1.0, 1.0, 2.0)]
        assert scaled[0] == scaled[1] != scaled[2] and None not in scaled

    def test_what_cannot_be_told_is_none(self) -> None:
        state = iter([1.0])
        assert identity(Method("made", encoder_score=lambda inputs: inputs.positions * next(state))) is None

    #: Ways to write a score, by name; in each `1.5` is what an edit changes.
    FORMS = {
        "dataclass that is called": """
from dataclasses import dataclass
@dataclass(frozen=True)
class Score:
    columns: int = 8
    def __call__(self, inputs):
        return inputs.positions % self.columns * 1.5
score = Score()
""",
        "dataclass with slots": """
from dataclasses import dataclass
@dataclass(slots=True)
class Score:
    columns: int = 8
    def __call__(self, inputs):
        return inputs.positions % self.columns * 1.5
score = Score()
""",
        "class of the user's own above it": """
class Base:
    def __call__(self, inputs):
        return inputs.positions * 1.5
class Score(Base):
    def __init__(self):
        self.by = 1
score = Score()
""",
        "class with a promise": """
from abc import ABC
from typing import Protocol
class Promise(Protocol):
    def __call__(self, inputs): ...
class Score(ABC, Promise):
    def __call__(self, inputs):
        return inputs.positions * 1.5
    def __init__(self):
        self.by = 1
score = Score()
""",
        "list of the class": """
class Score:
    weights = [1, 1.5]
    def __call__(self, inputs):
        return inputs.positions * self.weights[1]
    def __init__(self):
        self.by = 1
score = Score()
""",
        "tensor of the class": """
import torch
class Score:
    weights = torch.tensor([1, 1.5])
    def __call__(self, inputs):
        return inputs.positions * self.weights[1]
    def __init__(self):
        self.by = 1
score = Score()
""",
        "static method": """
class Score:
    @staticmethod
    def weighed(x):
        return x * 1.5
    def __call__(self, inputs):
        return self.weighed(inputs.positions)
    def __init__(self):
        self.by = 1
score = Score()
""",
        "property": """
class Score:
    @property
    def weight(self):
        return 1.5
    def __call__(self, inputs):
        return self.weight * inputs.positions
    def __init__(self):
        self.by = 1
score = Score()
""",
    }

    @pytest.mark.parametrize("form", FORMS)
    def test_an_edit_shows_in_every_form(self, file: Path, form: str) -> None:
        text = self.FORMS[form] + "from illava_hooks import Method\nmine = Method('mine', encoder_score=score)\n"
        found = []
        for body in (text, text, text.replace("1.5", "2.5")):
            file.write_text(body)
            found.append(identity(find_method("own.py:mine")))
        assert found[0] == found[1] != found[2] and None not in found

    def test_a_module_behind_a_module(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        names = ("helper_of_mine", "helper_of_its")
        file.write_text(
            "import helper_of_mine\nfrom illava_hooks import Method\n"
            "mine = Method('mine', encoder_score=lambda inputs: helper_of_mine.f(inputs.positions))\n"
        )
        (file.parent / "helper_of_mine.py").write_text("from helper_of_its import g\ndef f(x):\n    return g(x)\n")
        found = []
        for factor in ("1", "1", "22"):
            (file.parent / "helper_of_its.py").write_text(f"def g(x):\n    return x * {factor}\n")
            for name in names:
                monkeypatch.delitem(sys.modules, name, raising=False)
            found.append(identity(find_method("own.py:mine")))
        for name in names:
            monkeypatch.delitem(sys.modules, name, raising=False)
        assert found[0] == found[1] != found[2] and None not in found

    def test_a_package_that_was_edited_in_its_place(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = file.parent / "packages"
        folder.mkdir()
        monkeypatch.setattr(installed, "_folders", lambda: (str(folder),))
        monkeypatch.syspath_prepend(str(folder))
        file.write_text(
            "from some_package import f\nfrom illava_hooks import Method\nmine = Method('mine', encoder_score=f)\n"
        )
        found = []
        for factor in ("1", "1", "22"):
            (folder / "some_package.py").write_text(f"def f(inputs):\n    return inputs.positions * {factor}\n")
            monkeypatch.delitem(sys.modules, "some_package", raising=False)
            found.append(identity(find_method("own.py:mine")))
        monkeypatch.delitem(sys.modules, "some_package", raising=False)
        assert found[0] == found[1] != found[2] and None not in found

    def test_what_no_code_names_cannot_be_told(self) -> None:
        assert identity(Method("made", encoder_score=lambda inputs: globals()["FAMILY"])) is None
