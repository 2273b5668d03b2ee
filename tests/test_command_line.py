"""The command line as a whole: fast help, a version, completion, JSON from every command, the time left."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import illava_hooks
from families import families, family_of
from illava_hooks import METHODS, tiny
from illava_hooks.cli import app
from illava_hooks.methods import ABOUT
from illava_hooks.tools import progress as telling
from illava_hooks.tools.progress import Bar, status

COMMANDS = sorted(str(command.callback.__name__) for command in app.registered_commands)
ROOT = Path(__file__).parents[1]


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)))


def fresh(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "illava_hooks", *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


class TestHelp:
    def test_comes_at_once(self) -> None:
        """CPU seconds, of the fastest of a few: the machine may be busy."""
        best = 9.0
        for _ in range(4):
            before = os.times()
            assert fresh("--help").returncode == 0
            after = os.times()
            best = min(best, sum(after[2:4]) - sum(before[2:4]))
            if best < 0.5:
                break
        assert best < 0.5

    @pytest.mark.parametrize("command", COMMANDS)
    def test_of_a_command_loads_nothing_heavy(self, command: str) -> None:
        script = (
            "import sys\nfrom typer.testing import CliRunner\nfrom illava_hooks.cli import app\n"
            f"assert CliRunner().invoke(app, [{command!r}, '--help']).exit_code == 0\n"
            "print([name for name in ('torch', 'transformers', 'numpy', 'PIL', 'av') if name in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert done.stdout.strip() == "[]", done.stderr

    def test_every_name_of_the_package_comes_when_it_is_asked_for(self) -> None:
        script = (
            "import sys, illava_hooks\nassert 'torch' not in sys.modules\n"
            "assert set(illava_hooks.__all__) <= set(dir(illava_hooks))\n"
            "print(all(getattr(illava_hooks, name) is not None for name in illava_hooks.__all__))"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert done.stdout.strip() == "True", done.stderr
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            _ = illava_hooks.nothing

    def test_version(self) -> None:
        done = run("--version")
        assert done.exit_code == 0 and done.stdout == f"illava-hooks {version('illava-hooks')}\n"

    def test_completion(self) -> None:
        """Of commands and of the values of options, as a shell asks for them."""
        assert "--show-completion" in run("--help").stdout
        asked = {"_ILLAVA_HOOKS_COMPLETE": "complete_bash", "COMP_CWORD": "1"}
        script = "from illava_hooks.cli import app; app(prog_name='illava-hooks')"

        def completed(words: str, number: int) -> list[str]:
            environment = os.environ | asked | {"COMP_WORDS": words, "COMP_CWORD": str(number)}
            done = subprocess.run(
                [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
            )
            return done.stdout.split()

        assert {"batch", "bench"} <= set(completed("illava-hooks b", 1))
        assert set(completed("illava-hooks ask --model tiny", 3)) == set(tiny.ALIASES)
        assert set(completed("illava-hooks ask --dtype b", 3)) == {"bfloat16"}


class TestArguments:
    def test_stand_for_themselves_or_behind_options(self) -> None:
        scene, question = tiny.media("scene.png"), "how many stars are there ?"
        bodies = [
            json.loads(run("ask", *given, "--json").stdout)
            for given in (
                [scene, question],
                ["--input", scene, "--question", question],
                [scene, "--question", question],
            )
        ]
        texts = {(body["question"], body["answers"][0]["text"]) for body in bodies}
        assert len(texts) == 1 and texts.pop()[0] == question

    @pytest.mark.parametrize("command", ["ask", "visualize"])
    def test_are_not_given_twice(self, command: str) -> None:
        done = run(command, tiny.media("scene.png"), "--input", "other.png")
        assert done.exit_code == 2 and "PICTURE is" in done.stderr and "--input is 'other.png'" in done.stderr
        done = run(command, tiny.media("scene.png"), "how ?", "--question", "what ?")
        assert done.exit_code == 2 and "QUESTION is 'how ?' and --question is 'what ?'" in done.stderr


class TestJson:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_is_an_option_of_every_command(self, command: str) -> None:
        options = {p.name: p.opts for p in typer.main.get_command(app).commands[command].params}  # type: ignore[attr-defined]
        assert options["as_json"] == ["--json"]

    def test_of_pictures_rows_and_answers(self, tmp_path: Path) -> None:
        drawn = json.loads(run("visualize", "--json", "--output", tmp_path / "out").stdout)
        assert drawn["files"] and all(Path(file).is_file() for file in drawn["files"])
        done = run("evaluate", "--json", "--questions", "3", "--methods", "fastv", "--kept", "0.5")
        rows = json.loads(done.stdout)
        assert [row["method"] for row in rows] == ["none", "fastv"] and rows[1]["questions"] == 3
        (tmp_path / "rows.jsonl").write_text('{"question": "how many ?"}\n')
        done = run("batch", "--json", "--input", tmp_path / "rows.jsonl", "--output", tmp_path / "answers")
        found = json.loads(done.stdout)
        assert found["errors"] == 0 and len(Path(found["answers"]).read_text().splitlines()) == 1
        assert "answering" in done.stderr

    def test_of_a_report_has_its_sentence(self) -> None:
        (answer,) = json.loads(run("ask", "--json").stdout)["answers"]
        assert re.match(r"[\d.]+x fewer visual tokens, ", answer["report"]["summary"])


class TestInfo:
    @pytest.mark.parametrize("family", families(embedded=True))
    def test_explains_methods_and_presets(self, family: str) -> None:
        done = run("info", "--model", family_of(family).embedded)
        assert set(ABOUT) == set(METHODS) and all(len(text) > 20 for text in ABOUT.values())
        lines = done.stdout.splitlines()
        for name, text in ABOUT.items():
            assert f"  {name:<15} {text}" in lines
        (image,) = [line for line in lines if line.strip().startswith("preset image:")]
        preset = tiny.presets(family)["image"]
        assert f"encoder layers {preset['vit_layers']} remove" in image
        assert f"decoder layers {preset['llm_layers']} keep {preset['llm_ratio']:.4g}" in image


class Screen(io.StringIO):
    """A terminal that keeps all it was sent."""

    def isatty(self) -> bool:
        return True


def look(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """Within a test: pytest puts its own standard error in place when a test begins."""
    screen = Screen()
    monkeypatch.setattr(telling.sys, "stderr", screen)
    monkeypatch.setattr(telling, "PATIENCE_S", 0.15)
    monkeypatch.setattr(telling, "EVERY_S", 0.02)
    return screen


class TestTheTimeLeft:
    def test_is_shown_after_a_while_and_leaves_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        screen = look(monkeypatch)
        bar = Bar()
        bar.begin(4, "runs")
        bar.step("in turn")
        assert screen.getvalue() == "", "what is over soon says nothing"
        bar.advance(2)
        time.sleep(0.3)
        bar.note("by the way")
        time.sleep(0.1)
        bar.end()
        drawn = screen.getvalue()
        assert re.search(r"in turn \[#{10} {10}\] 2/4 runs, about 0:0\d left", drawn)
        assert "\r\x1b[Kby the way\n" in drawn and drawn.endswith("\r\x1b[K")

    def test_of_what_was_begun_before_counts_only_what_is_new(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = iter([0.0, 10.0])
        monkeypatch.setattr(telling.time, "monotonic", lambda: next(clock))
        bar = Bar()
        bar.reach(50, 100, "answering", "rows")
        bar.reach(60, 100, "answering", "rows")
        assert bar._left() == ", about 0:40 left"

    def test_is_not_known_of_loading(self, monkeypatch: pytest.MonkeyPatch) -> None:
        screen = look(monkeypatch)
        with status("loading tiny"):
            time.sleep(0.3)
        assert re.search(r"loading tiny \(0:0\d\)", screen.getvalue()) and screen.getvalue().endswith("\r\x1b[K")
        with status("soon over"):
            pass
        assert "soon over" not in screen.getvalue()

    def test_goes_nowhere_but_to_a_terminal(self, capsys: pytest.CaptureFixture[str]) -> None:
        with status("loading"):
            pass
        assert capsys.readouterr().err == ""

    def test_is_gone_after_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        screen = look(monkeypatch)
        with pytest.raises(ZeroDivisionError), status("loading"):
            time.sleep(0.3)
            _ = 1 / 0
        assert screen.getvalue().endswith("\r\x1b[K")
