"""The demo page without a browser: what it reads, answers and shows, that requests take turns, that nothing leaks."""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from demo_server import Server, call, fetch, serving, upload
from families import families, family_of
from illava_hooks import session_of, tiny
from illava_hooks.cli import app
from illava_hooks.demo import forms, view
from illava_hooks.demo.chat import Turn, history, messages
from illava_hooks.demo.engine import Engine, Progress, Request
from illava_hooks.errors import InputError, MergeConfigError
from illava_hooks.tools.ask import answer
from illava_hooks.tools.draw import draw, merge_maps
from illava_hooks.tools.loading import build_inputs
from illava_hooks.tools.media import load_media

HAS_GRADIO = importlib.util.find_spec("gradio") is not None
needs_gradio = pytest.mark.skipif(not HAS_GRADIO, reason="gradio is in the demo extra")
SCENE, QUESTION = str(tiny.media("scene.png")), "how many triangles are there ?"
NONE: tuple[Any, ...] = ("", "", "", "", 0)
#: The family of the model that is taken where none is named, and what the command line calls the others.
(DEFAULT,) = (name for name in families(embedded=True) if family_of(name).embedded == "tiny")
OTHERS = [family_of(name).embedded for name in families(embedded=True) if name != DEFAULT]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine("tiny", *tiny.load(DEFAULT))


def last(engine: Engine, request: Request) -> Progress:
    *_, final = engine.run(request)
    return final


class TestForms:
    def test_files_are_one_prompt(self) -> None:
        pair = [str(tiny.media(f"pair/{name}.png")) for name in ("first", "second")]
        media = forms.media_of(pair, 8)
        assert (media.kind, media.names, len(media.images)) == ("image", ("first.png", "second.png"), 2)
        assert forms.media_of([str(tiny.media("clip.gif"))], 3).kind == "video"

    def test_what_cannot_be_read_is_told_by_its_name(self, tmp_path: Path) -> None:
        broken = tmp_path / "holiday.png"
        broken.write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 50)
        with pytest.raises(InputError, match="^'holiday.png': cannot be read") as told:
            forms.media_of([str(broken)], 8)
        assert str(tmp_path) not in str(told.value)
        for files, why in (
            (None, "no picture yet"),
            ([SCENE] * 17, "17 files"),
            ([SCENE, str(tiny.media("clip.gif"))], "'clip.gif' is a video"),
        ):
            with pytest.raises(InputError, match=why):
                forms.media_of(files, 8)

    def test_fields(self) -> None:
        assert forms.settings_of("tome", "video", NONE) == {"method": "tome", "preset": "video"}
        assert forms.settings_of("tome", "auto", ("3-4", "0.25", " none ", "", "")) == {
            "method": "tome", "preset": "auto", "vit_layers": [3, 4], "vit_r": 0.25, "llm_layers": [],
        }  # fmt: skip
        with pytest.raises(InputError, match="vit_r is 'many'"):
            forms.settings_of("tome", "auto", ("", "many", "", "", ""))

    @pytest.mark.parametrize("number", [7, 1.01, -1, 1e9, "7/2", "-0.5"])
    def test_a_fraction_out_of_range(self, engine: Engine, number: float | str) -> None:
        """By the name that the field has; no such settings are ever used."""
        with pytest.raises(InputError, match="^'Visual tokens kept' is .*; give a fraction up to 1, or 0 for"):
            forms.settings_of("tome", "auto", ("", "", "", "", number))
        words, good = forms.describe(engine.model, "tome", "auto", ("", "", "", "", number))
        assert not good and words.startswith("'Visual tokens kept' is ")

    @pytest.mark.parametrize("number", [0, "0.0", None, ""])
    def test_no_fraction_is_the_presets(self, number: float | str | None) -> None:
        assert forms.settings_of("tome", "auto", ("", "", "", "", number)).get("keep") is None
        assert forms.settings_of("tome", "auto", ("", "", "", "", 1))["keep"] == 1

    def test_questions(self) -> None:
        """The page has one of its own to begin a chat with, and says that it is; later ones are asked for."""
        assert forms.turn_of(" why ? ", "what ?", first=True) == Turn("why ?")
        for empty in ("  ", "", None):
            assert forms.turn_of(empty, "what ?", first=True) == Turn("what ?", own=True)
            with pytest.raises(InputError, match="the question is empty; type one, or press Ask again"):
                forms.turn_of(empty, "what ?", first=False)
        with pytest.raises(InputError, match="2001 characters"):
            forms.turn_of("x" * 2001, "", first=True)

    def test_uploads_add_up_but_a_video_comes_alone(self, tmp_path: Path) -> None:
        clip, other = str(tiny.media("clip.gif")), str(tiny.media("digits.png"))
        (tmp_path / "broken.png").write_bytes(b"no picture at all")
        broken = str(tmp_path / "broken.png")
        for files, before, left in (
            ([], 0, []),
            ([], 2, []),
            ([SCENE], 0, [SCENE]),
            ([SCENE, other], 1, [SCENE, other]),
            ([SCENE], 2, [SCENE]),
            ([clip, SCENE], 1, [SCENE]),
            ([clip, SCENE, other], 1, [SCENE, other]),
            ([SCENE, other, clip], 2, [clip]),
            ([clip, clip], 1, [clip]),
            ([SCENE, clip], 0, [SCENE, clip]),
            ([SCENE, broken], 1, [SCENE, broken]),
        ):
            assert forms.latest(files, before, 4) == left, (files, before)

    def test_settings_in_words(self, engine: Engine) -> None:
        words, good = forms.describe(engine.model, "illava", "image", NONE)
        assert good
        assert words == "encoder layers 3, 4 each remove 16 of the patches; decoder layer 2 keeps 70% of the tokens."
        words, good = forms.describe(engine.model, "illava", "auto", ("none", "", "none", "", ""))
        assert good and words == "nothing is removed."
        words, good = forms.describe(engine.model, "illava", "auto", ("8", "", "", "", ""))
        assert not good and "allows 0..7" in words
        assert "of 0 to 7" in forms.limits_of(engine.model)["vit_layers"]
        assert "a tile has 64" in forms.limits_of(engine.model)["vit_r"]


class TestEngine:
    def test_answers_are_those_of_the_tools(self, engine: Engine) -> None:
        media = load_media(SCENE)
        found = list(engine.run(Request(media, QUESTION)))
        assert [one.finished for one in found].index(True) == len(found) - 1
        final, inputs = found[-1], build_inputs(engine.processor, media, QUESTION)
        alone = answer(engine.model, engine.processor, inputs, merge=False)
        assert session_of(engine.model) is None
        assert final.answers[False].text == alone.text == final.texts[False] == "2"
        assert final.answers[False].report is None and not final.answers[False].merged
        report = final.answers[True].report
        assert report is not None and report.visuals[0].vision_tokens[-1] == 160
        maps = merge_maps(engine.model, engine.processor, inputs)
        assert [(m.stage, m.layer, m.kept, m.total) for m in final.maps] == [
            (m.stage, m.layer, m.kept, m.total) for m in maps
        ]
        assert all((a.keepers == b.keepers).all() for a, b in zip(final.maps, maps, strict=True))

    def test_text_streams(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        def slow(model: Any, processor: Any, inputs: Any, merge: bool, most: int, show: Any) -> Any:
            for piece in ("one ", "two ", "three"):
                show(piece)
                time.sleep(0.05)
            return answer(model, processor, inputs, merge, most)

        monkeypatch.setattr("illava_hooks.demo.engine.answer", slow)
        seen = [one.texts for one in engine.run(Request(load_media(SCENE), QUESTION, (True,)))]
        assert seen[:3] == [{True: "one "}, {True: "one two "}, {True: "one two three"}]

    @pytest.mark.parametrize(("seconds", "runs"), [(0.01, 5), (0.5, 3), (1.5, 1)])
    def test_quick_answers_are_timed_again_in_turn(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch, seconds: float, runs: int
    ) -> None:
        """Medians of both sides; slow answers are timed as they come."""
        order: list[bool] = []

        def timed(model: Any, processor: Any, inputs: Any, merge: bool, most: int, show: Any) -> Any:
            order.append(merge)
            spread = (0.0, 0.004, 0.001, 0.002, 0.003)[sum(one is merge for one in order) - 1]
            found = answer(model, processor, inputs, merge, most, show)
            return replace(found, prefill_s=seconds + spread, decode_s=0.0)

        monkeypatch.setattr("illava_hooks.demo.engine.answer", timed)
        final = last(engine, Request(load_media(SCENE), QUESTION))
        assert final.runs == runs and order == [False, True] * runs
        if runs == 5:
            assert final.answers[True].prefill_s == seconds + 0.002
        assert final.texts == {False: "2", True: "2"}

    @pytest.mark.parametrize("sides", [(True,), (False,)])
    def test_one_side(self, engine: Engine, sides: tuple[bool, ...]) -> None:
        final = last(engine, Request(load_media(SCENE), QUESTION, sides))
        assert tuple(final.answers) == sides and bool(final.maps) == sides[0]

    def test_settings_that_remove_nothing(self, engine: Engine) -> None:
        final = last(engine, Request(load_media(SCENE), QUESTION, settings={"vit_r": 0, "llm_ratio": 1.0}))
        assert final.notes == ("These settings remove nothing.",) and final.maps == ()
        assert final.texts[True] == final.texts[False]

    def test_without_a_map_the_answers_stay(self, engine: Engine) -> None:
        settings = {"method": "illava-reference", "vit_layers": [3], "vit_r": 15}  # 49 patches are left
        final = last(engine, Request(load_media(SCENE), QUESTION, settings=settings))
        assert set(final.answers) == {False, True} and "There is no map: method is" in final.notes[0]

    def test_a_map_that_fails_costs_no_answer(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*_: Any, **__: Any) -> Any:
            raise ValueError("height and width must be > 0")

        monkeypatch.setattr("illava_hooks.demo.engine.merge_maps", broken)
        final = last(engine, Request(load_media(SCENE), QUESTION))
        assert final.texts == {False: "2", True: "2"} and final.finished and not final.maps
        assert final.notes == ("There is no map (ValueError); the server's log tells more.",)

    @pytest.mark.parametrize("size", [(5000, 10), (3, 2000)], ids=str)
    def test_a_very_long_picture(self, engine: Engine, tmp_path: Path, size: tuple[int, int]) -> None:
        """Is answered and drawn, alone and next to another."""
        Image.new("RGB", size, "navy").save(tmp_path / "strip.png")
        for files in ([tmp_path / "strip.png"], [SCENE, tmp_path / "strip.png"]):
            final = last(engine, Request(forms.media_of(list(map(str, files)), 8), QUESTION))
            assert set(final.texts) == {False, True} and final.notes == ()
            pair = view.compared(final.maps, len(view.steps(final.maps)), True)
            assert pair is not None and pair[0].size == pair[1].size and min(pair[0].size) >= 100

    def test_unknown_words_are_told(self, engine: Engine) -> None:
        final = last(engine, Request(load_media(SCENE), "is there a zebra ?", (False,)))
        assert final.notes == ("This model does not know the word zebra.",)
        final = last(engine, Request(load_media(SCENE), "is there a zebra a dragon ?", (False,)))
        assert final.notes == ("This model does not know the words zebra, dragon.",)

    def test_an_error_leaves_the_model_as_it_was(self, engine: Engine) -> None:
        with pytest.raises(MergeConfigError, match="vit_layers contains 99"):
            last(engine, Request(load_media(SCENE), QUESTION, settings={"vit_layers": [99]}))
        assert session_of(engine.model) is None
        assert last(engine, Request(load_media(SCENE), QUESTION)).texts[False] == "2"

    def test_too_little_memory_is_told(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr("illava_hooks.demo.engine.answer", full)
        with pytest.raises(InputError, match="too little memory"):
            last(engine, Request(load_media(SCENE), QUESTION))

    def test_requests_take_turns(self, engine: Engine) -> None:
        """Each gets the report of its own settings, whoever asks at the same time."""
        amounts = (4, 8, 12, 20)
        wanted: list[dict[str, Any]] = [{"vit_r": one, "vit_layers": [3], "llm_layers": []} for one in amounts]
        found: dict[int, Progress] = {}

        def ask(number: int) -> None:
            found[number] = last(engine, Request(load_media(SCENE), QUESTION, (True,), wanted[number]))

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(wanted))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        reports = [found[number].answers[True].report for number in range(len(wanted))]
        left = [report.visuals[0].vision_tokens[-1] for report in reports if report is not None]
        assert left == [5 * (64 - one) for one in amounts]
        assert [one.maps[0].kept for one in (found[n] for n in range(4))] == left

    def test_who_goes_away_stops_the_generation(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        shown = []

        def endless(model: Any, processor: Any, inputs: Any, merge: bool, most: int, show: Any) -> Any:
            for number in range(10_000):
                shown.append(number)
                show("word ")
                time.sleep(0.01)

        monkeypatch.setattr("illava_hooks.demo.engine.answer", endless)
        stream = engine.run(Request(load_media(SCENE), QUESTION))
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        monkeypatch.undo()
        assert last(engine, Request(load_media(SCENE), QUESTION)).texts[False] == "2"
        assert len(shown) < 5_000 and session_of(engine.model) is None

    @pytest.mark.parametrize("name", families(embedded=True))
    def test_warm_up_leaves_no_trace(self, name: str) -> None:
        engine = Engine(name, *tiny.load(name))
        engine.warm_up()
        assert session_of(engine.model) is None

    def test_a_closed_engine_answers_no_more(self) -> None:
        engine = Engine("tiny", *tiny.load(DEFAULT))
        engine.close()
        with pytest.raises(Exception, match="the page is closing"):
            last(engine, Request(load_media(SCENE), QUESTION))


class TestView:
    def test_costs(self, engine: Engine) -> None:
        final = last(engine, Request(load_media(SCENE), QUESTION))
        html = view.costs(final.answers, engine.model)
        _, *cells = re.findall(r"<td>([^<]*)</td>", html)  # above the names there is an empty one
        report = final.answers[True].report
        assert report is not None
        assert "320 → 240 → 160" in cells and "176 → 123" in cells and "336" in cells
        kept = [f"{n / 1e6:.3f} MB" for n in reversed(report.kv_bytes)]
        assert cells[9:12] == [f"{report.kv_bytes[1] / report.kv_bytes[0]:.1f}x", *kept]
        assert cells[0] == f"{report.flops[1] / report.flops[0]:.1f}x" and cells[3] == "2.0x"
        assert view.kv_bytes_of(engine.model, report.prompt_tokens[0]) == report.kv_bytes[1]
        assert view.costs({}, engine.model) == ""

    def test_costs_of_one_side(self, engine: Engine) -> None:
        final = last(engine, Request(load_media(SCENE), QUESTION, (False,)))
        html = view.costs(final.answers, engine.model)
        assert "without merging" in html and ">with merging" not in html and "0.799 MB" in html
        assert "less by" not in html and "x</td>" not in html

    def test_ratios_and_numbers_of_runs(self, engine: Engine) -> None:
        answers = last(engine, Request(load_media(SCENE), QUESTION)).answers
        timed = {
            False: replace(answers[False], prefill_s=0.3, decode_s=0.02),
            True: replace(answers[True], prefill_s=0.2, decode_s=0.0),
        }
        html = view.costs(timed, engine.model, 3)
        first = html[html.index("Time to first token") :]
        assert re.findall(r"<td>([^<]*)</td>", first) == ["1.5x", "300.0 ms", "200.0 ms", "", "20.0 ms", "–"]
        slow = {False: replace(answers[False], decode_s=0.02), True: replace(answers[True], decode_s=0.04)}
        assert "<td>2.0x more</td><td>20.0 ms</td><td>40.0 ms</td>" in view.costs(slow, engine.model)
        assert "medians of 3 measurements" in html and "medians" not in view.costs(timed, engine.model)

    @pytest.mark.parametrize(
        ("merged", "plain", "words"),
        [
            (1, 2, "2.0x"),
            (2, 1, "2.0x more"),
            (1, 1, "1.0x"),
            (1.04, 1, "1.0x"),
            (1.06, 1, "1.1x more"),
            (100, 1, "100.0x more"),
            (0, 1, ""),
            (1, 0, ""),
        ],
    )
    def test_no_factor_is_below_one(self, merged: float, plain: float, words: str) -> None:
        assert view._less(merged, plain) == words

    def test_what_a_chat_is_about_stands_in_its_place(self) -> None:
        assert view.hint(()) == view.HINT
        assert view.hint(("a.png",)).startswith("A new chat about `a.png`: ask a question.")
        assert "about 3 images" in view.hint(("a.png", "b.png", "c.png"))
        assert "took the place of what lay there. A new chat about `b.mp4`" in view.hint(("b.mp4",), replaced=True)

    def test_notes_are_text(self) -> None:
        html = view.note(("<script>alert(1)</script>",), failed=True)
        assert "<script>" not in html and 'role="alert"' in html
        assert view.note(()) == ""

    @pytest.mark.parametrize("names", [("scene.png",), ("pair/first.png", "pair/second.png"), ("clip.gif",)])
    def test_pictures_of_the_slider(self, engine: Engine, names: tuple[str, ...]) -> None:
        media = forms.media_of([str(tiny.media(name)) for name in names], 8)
        maps = last(engine, Request(media, QUESTION, (True,))).maps
        seen = [view.picture(maps, step) for step in range(len(view.steps(maps)) + 1)]
        assert len(seen) == 4
        values = [torch.tensor(list(one.convert("L").tobytes())).float().mean() for one in seen if one is not None]
        assert len(values) == 4 and values[0] > values[1] > values[2]
        coloured = view.picture(maps, 2, colours=True)
        assert coloured is not None and coloured.tobytes() != seen[2].tobytes()
        captions = [view.caption(maps, step) for step in range(4)]
        here = [m for m in maps if (m.stage, m.layer) == view.steps(maps)[0]]
        kept, total = sum(m.kept for m in here), sum(m.total for m in here)
        assert captions[0] == "The input, as the model sees it." and f"{kept} of {total} patches" in captions[1]

    def test_one_image_is_drawn_as_the_tool_does(self, engine: Engine) -> None:
        maps = last(engine, Request(load_media(SCENE), QUESTION, (True,))).maps
        found = view.picture(maps, 3)
        assert found is not None and found.tobytes() == draw(maps[2])[0].tobytes()
        assert view.picture((), 0) is None and view.caption((), 0) == ""

    @pytest.mark.parametrize("names", [("scene.png",), ("pair/first.png", "pair/second.png"), ("clip.gif",)])
    def test_the_input_lies_under_every_position(self, engine: Engine, names: tuple[str, ...]) -> None:
        maps = last(
            engine, Request(forms.media_of([str(tiny.media(name)) for name in names], 8), QUESTION, (True,))
        ).maps
        for step in range(1, len(view.steps(maps)) + 1):
            found = view.compared(maps, step, True)
            assert found is not None
            before, after = found
            assert before.size == after.size and before.tobytes() != after.tobytes()
            assert before.tobytes() == view.picture(maps, 0).tobytes()
        assert view.compared((), 0, True) is None

    def test_the_headline_has_the_ratios(self, engine: Engine) -> None:
        final = last(engine, Request(load_media(SCENE), QUESTION))
        report = final.answers[True].report
        assert report is not None
        assert view.headline(final.answers) == f'<p class="ratios">{report.summary}</p>'
        assert view.headline({}) == view.headline({False: final.answers[False]}) == ""

    def test_times_of_a_toy_are_grey(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        answers = last(engine, Request(load_media(SCENE), QUESTION)).answers
        html = view.costs(answers, engine.model)
        assert html.count("<tr class=") == 2 and "too small" in html
        monkeypatch.setattr("illava_hooks.tools.ask._LARGE", 1_000_000)
        assert "too small" not in view.costs(answers, engine.model) and "<tr class=" not in view.costs(
            answers, engine.model
        )


class TestAChat:
    TURNS = (
        Turn("how many triangles are there ?", {False: "2", True: "3"}),
        Turn("is there a star ?", {False: "yes"}),
    )

    def test_each_side_has_its_own_answers(self) -> None:
        assert history(self.TURNS, True) == [(QUESTION, "3"), ("is there a star ?", "yes")]
        assert history(self.TURNS, False)[0] == (QUESTION, "2")
        assert history([Turn("lost ?")], True) == []

    def test_messages(self) -> None:
        said = [(one["role"], one["content"]) for one in messages((*self.TURNS, Turn("list ?", {True: "a\n- b"})))]
        assert said == [
            ("user", QUESTION), ("assistant", "**Without merging:** 2"), ("assistant", "**With merging:** 3"),
            ("user", "is there a star ?"), ("assistant", "**Without merging:** yes"),
            ("user", "list ?"), ("assistant", "**With merging:**\n\na\n- b"),
        ]  # fmt: skip

    def test_a_question_of_the_page_is_told_from_the_visitors(self) -> None:
        own, typed = messages([Turn(QUESTION, own=True), Turn(QUESTION)])
        assert own["content"] == f"{QUESTION}\n\n*The page's question, as the field was empty.*"
        assert typed["content"] == QUESTION

    def test_a_chat_is_not_endless(self) -> None:
        forms.check_turns(self.TURNS)
        with pytest.raises(InputError, match="has 20 questions"):
            forms.check_turns([None] * 20)

    @pytest.mark.parametrize("name", families(embedded=True))
    def test_the_prompt_is_the_whole_chat(self, name: str) -> None:
        """As the chat template writes it, with the picture in front of the first question only."""
        model, processor = tiny.load(name)
        media = load_media(SCENE)
        alone = build_inputs(processor, media, QUESTION)
        inputs = build_inputs(processor, media, "is there a star ?", turns=[(QUESTION, "2")])
        text = processor.tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=False)
        first = processor.tokenizer.decode(alone["input_ids"][0], skip_special_tokens=False)
        assert text.startswith(first) and text.count(QUESTION) == 1 and text.count("is there a star ?") == 1
        assert text.index(QUESTION) < text.index("assistant") < text.index("is there a star ?")
        torch.testing.assert_close(inputs["pixel_values"], alone["pixel_values"])
        engine = Engine(name, model, processor)
        final = last(engine, Request(media, "is there a star ?", turns=(Turn(QUESTION, {False: "2", True: "2"}),)))
        report = final.answers[True].report
        assert report is not None and final.answers[True].prompt_tokens == inputs["input_ids"].shape[1]
        assert report.prompt_tokens == (inputs["input_ids"].shape[1],) and report.kept_fraction < 0.5
        assert final.answers[False].text == answer(model, processor, inputs).text

    def test_a_follow_up_holds(self, engine: Engine) -> None:
        """What the page's first example leads to: a second question about the same scene, answered alike both ways."""
        turns = (Turn(QUESTION, {False: "2", True: "2"}),)
        final = last(engine, Request(load_media(SCENE), "what color is the star ?", turns=turns))
        assert final.texts == {False: "blue", True: "blue"} and final.maps


@pytest.mark.parametrize("name", families(embedded=True))
def test_examples_hold(name: str) -> None:
    """What the page offers with one click, with its own settings, is answered alike both ways."""
    from illava_hooks.demo.page import EXAMPLES, METHOD

    one = Engine(family_of(name).embedded or "", *tiny.load(name))
    for title, (names, question) in EXAMPLES.items():
        media = forms.media_of([str(tiny.media(file)) for file in names], 8)
        texts = last(one, Request(media, question, settings=forms.settings_of(METHOD, "auto", NONE))).texts
        assert texts[False] and texts[True] == texts[False], title


class TestTheCommand:
    @pytest.mark.skipif(HAS_GRADIO, reason="gradio is installed")
    def test_without_gradio_one_line_says_how_to_get_it(self) -> None:
        result = CliRunner().invoke(app, ["demo"])
        assert result.exit_code == 2 and result.stderr.count("\n") == 1
        assert "pip install 'illava-hooks[demo]'" in result.stderr

    @pytest.mark.parametrize("found", [None, "5.49.1"])
    def test_an_absent_or_old_gradio(self, found: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
        def version(name: str) -> str:
            if found is None:
                raise PackageNotFoundError(name)
            return found

        monkeypatch.setattr("illava_hooks.demo.extra.version", version)
        monkeypatch.setitem(sys.modules, "gradio", None)  # what stands before the page needs none of it
        result = CliRunner().invoke(app, ["demo", "--model", "nowhere"])
        assert result.exit_code == 2 and result.stderr.count("\n") == 1
        assert "needs gradio" in result.stderr and "pip install 'illava-hooks[demo]'" in result.stderr


def test_the_look_for_gradio_loads_nothing_heavy() -> None:
    """Who lacks it is told at once."""
    code = "import sys, illava_hooks.demo.extra; print(sorted({'torch', 'transformers', 'gradio'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


def test_only_loopback_is_local() -> None:
    from illava_hooks.demo.serve import is_local

    assert all(map(is_local, ("127.0.0.1", "localhost", "::1", "[::1]", "127.0.0.2")))
    assert not any(map(is_local, ("0.0.0.0", "::", "192.168.1.2", "example.org", "")))


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("--max-file-size", "1") as running:
        yield running


@needs_gradio
class TestThePage:
    def ask(self, url: str, files: list[Any], *numbers: Any, sides: str = "Side by side", **given: str) -> list[Any]:
        """What a question brings in the end; files are uploaded before."""
        paths = [upload(url, Path(file).name, Path(file).read_bytes())[1][0] for file in files]
        data = [{"path": path, "meta": {"_type": "gradio.FileData"}} for path in paths]
        chosen = {"question": QUESTION, "sides": sides, "method": "illava", "preset": "auto"} | given
        events = call(url, "ask", [None, data, *chosen.values(), *(numbers or NONE)])
        assert events[-2]["msg"] == "process_completed" and events[-2]["success"], events[-2]
        notes, said, _, _, _, table, *_ = events[-2]["output"]["data"]
        texts = ["".join(part["text"] for part in one["content"]) for one in said if one["role"] == "assistant"]
        sides_of = dict(text.removeprefix("**").split(":** ") for text in texts)
        return [notes, sides_of.get("Without merging", ""), sides_of.get("With merging", ""), table]

    def test_both_answers(self, server: Server) -> None:
        notes, plain, merged, table = self.ask(server.url, [SCENE])
        assert (notes, plain, merged) == ("", "2", "2")
        assert "320 → 240 → 160" in table

    @pytest.mark.parametrize(("sides", "answers"), [("On", ("", "2")), ("Off", ("2", ""))])
    def test_the_switch(self, server: Server, sides: str, answers: tuple[str, str]) -> None:
        assert tuple(self.ask(server.url, [SCENE], sides=sides)[1:3]) == answers

    def test_settings_arrive(self, server: Server) -> None:
        found = self.ask(server.url, [SCENE], "1-5", "8", "2-4", "0.5", 0, sides="On", method="nearest")
        assert "320 → 280 → 240" in found[3]

    def test_two_images_and_a_clip(self, server: Server) -> None:
        pair = [tiny.media(f"pair/{name}.png") for name in ("first", "second")]
        assert self.ask(server.url, pair, question="how many circles are in the second image ?")[1] == "1"
        clip = self.ask(server.url, [tiny.media("clip.gif")], question="which way does the circle move ?")
        assert clip[1] == "left" and "512 → 384 → 256" in clip[3]

    @pytest.mark.parametrize("content", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n" + bytes(99), b"no picture at all"])
    def test_a_broken_file_is_told(self, server: Server, content: bytes, tmp_path: Path) -> None:
        broken = tmp_path / "holiday.png"
        broken.write_bytes(content)
        notes, *others = self.ask(server.url, [broken])
        assert 'role="alert"' in notes and "holiday.png" in notes and str(server.folder) not in notes
        assert not any(others)
        assert self.ask(server.url, [SCENE])[1] == "2"

    def test_wrong_settings_and_no_file_are_told(self, server: Server) -> None:
        assert "allows 0..7" in self.ask(server.url, [SCENE], "9", "", "", "", 0)[0]
        assert "llm_ratio is &#x27;half&#x27;" in self.ask(server.url, [SCENE], "", "", "", "half", 0)[0]
        assert "no picture yet" in self.ask(server.url, [])[0]

    @pytest.mark.parametrize("number", [7, -1, 1.5])
    def test_a_fraction_out_of_range_is_one_line(self, server: Server, number: float) -> None:
        """And nothing is asked with another."""
        notes, *others = self.ask(server.url, [SCENE], "", "", "", "", number)
        assert f"&#x27;Visual tokens kept&#x27; is {number}; give a fraction" in notes and not any(others)
        assert (server.folder.parent / "log").read_text() == ""

    def test_large_uploads_are_refused(self, server: Server) -> None:
        status, said = upload(server.url, "film.mp4", bytes(2**20 + 1))
        assert status == 413 and "exceeded maximum allowed size of 1048576 bytes" in said
        assert upload(server.url, "film.mp4", bytes(2**20 - 1))[0] == 200

    @pytest.mark.parametrize("path", [__file__, "/etc/hostname", "../../../../etc/hostname"])
    def test_other_files_are_not_read(self, server: Server, path: str) -> None:
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        events = call(server.url, "ask", [None, [file], QUESTION, "Off", "illava", "auto", *NONE])
        assert not events[-2]["success"]
        assert fetch(f"{server.url}gradio_api/file={path}")[0] in (403, 404)

    def test_other_hosts_are_not_asked_for_files(self, server: Server) -> None:
        file = {"path": "http://example.org/a.png", "meta": {"_type": "gradio.FileData"}}
        events = call(server.url, "ask", [None, [file], QUESTION, "Off", "illava", "auto", *NONE])
        assert events[-2]["output"]["error"] == "only uploaded files are read"
        assert server.hosts() == []

    def test_names_and_origins(self, server: Server) -> None:
        status, headers, body = fetch(server.url)
        assert status == 200 and b"gradio" in body
        assert "default-src 'self'" in headers["content-security-policy"]
        assert fetch(server.url, {"Host": "example.org"})[0] == 400
        assert fetch(server.url, {"Host": "localhost:1"})[0] == 200
        allowed = fetch(server.url, {"Origin": "http://example.org"})[1]["access-control-allow-origin"]
        assert allowed is None

    def test_nothing_in_the_page_comes_from_elsewhere(self, server: Server) -> None:
        body = fetch(server.url)[2].decode()
        assert re.findall(r"""<(?:script|link|img|iframe)[^>]+(?:src|href)=["'](?:https?:)?//[^"']+""", body) == []
        theme = fetch(f"{server.url}theme.css")[2].decode()
        assert re.findall(r"@import|url\((?!['\"]?data:)", theme) == []
        config = json.loads(fetch(f"{server.url}config")[2])
        assert config["stylesheets"] == [] and not config["analytics_enabled"]

    def test_it_listens_on_one_address(self, server: Server) -> None:
        port = int(server.url.rstrip("/").rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            pass
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.2", port), timeout=5)

    @pytest.mark.slow
    def test_a_port_that_is_taken_is_told(self, server: Server) -> None:
        port = server.url.rstrip("/").rpartition(":")[2]
        command = [sys.executable, "-m", "illava_hooks", "demo", "--port", port]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 2 and done.stderr.startswith(f"error: nothing can be served at 127.0.0.1:{port}")
        assert done.stderr.count("\n") == 1

    @pytest.mark.slow
    @pytest.mark.parametrize("model", OTHERS)
    def test_another_family(self, model: str) -> None:
        with serving("--model", model) as other:
            notes, plain, merged, table = self.ask(other.url, [SCENE], question="what color is the star ?")
            assert (notes, plain, merged) == ("", "blue", "blue") and "→" in table
            assert (
                self.ask(other.url, [tiny.media("clip.gif")], question="which way does the circle move ?")[1] == "left"
            )

    @pytest.mark.slow
    @pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")
    def test_ipv6(self) -> None:
        with serving("--host", "::1") as other:
            assert other.url.startswith("http://[::1]:")
            assert fetch(other.url)[0] == 200
            assert fetch(other.url, {"Host": "[2001:db8::1]:80"})[0] == 400

    @pytest.mark.slow
    @pytest.mark.parametrize("host", ["203.0.113.7", "nowhere.invalid"])
    def test_a_host_of_another_machine_is_told(self, host: str) -> None:
        command = [sys.executable, "-m", "illava_hooks", "demo", "--host", host]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 2 and f"nothing can be served at {host}" in done.stderr.splitlines()[-1]

    @pytest.mark.slow
    @pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
    def test_nothing_stays(self, number: signal.Signals, status: int) -> None:
        with serving() as other:
            self.ask(other.url, [SCENE])
            assert list(other.folder.rglob("scene.png"))
            assert other.stop(number) == status
            assert list(other.folder.iterdir()) == [] and other.hosts() == []
            assert sorted(path.name for path in other.folder.parent.iterdir()) == ["log", "tmp"]
            assert (other.folder.parent / "log").read_text() == ""

    def test_no_other_host_was_called(self, server: Server) -> None:
        """The last test of the class: all others are behind it."""
        assert server.hosts() == []
