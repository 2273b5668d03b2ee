"""`evaluate`: every row is what its own run measured, of all items, however they are mixed and ordered."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap
from typer.testing import CliRunner

import illava_hooks
from families import families, family_of
from helpers import assert_says
from illava_hooks import (
    PRESETS,
    InputError,
    MergeConfigError,
    Method,
    PatchStateError,
    patch,
    session_of,
    tiny,
    unpatch,
)
from illava_hooks.cli import app
from illava_hooks.config import MergeSchedule
from illava_hooks.tools import progress as telling
from illava_hooks.tools.datasets import clip_items, pair_items, scene_items
from illava_hooks.tools.evaluate import (
    Row,
    accuracy,
    budget_settings,
    downsampled,
    interval,
    paired_interval,
    print_rows,
    read_rows,
    run_items,
    sweep,
)
from illava_hooks.tools.evaluate import fingerprint as prints
from illava_hooks.tools.evaluate.run import item_inputs
from illava_hooks.tools.items import Item
from illava_hooks.tools.progress import Bar, Progress

FAMILIES = families(embedded=True)
WITH_VIDEOS = families(embedded=True, with_videos=True)

Run = tuple[Any, Any, Any]  #: a model, its processor and items


class Heard(Progress):
    """What a run tells."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.notes: list[str] = []
        self.done = self.total = 0

    def begin(self, total: int, unit: str = "questions", done: int = 0) -> None:
        self.total = total

    def step(self, what: str) -> None:
        self.steps.append(what)

    def advance(self, done: int) -> None:
        self.done += done

    def note(self, text: str) -> None:
        self.notes.append(text)


def measured(model: Any, processor: Any, items: Any, file: Path | None = None, **changes: Any) -> list[Row]:
    """A small run."""
    settings: dict[str, Any] = {"methods": ["fastv"], "stages": ["both"], "fractions": [0.5], "batch_size": 4}
    return sweep(model, processor, items, **{**settings, "file": file, **changes})


def with_weight(model: Any) -> Any:
    model = deepcopy(model)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-3
    return model


def with_template(processor: Any) -> Any:
    processor = deepcopy(processor)
    template = processor.chat_template or processor.tokenizer.chat_template
    processor.chat_template = "{# another #}" + template
    return processor


def with_mean(processor: Any) -> Any:
    processor = deepcopy(processor)
    processor.image_processor.image_mean = [0.4] * 3
    return processor


def with_pixel(items: list[Item]) -> list[Item]:
    picture = items[0].pictures[0].copy()
    picture[0, 0, 0] ^= 1
    return [replace(items[0], pictures=(picture,)), *items[1:]]


def with_penalty(model: Any) -> Any:
    model = deepcopy(model)
    model.generation_config.repetition_penalty = 1e6
    return model


def with_suppressed(model: Any) -> Any:
    model = deepcopy(model)
    model.generation_config.suppress_tokens = [5]
    return model


#: Everything that makes a run another one: what is done to model, processor and items, and what the message names.
OTHER_RUNS: dict[str, tuple[Callable[[Any, Any, Any], Any], str]] = {
    "weights": (lambda m, p, i: (with_weight(m), p, i), "model weights"),
    "precision": (lambda m, p, i: (deepcopy(m).double(), p, i), "model dtype"),
    "penalty": (lambda m, p, i: (with_penalty(m), p, i), "model generation"),
    "suppressed tokens": (lambda m, p, i: (with_suppressed(m), p, i), "model generation"),
    "template": (lambda m, p, i: (m, with_template(p), i), "model processor"),
    "normalisation": (lambda m, p, i: (m, with_mean(p), i), "model processor"),
    "order": (lambda m, p, i: (m, p, i[::-1]), "items content"),
    "fewer": (lambda m, p, i: (m, p, i[:-1]), "items questions: 5, not 4"),
    "answer": (lambda m, p, i: (m, p, [replace(i[0], answer="other"), *i[1:]]), "items content"),
    "no answer": (lambda m, p, i: (m, p, [replace(i[0], answer=None), *i[1:]]), "items content"),
    "question": (lambda m, p, i: (m, p, [replace(i[0], question="what is it ?"), *i[1:]]), "items content"),
    "kind": (lambda m, p, i: (m, p, [replace(i[0], kind="other"), *i[1:]]), "items content"),
    "pixel": (lambda m, p, i: (m, p, with_pixel(i)), "items content"),
}


@pytest.fixture(scope="module", params=FAMILIES)
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """Model, processor and items of a run, its file, and its rows."""
    model, processor = tiny.load(request.param)
    items = scene_items(5)
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    return model, processor, items, file, measured(model, processor, items, file)


@pytest.fixture(scope="module")
def run() -> Run:
    """A small one."""
    return (*tiny.load(FAMILIES[0]), scene_items(3))


class TestRowsOfOthers:
    """A file is gone on with by the same run alone."""

    def refused(self, kept: tuple[Any, ...], given: Any, *parts: str, **changes: Any) -> None:
        file, before = kept[3], kept[3].read_bytes()
        (model, processor, items), heard = given, Heard()
        with pytest.raises(InputError) as caught:
            measured(model, processor, items, file, progress=heard, **changes)
        assert_says(caught.value, "rows.jsonl' holds rows of another", "give another file, or delete it", *parts)
        assert heard.steps == [] and file.read_bytes() == before

    @pytest.mark.parametrize("change", OTHER_RUNS)
    def test_another_run_is_refused(self, kept: tuple[Any, ...], change: str) -> None:
        make, told = OTHER_RUNS[change]
        self.refused(kept, make(*kept[:3]), told)

    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            ({"batch_size": 3}, "settings batch_size: 4, not 3"),
            ({"max_new_tokens": 5}, "settings max_new_tokens: 4, not 5"),
            ({"match": "contains"}, "settings match: exact, not contains"),
        ],
    )
    def test_other_settings_are_refused(self, kept: tuple[Any, ...], changes: dict[str, Any], told: str) -> None:
        self.refused(kept, kept[:3], told, **changes)

    @pytest.mark.parametrize("name", ["code", "torch", "transformers", "pillow", "illava-hooks"])
    def test_other_versions_are_refused(
        self, kept: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        stock = prints._version
        monkeypatch.setattr(prints, "_version", lambda package: "0" if package == name else stock(package))
        if name == "code":
            monkeypatch.setattr(prints, "code", lambda: "0")
        self.refused(kept, kept[:3], f"versions {name}: .*, not 0")

    @pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
    def test_another_adapter_is_another_model(self, run: Run, tmp_path: Path) -> None:
        peft = pytest.importorskip("peft")
        model, processor, items = run
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        wrapper = peft.get_peft_model(deepcopy(model), config)
        wrapper.add_adapter("other", config)
        file = tmp_path / "rows.jsonl"
        rows = measured(wrapper, processor, items, file)
        assert measured(wrapper, processor, items, file, progress=(heard := Heard())) == rows and not heard.steps
        with pytest.raises(InputError, match="model adapters"), wrapper.disable_adapter():
            measured(wrapper, processor, items, file)
        wrapper.set_adapter("other")
        with pytest.raises(InputError, match="model adapters"):
            measured(wrapper, processor, items, file)
        wrapper.set_adapter("default")
        for layer in wrapper.modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                layer.scale_layer(2.0)
        with pytest.raises(InputError, match="model adapters"):
            measured(wrapper, processor, items, file)

    @pytest.mark.parametrize("way", ["hook", "pre-hook", "forward"])
    def test_hooks_of_the_users_own(self, kept: tuple[Any, ...], way: str, tmp_path: Path) -> None:
        model, processor, items, file, rows = kept
        changed, before = deepcopy(model), file.read_bytes()
        layer = next(part for name, part in changed.named_modules() if name.endswith("q_proj"))

        def mine(*given: Any) -> Any:
            return given[-1]

        if way == "forward":
            layer.forward = mine
        else:
            (layer.register_forward_hook if way == "hook" else layer.register_forward_pre_hook)(mine)
        for output in (file, tmp_path / "new.jsonl"):
            with pytest.raises(InputError, match=r"mine of your own at .*q_proj.*leave the output out"):
                measured(changed, processor, items, output)
        assert file.read_bytes() == before and not (tmp_path / "new.jsonl").exists()

    def test_the_same_run_is_gone_on_with_and_says_so(self, kept: tuple[Any, ...], tmp_path: Path) -> None:
        model, processor, items, first, rows = kept
        file = tmp_path / "rows.jsonl"
        file.write_bytes(first.read_bytes())
        heard = Heard()
        assert measured(model, processor, items, file, progress=heard) == rows
        assert heard.steps == [] and heard.total == 0, "nothing is left to be run"
        assert heard.notes == [f"reused from {file}: unpatched; fastv, both, 0.500"]
        heard = Heard()
        more = measured(model, processor, items, file, methods=["fastv", "random"], progress=heard)
        assert more[:2] == rows and [row.method for row in more] == ["none", "fastv", "random"]
        assert heard.steps == ["unpatched", "random, both, 0.500"] and heard.done == heard.total == 10
        assert read_rows(file) == more and [row.answers for row in read_rows(file)] == [row.answers for row in more]

    def test_what_is_changed_back_is_the_same_run_again(self, kept: tuple[Any, ...]) -> None:
        model, processor, items, file, rows = kept
        patch(model)
        unpatch(model)
        assert measured(deepcopy(model), deepcopy(processor), list(items), file) == rows

    def test_a_method_whose_code_was_another(self, kept: tuple[Any, ...], tmp_path: Path) -> None:
        model, processor, items, first, _ = kept
        file = tmp_path / "rows.jsonl"
        file.write_bytes(first.read_bytes())

        def made(by: int) -> Method:
            return Method("mine", encoder_score=lambda inputs: by * inputs.positions, merge="drop")

        rows = measured(model, processor, items, file, methods=[made(1)])
        assert measured(model, processor, items, file, methods=[made(1)]) == rows
        with pytest.raises(InputError, match="holds rows of another method that is called 'mine'"):
            measured(model, processor, items, file, methods=[made(-1)])

    def test_a_method_that_cannot_be_told_is_measured_anew(self, kept: tuple[Any, ...], tmp_path: Path) -> None:
        model, processor, items, first, _ = kept
        file = tmp_path / "rows.jsonl"
        file.write_bytes(first.read_bytes())
        state = iter(range(1000))
        method = Method("mine", encoder_score=lambda inputs: inputs.positions * (-1) ** next(state), merge="drop")
        for _ in range(2):
            heard = Heard()
            row = measured(model, processor, items, file, methods=[method], progress=heard)[-1]
            assert heard.steps == ["unpatched", "mine, both, 0.500"]
        assert read_rows(file)[-1] == row, "the later one counts"


class TestFiles:
    """What else can stand under the name of a file of rows."""

    def test_a_run_that_was_broken_off_goes_on(self, run: Run, tmp_path: Path) -> None:
        file, heard = tmp_path / "rows.jsonl", Heard()
        rows = measured(*run, file)
        file.write_bytes(file.read_bytes()[:-20])  # as a full disk or a kill leaves it
        assert measured(*run, file, progress=heard) == rows == read_rows(file)
        assert any("its last line was cut off and is measured anew" in note for note in heard.notes)
        assert heard.steps == ["unpatched", "fastv, both, 0.500"]

    def test_a_line_that_was_cut_within_a_letter(self, run: Run, tmp_path: Path) -> None:
        file, heard = tmp_path / "rows.jsonl", Heard()
        rows = measured(*run, file)
        before = file.read_bytes()
        file.write_bytes(before + '{"method": "café"'.encode()[:-2])
        assert measured(*run, file, progress=heard) == rows and file.read_bytes() == before
        assert any("its last line was cut off" in note for note in heard.notes)

    def test_a_run_that_ended_before_its_first_row_holds_no_file(self, run: Run, tmp_path: Path) -> None:
        model, processor, items = run
        file, heard = tmp_path / "rows.jsonl", Heard()
        measured(model, processor, items[:1], file)
        file.write_bytes(file.read_bytes().partition(b"\n")[0] + b"\n")
        rows = measured(*run, file, progress=heard)
        assert read_rows(file) == rows and "begun anew" in heard.notes[0]

    def test_rows_of_earlier_versions_are_read_and_never_reused(self, run: Run, tmp_path: Path) -> None:
        file = tmp_path / "rows.jsonl"
        row = {"method": "none", "stage": "both", "kept": 1.0, "measured": 0.9, "questions": 3, "accuracy": 1.0,
               "accuracy_interval": [1.0, 1.0], "loyalty": 1.0, "divergence": 0.0, "by_kind": {},
               "right": "111"}  # fmt: skip
        file.write_text(json.dumps(row) + "\n")
        (read,) = read_rows(file)
        assert read.right == [True] * 3 and read.measured is None and read.answers == []
        before = file.read_bytes()
        with pytest.raises(InputError, match="does not say what its rows were measured with"):
            measured(*run, file)
        assert file.read_bytes() == before

    @pytest.mark.parametrize("text", ["shopping list", "{}", "[]\n", '{"format": "illava-hooks evaluation"}', "\xff"])
    def test_other_files_stay_as_they_are(self, run: Run, tmp_path: Path, text: str) -> None:
        file = tmp_path / "notes.txt"
        file.write_bytes(text.encode("latin-1"))
        with pytest.raises(InputError, match="give another file|give a new file"):
            measured(*run, file)
        assert file.read_bytes() == text.encode("latin-1")

    def test_a_later_version_is_refused(self, run: Run, tmp_path: Path) -> None:
        file = tmp_path / "rows.jsonl"
        file.write_text('{"format": "illava-hooks evaluation", "version": 2}\n')
        for read in (lambda: read_rows(file), lambda: measured(*run, file)):
            with pytest.raises(InputError, match="is of version 2 and this one reads 1; update illava-hooks"):
                read()

    @pytest.mark.parametrize("spoil", ["right", "answers", "line"])
    def test_spoiled_rows_are_told_with_their_line(self, run: Run, tmp_path: Path, spoil: str) -> None:
        file = tmp_path / "rows.jsonl"
        measured(*run, file)
        lines = file.read_text().split("\n")
        row = json.loads(lines[1])
        row[spoil] = row.get(spoil, "x")[:-1]
        lines[1] = "{" if spoil == "line" else json.dumps(row)
        file.write_text("\n".join(lines))
        with pytest.raises(InputError, match="rows.jsonl, line 2 is no row"):
            read_rows(file)

    def test_weights_that_are_not_in_memory(self, run: Run, tmp_path: Path) -> None:
        model = deepcopy(run[0]).to("meta")
        with pytest.raises(InputError, match="are not in memory, so rows cannot be told from another model's"):
            measured(model, *run[1:], tmp_path / "rows.jsonl")


class TestKeptFraction:
    """The fraction that a row tells is that of all its items."""

    def alone(self, model: Any, processor: Any, items: list[Item], kept: float) -> list[tuple[int, int]]:
        """Tokens behind the last layer and in all, each item by itself, by plain loops."""
        counts = []
        for item in items:
            preset = PRESETS[f"{model.config.model_type}/tiny"]["video" if item.video else "image"]
            session = patch(model, **budget_settings(preset, "both", kept), method="fastv")
            model.generate(**item_inputs(processor, [item]), max_new_tokens=1)
            visuals = session.report.visuals
            counts.append((sum(v.language_tokens[-1] for v in visuals), sum(v.prompt_tokens for v in visuals)))
            unpatch(model)
        return counts

    @pytest.mark.parametrize("family", FAMILIES)
    def test_is_that_of_all_items_in_any_order(self, family: str) -> None:
        model, processor = tiny.load(family)
        items = [*scene_items(10), *pair_items(3), *(clip_items(2) if family in WITH_VIDEOS else [])]
        counts = self.alone(model, processor, items, 0.5)
        whole = sum(left for left, _ in counts) / sum(total for _, total in counts)
        assert len({left / total for left, total in counts}) > 1, "otherwise any batch would do"
        found = []
        for order in (np.arange(len(items)), np.random.default_rng(0).permutation(len(items))):
            stock, row = measured(model, processor, [items[index] for index in order])
            assert stock.measured == 1 and row.measured == pytest.approx(whole, abs=1e-9)
            back = np.argsort(order)
            answers = [[one.answers[index] for index in back] for one in (stock, row)]
            figures = [asdict(replace(one, right=[], answers=[], divergence=0, by_kind={})) for one in (stock, row)]
            found.append((answers, figures, [sorted(one.by_kind.items()) for one in (stock, row)]))
            assert row.divergence == pytest.approx(row.divergence)
        assert found[0] == found[1]

    @pytest.mark.parametrize("family", FAMILIES)
    def test_of_smaller_pictures_is_that_of_the_prompts(self, family: str) -> None:
        model, processor = tiny.load(family)
        items = scene_items(8)

        def tokens(shown: list[Item]) -> int:
            ids = [item_inputs(processor, [item])["input_ids"] for item in shown]
            return sum(int((one == model.config.image_token_id).sum()) for one in ids)

        for kept in (0.5, 0.1111):
            row = measured(model, processor, items, methods=["downsample"], fractions=[kept])[1]
            assert row.measured == pytest.approx(tokens(downsampled(items, kept)) / tokens(items), abs=1e-12)


class TestMixedItems:
    """Images and videos in one file: each with its own preset, answers in the order of the file."""

    @pytest.mark.parametrize("family", WITH_VIDEOS)
    def test_each_has_its_own_preset(self, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
        model, processor = tiny.load(family)
        images, clips = scene_items(4), clip_items(3)
        items = [images[0], clips[0], images[1], images[2], clips[1], clips[2], images[3]]
        used: list[tuple[bool, Any]] = []

        def heard(model: Any, processor: Any, items: Any, *rest: Any) -> Any:
            session = session_of(model)
            if session is not None:
                used.append((items[0].video, session.config))
            return run_items(model, processor, items, *rest)

        monkeypatch.setattr(sys.modules["illava_hooks.tools.evaluate.sweep"], "run_items", heard)
        rows = measured(model, processor, items, batch_size=8)
        assert [video for video, _ in used] == [False, True]
        for video, config in used:
            preset = PRESETS[f"{family}/tiny"]["video" if video else "image"]
            schedule = config.video if video else config.image
            assert (schedule.vit_layers, schedule.llm_layers) == (preset.vit_layers, preset.llm_layers)
        apart = [measured(model, processor, part, batch_size=8) for part in (images, clips)]
        for mixed, shown, moving in zip(rows, *apart, strict=True):
            still, film = iter(shown.answers), iter(moving.answers)
            assert mixed.answers == [next(film) if item.video else next(still) for item in items]
            assert mixed.divergence == pytest.approx((4 * shown.divergence + 3 * moving.divergence) / 7, abs=1e-5)

    @pytest.mark.parametrize("family", WITH_VIDEOS)
    def test_what_has_no_preset_is_told(self, family: str) -> None:
        model, processor = tiny.load(family)
        presets = dict(model.config.illava_presets)
        presets.pop("video")
        model.config.illava_presets = presets
        items = [scene_items(1)[0], clip_items(1)[0]]
        with pytest.raises(InputError, match="items hold videos, for which .* has no preset"):
            measured(model, processor, items)
        assert measured(model, processor, items[:1])[1].questions == 1

    def test_a_model_that_merges_in_one_stage(self) -> None:
        encoder_only = MergeSchedule((5, 6), 0.16, (), 1.0)
        for stage in ("encoder", "both"):
            assert budget_settings(encoder_only, stage, 0.25) == {
                "vit_layers": [5, 6], "vit_r": 0.5, "llm_layers": [], "llm_ratio": 1.0
            }  # fmt: skip
        with pytest.raises(InputError, match="stage is 'language', in which the preset of this model merges nowhere"):
            budget_settings(encoder_only, "language", 0.25)


class TestLabels:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_none_are_needed(self, family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        model, processor = tiny.load(family)
        items = scene_items(6)
        bare = [replace(item, answer=None) for item in items]
        known, unknown, heard = measured(model, processor, items), [], Heard()
        unknown = measured(model, processor, bare, tmp_path / "rows.jsonl", progress=heard)
        for mine, its in zip(unknown, known, strict=True):
            assert (mine.accuracy, mine.accuracy_interval, mine.labelled, mine.by_kind) == (None, None, 0, {})
            assert (mine.loyalty, mine.loyalty_interval, mine.answers) == (
                its.loyalty,
                its.loyalty_interval,
                its.answers,
            )
            assert mine.divergence == its.divergence and mine.measured == its.measured
        assert heard.notes == ["6 of 6 questions have no answer: they count for loyalty and KL alone"]
        assert read_rows(tmp_path / "rows.jsonl") == unknown
        print_rows(unknown)
        assert "| 6 (0 with answer) |  |  |" in capsys.readouterr().out
        with pytest.raises(InputError, match="no question has a known answer"):
            unknown[1].lead(unknown[0])

    @pytest.mark.parametrize("family", FAMILIES)
    def test_some_are_known(self, family: str, capsys: pytest.CaptureFixture[str]) -> None:
        model, processor = tiny.load(family)
        items = [replace(item, answer=None) if index % 2 else item for index, item in enumerate(scene_items(6))]
        stock, merged = measured(model, processor, items)
        for row in (stock, merged):
            right = [said == item.answer for said, item in zip(row.answers, items, strict=True) if item.answer]
            assert row.accuracy == sum(right) / 3 and [hit for hit in row.right if hit is not None] == right
            assert accuracy(items, row.answers)["all"] == (sum(right), 3)
        assert merged.lead(merged) == (0, 0)
        print_rows([stock])
        assert "| 6 (3 with answer) |" in capsys.readouterr().out

    def test_answers_are_compared_as_asked_and_kept(self, tmp_path: Path) -> None:
        model, processor = tiny.load(FAMILIES[0])
        items = scene_items(5)
        said = measured(model, processor, items)[0].answers
        spelled = [replace(item, answer=f"The {word.title()}.") for item, word in zip(items, said, strict=True)]
        first, last = replace(spelled[0], answer="other", others=(said[0],)), replace(spelled[-1], answer="other")
        file = tmp_path / "rows.jsonl"
        row = measured(model, processor, [first, *spelled[1:-1], last], file)[0]
        assert row.right == [True] * 4 + [False]
        assert json.loads(file.read_text().split("\n")[1])["answers"] == said
        long = [replace(item, answer=word.split()[0]) for item, word in zip(items, said, strict=True)]
        assert measured(model, processor, long, match="contains")[0].accuracy == 1


class TestOtherRefusals:
    def test_a_patched_model(self) -> None:
        model, processor = tiny.load(FAMILIES[0])
        session = patch(model)
        with pytest.raises(PatchStateError, match=r"call unpatch\(model\) first"):
            measured(model, processor, scene_items(1))
        assert session_of(model) is session

    def test_no_items(self) -> None:
        model, processor = tiny.load(FAMILIES[0])
        with pytest.raises(InputError, match="items is empty"):
            illava_hooks.evaluate(model, processor, [], progress=False)

    def test_dropout_is_off_and_on_again(self) -> None:
        model, processor = tiny.load(FAMILIES[0])
        items = scene_items(2)
        expected = measured(model, processor, items)
        model.train()
        assert measured(model, processor, items) == expected and model.training


class TestFront:
    """`illava_hooks.evaluate` and the command do the same."""

    @pytest.mark.parametrize("family", FAMILIES)
    def test_function_and_command_agree(self, family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        model, processor = tiny.load(family)
        rows = illava_hooks.evaluate(
            model, processor, "small-scenes", ["illava", "uniform"], kept=[0.5], questions=8, progress=False
        )
        assert [row.questions for row in rows] == [8, 8, 8]
        print_rows(rows)
        expected = capsys.readouterr().out
        line = f"evaluate --model {family_of(family).embedded} --items small-scenes --questions 8 --kept 0.5"
        done = CliRunner().invoke(app, [*line.split(), "--methods", "illava,uniform", "--output", str(tmp_path / "r")])
        assert done.exit_code == 0 and done.stdout == expected
        again = CliRunner().invoke(app, [*line.split(), "--methods", "illava", "--output", str(tmp_path / "r")])
        assert again.stdout == "".join(expected.splitlines(True)[:4]) and "reused from" in again.stderr

    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            ({"batch_size": 0}, "batch_size is 0; give a whole number from 1 on"),
            ({"batch_size": -1}, "batch_size is -1"),
            ({"batch_size": None}, "batch_size is None"),
            ({"max_new_tokens": 0}, "max_new_tokens is 0"),
            ({"questions": "3"}, "questions is '3'"),
            ({"questions": 2.5}, "questions is 2.5"),
            ({"questions": 0}, "questions is 0"),
            ({"kept": "1/3"}, "kept has '1/3'; give numbers"),
            ({"kept": [None]}, "kept has None"),
            ({"kept": True}, "kept has True"),
            ({"kept": []}, "kept is empty; give one or more"),
            ({"kept": 2, "stages": "keep"}, r"keep is 2.0; give a fraction in \(0, 1\]"),
            ({"methods": []}, "methods is empty"),
            ({"methods": 5}, "methods has 5; give names or Method objects"),
            ({"methods": [None]}, "methods has None"),
            ({"stages": []}, "stages is empty"),
            ({"stages": None}, "stages has None; give names"),
            ({"items": None}, "items is None; give the name of a suite"),
            ({"items": 7}, "items is 7"),
        ],
        ids=str,
    )
    def test_arguments_of_a_wrong_kind(self, run: Run, changes: dict[str, Any], told: str) -> None:
        model, processor, items = run
        with pytest.raises(InputError, match=told):
            illava_hooks.evaluate(model, processor, **{"items": items, "progress": False, **changes})

    def test_numbers_of_any_kind(self, run: Run, tmp_path: Path) -> None:
        odd: dict[str, Any] = {"kept": [Fraction(1, 2), np.float32(0.25)], "batch_size": np.int64(4)}
        plain: dict[str, Any] = {"kept": [0.5, 0.25], "batch_size": 4}
        first, again = (
            illava_hooks.evaluate(*run, "fastv", output=tmp_path / "rows.jsonl", progress=False, **numbers)
            for numbers in (odd, plain)
        )
        assert first == again

    @pytest.mark.parametrize("question", ["what is <image> ?", "<video>", "what is \ud800 ?"])
    def test_a_question_that_cannot_be_asked_is_told_before_anything_runs(
        self, run: Run, question: str, tmp_path: Path
    ) -> None:
        model, processor, items = run
        wrong, heard = [*items, replace(items[0], question=question)], Heard()
        with pytest.raises(InputError, match="^item 4: question "):
            illava_hooks.evaluate(model, processor, wrong, output=tmp_path / "rows.jsonl", progress=heard)
        assert heard.steps == [] and not (tmp_path / "rows.jsonl").exists()

    def test_default_methods_that_cannot_keep_as_little_are_left_out(self, run: Run) -> None:
        heard = Heard()
        rows = illava_hooks.evaluate(*run, stages="keep", kept=1 / 9, progress=heard)
        methods = {row.method for row in rows}
        assert "novel-agnostic" in methods and "tome" not in methods
        assert any(note.startswith("left out: tome, keep, 0.111 (keep is 0.1111") for note in heard.notes)
        with pytest.raises(MergeConfigError, match="removes at most half"):
            illava_hooks.evaluate(*run, ["tome"], stages="keep", kept=1 / 9, progress=False)

    def test_items_of_a_program_and_what_is_not_there(self, capsys: pytest.CaptureFixture[str]) -> None:
        model, processor = tiny.load(FAMILIES[0])
        (drawn,) = scene_items(1)
        row = {"image": drawn.pictures[0], "question": drawn.question, "answer": drawn.answer}
        found = illava_hooks.evaluate(model, processor, [row], "fastv", kept=0.5, questions=3)
        assert found == measured(model, processor, [replace(drawn, kind="items")])
        assert "3 questions were asked for, and there are 1" in capsys.readouterr().err
        with pytest.raises(InputError, match="item 1 is no item"):
            illava_hooks.evaluate(model, processor, [row, {}], progress=False)


class TestProgress:
    def test_a_log_gets_a_line_for_every_step(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = iter([0.0, 90.0, 4000.0])
        monkeypatch.setattr(telling.time, "monotonic", lambda: next(clock))
        bar = Bar()
        bar.begin(400)
        bar.step("unpatched")
        bar.advance(100)
        bar.step("illava")
        bar.step("fastv")
        bar.end()
        assert capsys.readouterr().err.splitlines() == [
            "unpatched (0 of 400 questions done)",
            "illava (100 of 400 questions done, about 4:30 left)",
            "fastv (100 of 400 questions done, about 3:20:00 left)",
        ]

    def test_every_question_is_counted(self) -> None:
        model, processor = tiny.load(FAMILIES[0])
        heard = Heard()
        measured(model, processor, scene_items(5), methods=["fastv", "downsample"], progress=heard)
        assert heard.done == heard.total == 15


class TestStatistics:
    """Against scipy, which need not be installed where the library is used."""

    @pytest.mark.parametrize("share", [0.05, 0.5, 0.97])
    @pytest.mark.parametrize("level", [0.9, 0.95])
    def test_intervals_are_those_of_scipy(self, share: float, level: float) -> None:
        rng = np.random.default_rng(0)
        one, other = rng.random(400) < share, rng.random(400) < share
        for mine, values in (
            (interval(one, level, 20_000), one.astype(float)),
            (paired_interval(one, other, level, 20_000), one.astype(float) - other),
        ):
            its = bootstrap((values,), np.mean, confidence_level=level, method="percentile", n_resamples=20_000,
                            rng=np.random.default_rng(1)).confidence_interval  # fmt: skip
            spread = its.high - its.low
            near = 0.06 * spread + 1 / 400  # means of 400 answers are no finer
            assert mine == pytest.approx((its.low, its.high), abs=near)
            assert (mine[0] - spread / 2, mine[1]) != pytest.approx((its.low, its.high), abs=near)

    def test_the_order_of_questions_does_not_matter(self) -> None:
        rng = np.random.default_rng(0)
        values, others = rng.random(300), rng.random(300)
        order = rng.permutation(300)
        assert interval(values) == interval(values[order])
        assert paired_interval(values, others) == paired_interval(values[order], others[order])
