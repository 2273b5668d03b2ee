"""``tune``: what the search finds, what it costs, what it refuses, and that a killed or repeated run says the same."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import illava_hooks
from families import families
from helpers import TAKES_READY_FEATURES, assert_says
from illava_hooks import InputError, MergeConfig, Method, PatchStateError, patch, tiny, unpatch
from illava_hooks.cli import app
from illava_hooks.merge.rules import RULES
from illava_hooks.tools.evaluate.run import item_inputs
from illava_hooks.tools.items import Item
from illava_hooks.tools.progress import Progress
from illava_hooks.tools.tune import Tuning, tune
from illava_hooks.tools.tune.inputs import SUITES, Choice, read_choice
from illava_hooks.tools.tune.result import TUNED, Point, _verdict, _why_not, pareto
from illava_hooks.tools.tune.run import _first
from illava_hooks.tools.tune.search import ELITE, WIDTH, OverError, planned, rungs, search, solve_keep
from illava_hooks.tools.tune.space import MOST_LAYERS, Candidate, Space, settings_of

FAMILY = families(embedded=True)[0]
METHODS = ("a", "b", "c")
SPACE = Space(METHODS, range(8), range(1, 7))
BEST = Candidate("b", (4, 5), (3,), 0.4)


def distance(candidate: Candidate) -> float:
    """A loss with one least: how far each choice is from ``BEST``."""

    def layers(mine: Sequence[int], its: Sequence[int]) -> float:
        if not mine:
            return 3.0
        return abs(sum(mine) / len(mine) - sum(its) / len(its)) + abs(len(mine) - len(its))

    off = 2.0 * (candidate.method != BEST.method) + 4 * abs(candidate.share - BEST.share)
    return off + layers(candidate.vit_layers, BEST.vit_layers) + layers(candidate.llm_layers, BEST.llm_layers)


class World:
    """An oracle whose losses are known; on few questions they are noisy, on the same ones always in the same way."""

    def __init__(
        self,
        loss: Callable[[Candidate], float | None] = distance,
        noise: float = 1.0,
        limit: float = math.inf,
        moves: Sequence[float] = (),
    ) -> None:
        self.true, self.noise, self.limit, self.moves = loss, noise, limit, list(moves)
        self.asked: list[tuple[Candidate, int]] = []
        self.told: list[str] = []
        self.settled: list[list[Candidate]] = []

    def loss(self, candidate: Candidate, questions: int) -> float | None:
        if len(self.asked) >= self.limit:
            raise OverError
        self.asked.append((candidate, questions))
        true = self.true(candidate)
        rng = np.random.default_rng([*str(candidate).encode(), questions])
        return None if true is None else true + self.noise * float(rng.normal()) / math.sqrt(questions)

    def settle(self, ranked: Sequence[Candidate]) -> bool:
        self.settled.append(list(ranked))
        return bool(self.moves) and bool(self.moves.pop(0))

    def tell(self, what: str) -> None:
        self.told.append(what)


class TestTheSearch:
    @pytest.mark.parametrize("seed", range(6))
    def test_finds_what_is_best_by_far(self, seed: int) -> None:
        """The best of several thousand candidates, or one of the few beside it, for a few hundred measurements."""
        world = World()
        found = search(SPACE, world, 300, 6, seed)[0]
        rng = np.random.default_rng(99)
        others = sorted(distance(SPACE.draw(rng)) for _ in range(4000))
        assert distance(found) <= others[3]
        assert len({one for one, _ in world.asked}) < 250

    @pytest.mark.parametrize("seed", range(6))
    def test_chance_finds_less(self, seed: int) -> None:
        """As many candidates by chance alone, even where each is measured without noise."""
        world, rng = World(), np.random.default_rng([7, seed])
        found = search(SPACE, world, 300, 6, seed)[0]
        others = [SPACE.draw(rng) for _ in {one for one, _ in world.asked}]
        assert distance(found) < min(map(distance, others))

    @pytest.mark.parametrize("seed", range(3))
    def test_more_rounds_are_never_worse_without_noise(self, seed: int) -> None:
        losses = [distance(search(SPACE, World(noise=0), 300, rounds, seed)[0]) for rounds in (1, 2, 4, 8)]
        assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]

    def test_what_is_given_first_is_measured_first(self) -> None:
        world = World()
        found = search(SPACE, world, 300, 1, 0, [BEST])
        assert world.asked[0][0] == BEST == found[0]

    def test_a_seed_is_a_sequence(self) -> None:
        def asked(seed: int) -> list[tuple[Candidate, int]]:
            world = World()
            search(SPACE, world, 300, 3, seed)
            return world.asked

        assert asked(1) == asked(1)
        assert asked(1) != asked(2)

    @pytest.mark.parametrize("limit", [1, 5, WIDTH, WIDTH + 3, WIDTH + 13, 60, 100])
    def test_a_limit_cuts_the_sequence_and_nothing_else(self, limit: int) -> None:
        """The best of those on the most questions so far, by a plain look at the list of all measurements."""
        whole = World()
        search(SPACE, whole, 300, 3, 0)
        world = World(limit=limit)
        found = search(SPACE, world, 300, 3, 0)
        assert world.asked == whole.asked[:limit]
        most = max(questions for _, questions in world.asked)
        losses = {one: whole.loss(one, most) for one, questions in world.asked if questions == most}
        assert found == sorted(losses, key=lambda one: losses[one])

    def test_no_time_at_all(self) -> None:
        assert search(SPACE, World(limit=0), 300, 3, 0) == []

    def test_nothing_meets_the_cost(self) -> None:
        assert search(SPACE, World(lambda one: None), 300, 2, 0) == []

    def test_those_that_cannot_meet_the_cost_are_passed_over(self) -> None:
        found = search(SPACE, World(lambda one: None if one.method == "b" else distance(one)), 300, 3, 0)
        assert found and {one.method for one in found} <= {"a", "c"}

    def test_another_cost_makes_what_was_measured_void(self) -> None:
        world = World(moves=[True, False])
        search(SPACE, world, 300, 2, 0)
        first = world.settled[0]
        begun = sum(width for width, _ in rungs(300))
        assert world.asked[begun : begun + ELITE] == [(one, 300) for one in first[:ELITE]]
        assert set(world.settled[1]) == {one for one, questions in world.asked[begun:] if questions == 300}

    @pytest.mark.parametrize("questions", [1, 2, 12, 13, 40, 150, 1000])
    def test_rungs(self, questions: int) -> None:
        steps = rungs(questions)
        counts = [count for _, count in steps]
        assert counts == sorted(set(counts)) and counts[-1] == questions
        assert [width for width, _ in steps] == sorted((width for width, _ in steps), reverse=True)
        answers = 0
        for place, (width, count) in enumerate(steps):
            answers += width * (count - (counts[place - 1] if place else 0))
        assert planned(questions) == answers <= 36 * questions

    def test_a_small_space_ends(self) -> None:
        space = Space(["a"], [2], [])
        assert search(space, World(lambda one: 1.0), 20, 3, 0) == [Candidate("a", (2,), (), 1.0)]


class TestTheSpace:
    def test_draws_and_neighbours_are_what_can_be(self) -> None:
        space = Space(METHODS, [1, 3, 5, 7], [2, 5, 9])
        rng = np.random.default_rng(0)
        seen = set()
        candidate = space.draw(rng)
        for number in range(3000):
            candidate = space.draw(rng) if number % 10 == 0 else space.change(candidate, rng)
            seen.add(candidate)
            for layers, allowed in ((candidate.vit_layers, [1, 3, 5, 7]), (candidate.llm_layers, [2, 5, 9])):
                assert list(layers) == sorted(set(layers)) and set(layers) <= set(allowed)
                assert len(layers) <= MOST_LAYERS
            assert bool(candidate.vit_layers) == (candidate.share > 0)
            assert bool(candidate.llm_layers) == (candidate.share < 1)
        assert {one.method for one in seen} == set(METHODS)
        assert {0.0, 0.5, 1.0} <= {one.share for one in seen}, "each stage alone is tried too"
        assert {len(one.vit_layers) for one in seen} == {0, 1, 2, 3, 4}

    @pytest.mark.parametrize("layers", [([3], [2]), ([2, 5], []), ([], [1]), ([0, 1], [4])], ids=str)
    def test_what_is_tried_first_is_what_can_be(self, layers: tuple[list[int], list[int]]) -> None:
        """Where a layer of the preset cannot merge, the others of it can; neighbours of them exist."""
        schedules = {"image": SimpleNamespace(vit_layers=(2, 3), llm_layers=(2,)),
                     "video": SimpleNamespace(vit_layers=(3, 9), llm_layers=(0, 1))}  # fmt: skip
        limits: Any = SimpleNamespace(presets=schedules)
        space, rng = Space(METHODS, *layers), np.random.default_rng(0)
        first = _first(limits, space)
        assert len(first) == len(set(first))
        for one in first:
            assert one.vit_layers or one.llm_layers
            assert set(one.vit_layers) <= set(layers[0]) and set(one.llm_layers) <= set(layers[1])
            for _ in range(30):
                space.change(one, rng)

    @pytest.mark.parametrize(("vit", "llm", "share"), [([1, 2], [], 1.0), ([], [1, 2], 0.0)])
    def test_a_model_with_one_stage(self, vit: list[int], llm: list[int], share: float) -> None:
        space, rng = Space(METHODS, vit, llm), np.random.default_rng(0)
        drawn = [space.draw(rng) for _ in range(50)]
        assert {one.share for one in [*drawn, *(space.change(one, rng) for one in drawn)]} == {share}

    @pytest.mark.parametrize("keep", [0.05, 0.33, 0.9])
    @pytest.mark.parametrize("candidate", [BEST, Candidate("a", (), (2, 3), 0.5), Candidate("a", (1, 2, 3), (4,), 1)])
    def test_amounts_leave_the_fraction(self, keep: float, candidate: Candidate) -> None:
        settings = settings_of(candidate, keep)
        left = 1.0
        for _ in settings["vit_layers"]:
            left *= 1 - settings["vit_r"]
        assert left == pytest.approx(keep**candidate.share, rel=1e-4)
        for _ in settings["llm_layers"]:
            left *= settings["llm_ratio"]
        assert left == pytest.approx(keep, rel=1e-4)


class TestTheCost:
    """The amount that meets a cost, against a look at every amount."""

    CURVES: dict[str, Callable[[float], float]] = {
        "line": lambda keep: 0.2 + 0.8 * keep,
        "bent": lambda keep: 0.1 + 0.9 * keep**2.5,
        "root": lambda keep: 0.1 + 0.9 * keep**0.4,
        "steps": lambda keep: 0.2 + 0.8 * math.floor(keep * 40) / 40,
        "rough steps": lambda keep: 0.2 + 0.8 * math.floor(keep * 8) / 8,
    }

    @pytest.mark.parametrize("target", [0.25, 0.3, 0.5, 0.73, 0.94])
    @pytest.mark.parametrize("guess", [None, 0.05, 0.6, 0.99])
    @pytest.mark.parametrize("curve", CURVES)
    def test_is_met(self, curve: str, guess: float | None, target: float) -> None:
        asked = []

        def cost(keep: float) -> float:
            asked.append(keep)
            return self.CURVES[curve](keep)

        keep = solve_keep(cost, target, guess)
        grid = [number / 1000 for number in range(20, 1000)]
        cheap = [self.CURVES[curve](one) for one in grid if self.CURVES[curve](one) <= target]
        if not cheap:
            assert keep is None
            return
        best = max(cheap)
        assert keep is not None and self.CURVES[curve](keep) <= target
        assert self.CURVES[curve](keep) >= best - (
            0.11 if "rough" in curve else 0.021 if "steps" in curve else 0.03 * best
        )
        assert len(asked) <= 7

    def test_too_dear(self) -> None:
        assert solve_keep(lambda keep: 0.6 + 0.4 * keep, 0.5) is None

    def test_a_good_guess_is_enough(self) -> None:
        asked = []
        assert solve_keep(lambda keep: asked.append(keep) or 0.2 + 0.8 * keep, 0.6, 0.4975) == 0.4975
        assert len(asked) == 1


def point(cost: float, loss: float) -> Point:
    return Point("front", {}, cost, loss, (loss, loss), 1.0, (1.0, 1.0))


@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_what_nothing_beats(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pairs = [(float(cost), float(loss)) for cost, loss in rng.integers(0, 6, (12, 2)) / 6]
    marked = pareto([point(*pair) for pair in pairs])
    for one, (cost, loss) in zip(marked, pairs, strict=True):
        beaten = False
        for other_cost, other_loss in pairs:
            cheaper, better = other_cost < cost, other_loss < loss
            beaten |= (cheaper and other_loss <= loss) or (better and other_cost <= cost)
        assert one.on_front == (not beaten)


# ---------------------------------------------------------------------- what is tuned with

SIZE = (64, 64)


def scene(number: int) -> Image.Image:
    return Image.fromarray(SUITES["scenes"](60)[number * 5].pictures[0]).resize(SIZE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures of one size."""
    path = tmp_path_factory.mktemp("pictures")
    for number in range(8):
        scene(number).save(path / f"{number}.png")
    return path


class Heard(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def read(items: Any, **given: Any) -> tuple[Choice, list[str]]:
    notes: list[str] = []
    defaults: dict[str, Any] = {"question": None, "pictures": None, "seed": 0}
    return read_choice(items, **{**defaults, **given}, tell=notes.append), notes


class TestWhatIsTunedWith:
    def test_a_picture_is_seen_or_held_out(self) -> None:
        choice, _ = read("scenes", pictures=12)
        seen, held = choice.items[: choice.seen], choice.items[choice.seen :]
        shown = [{item.pictures[0].tobytes() for item in part} for part in (seen, held)]
        assert tuple(map(len, shown)) == choice.pictures == (9, 3)
        assert not shown[0] & shown[1]

    def test_answers_are_taken_away(self) -> None:
        assert {item.accepted for item in read("scenes", pictures=4)[0].items} == {()}

    def test_suites_are_of_the_validation_split(self) -> None:
        from illava_hooks.tools.datasets import SUITES as TEST

        for name, make in SUITES.items():
            mine = {item.pictures[0].tobytes() for item in make(20)}
            assert not mine & {item.pictures[0].tobytes() for item in TEST[name](40)}

    def test_a_seed_is_an_order(self) -> None:
        orders = [[item.question for item in read("scenes", pictures=9, seed=seed)[0].items] for seed in (0, 0, 1)]
        assert orders[0] == orders[1] != orders[2]
        assert sorted(orders[0]) == sorted(orders[2])

    def test_a_folder_asks_every_question_of_every_picture(self, folder: Path) -> None:
        choice, notes = read(folder, question=["one ?", "two ?"])
        assert [item.question for item in choice.items] == ["one ?", "two ?"] * 8 and notes == []

    def test_without_a_question_a_general_one_is_said(self, folder: Path) -> None:
        choice, (note,) = read(folder)
        assert {item.question for item in choice.items} == {"Describe what is shown here in one sentence."}
        assert "no question was given" in note

    def test_what_cannot_be_read_is_left_out_and_said(self, tmp_path: Path) -> None:
        for number in range(3):
            scene(number).save(tmp_path / f"{number}.png")
        (tmp_path / "broken.png").write_bytes(b"\x89PNG and no more")
        (tmp_path / "list.txt").write_text("no picture")
        (tmp_path / ".hidden").write_text("nobody's business")
        frames = [Image.new("RGB", SIZE, (40 * index, 0, 0)) for index in range(3)]
        frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
        choice, notes = read(tmp_path, question="what ?")
        assert sorted(item.video for item in choice.items) == [False] * 3 + [True]
        assert len(notes) == 1 and notes[0].startswith("2 of 6 files are left out; the first: ")
        assert "broken.png" in notes[0]

    def test_more_files_than_wanted(self, folder: Path) -> None:
        choice, (note,) = read(folder, question="what ?", pictures=4)
        assert len(choice.items) == 4 and "has 8 files, of which 4 are taken by chance" in note
        again = read(folder, question="what ?", pictures=4)[0]
        assert [i.pictures[0].tobytes() for i in choice.items] == [i.pictures[0].tobytes() for i in again.items]

    def test_items_and_rows(self, folder: Path, tmp_path: Path) -> None:
        rows = [{"image": str(folder / f"{n}.png"), "question": "q ?", "answer": "x"} for n in range(3)]
        (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
        for given in (rows, tmp_path / "mine.jsonl"):
            choice, _ = read(given)
            assert [(item.question, item.accepted) for item in choice.items] == [("q ?", ())] * 3

    def test_refusals(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "only.txt").write_text("no picture")
        one = tmp_path / "one"
        one.mkdir()
        scene(0).save(one / "a.png")
        rows = [{"image": str(folder / "0.png"), "question": "q ?"}]
        for items, given, words in (
            (tmp_path, {}, ["no image and no video", "give another folder"]),
            (one, {"question": "q ?"}, ["1 picture", "2 or more"]),
            (rows, {}, ["1 picture", "2 or more"]),
            ([], {}, ["0 pictures"]),
            (rows * 2, {"question": "q ?"}, ["question is given", "leave one of them out"]),
            ("scenes", {"question": "q ?"}, ["question is given"]),
            (folder, {"question": " "}, ["question is empty"]),
            (folder, {"pictures": 1}, ["pictures is 1", "2 or more"]),
            ("easy-vqa", {}, ["easy-vqa", "give a folder", "scenes"]),
        ):
            with pytest.raises(InputError) as error:
                read(items, **given)
            assert_says(error.value, *map(re.escape, words))


# ---------------------------------------------------------------------- a whole tuning

QUESTION = "how many circles are there ?"
#: At most half of the tokens can go, in one stage alone.
HALF_IN_LLM = Method("half in llm", "uniform", "uniform", merge="diverse", llm_merge="bipartite")
HALF_IN_ENCODER = Method("half in encoder", "uniform", "uniform", merge="bipartite", llm_merge="drop")
FAST: dict[str, Any] = {"question": QUESTION, "methods": ["illava", "diverse"], "rounds": 1, "measurements": 4}


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return tiny.load(FAMILY)


@pytest.fixture(scope="module")
def whole(loaded: tuple[Any, Any], folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tuning, Path]:
    """A tuning that nothing disturbed, and its rows."""
    rows = tmp_path_factory.mktemp("whole") / "rows.jsonl"
    return tune(*loaded, folder, **FAST, rows=rows, progress=False), rows


class TestAWholeTuning:
    def test_every_figure_is_what_the_file_does_on_what_was_not_seen(
        self, whole: tuple[Tuning, Path], loaded: tuple[Any, Any], folder: Path, tmp_path: Path
    ) -> None:
        """Question by question, by the logits of a plain forward."""
        (model, processor), found = loaded, whole[0]
        found.save(tmp_path / "tuned.json")
        choice, _ = read(folder, question=QUESTION)
        held, means = choice.items[choice.seen :], []
        assert (found.questions, found.pictures) == ((6, 2), (6, 2))
        for one in (found.points[0], next(point for point in found.points if point.name == "preset")):
            losses, flops = [], [0, 0]
            for item in held:
                plain = first_word(model, item_inputs(processor, [item]))
                session = patch(model, preset=tmp_path / "tuned.json") if one.settings else patch(model)
                merged = first_word(model, item_inputs(processor, [item]))
                flops = [a + b for a, b in zip(flops, session.report.flops, strict=True)]
                unpatch(model)
                losses.append(sum(p * (math.log(p) - math.log(q)) for p, q in zip(plain, merged, strict=True)))
            means.append(sum(losses) / len(losses))
            assert one.loss == pytest.approx(sum(losses) / len(losses), rel=1e-3, abs=1e-6)
            assert one.cost == pytest.approx(flops[0] / flops[1])
        assert means[0] != pytest.approx(means[1], rel=1e-2), "one could be taken for the other"
        assert MergeConfig.load(tmp_path / "tuned.json") == found.config

    def test_the_cost_is_that_of_the_preset(self, whole: tuple[Tuning, Path]) -> None:
        costs = {point.name: point.cost for point in whole[0].points}
        assert 0.95 * costs["preset"] <= costs["tuned"] <= 1.01 * costs["preset"]
        assert whole[0].wanted["as"] == "preset" and whole[0].lead is not None

    def test_the_model_is_as_before(self, whole: tuple[Tuning, Path], loaded: tuple[Any, Any]) -> None:
        assert illava_hooks.session_of(loaded[0]) is None

    def test_again_it_is_the_same(
        self, whole: tuple[Tuning, Path], loaded: tuple[Any, Any], folder: Path, tmp_path: Path
    ) -> None:
        again = tune(*loaded, folder, **FAST, rows=tmp_path / "rows.jsonl", progress=False)
        assert again == whole[0]
        assert (tmp_path / "rows.jsonl").read_bytes() == whole[1].read_bytes()

    @pytest.mark.parametrize("share", [0.35, 0.8])
    def test_a_killed_one_goes_on(
        self, whole: tuple[Tuning, Path], loaded: tuple[Any, Any], folder: Path, tmp_path: Path, share: float
    ) -> None:
        """Cut anywhere, in the middle of a line too."""
        found, rows = whole
        data, file = rows.read_bytes(), tmp_path / "rows.jsonl"
        cut = data[: int(share * len(data))]
        file.write_bytes(cut)
        heard = Heard()
        assert tune(*loaded, folder, **FAST, rows=file, progress=heard) == found
        assert file.read_bytes() == data, "nothing is measured twice, and nothing else"
        assert any("its last line was cut off" in note for note in heard.notes) == (not cut.endswith(b"\n"))
        assert any(note.startswith(f"reused from {file}: ") for note in heard.notes)

    @pytest.mark.parametrize(
        ("changes", "word"),
        [({"seed": 1}, "settings seed: 0, not 1"), ({"question": "what ?"}, "items content"),
         ({"max_new_tokens": 2}, "max_new_tokens: 4, not 2")],
    )  # fmt: skip
    def test_rows_of_another_run_are_refused(
        self,
        whole: tuple[Tuning, Path],
        loaded: tuple[Any, Any],
        folder: Path,
        tmp_path: Path,
        changes: dict[str, Any],
        word: str,
    ) -> None:
        file = tmp_path / "rows.jsonl"
        file.write_bytes(whole[1].read_bytes())
        with pytest.raises(InputError) as error:
            tune(*loaded, folder, **{**FAST, **changes}, rows=file, progress=False)
        assert_says(error.value, "another run", word, "delete it")
        assert file.read_bytes() == whole[1].read_bytes()

    def test_rows_of_another_model_are_refused(
        self, whole: tuple[Tuning, Path], loaded: tuple[Any, Any], folder: Path, tmp_path: Path
    ) -> None:
        file = tmp_path / "rows.jsonl"
        file.write_bytes(whole[1].read_bytes())
        model, processor = tiny.load(FAMILY)
        with torch.no_grad():
            next(model.parameters()).add_(1e-3)
        with pytest.raises(InputError) as error:
            tune(model, processor, folder, **FAST, rows=file, progress=False)
        assert_says(error.value, "another run", "model weights")

    def test_a_file_of_something_else_is_refused(
        self, whole: tuple[Tuning, Path], loaded: tuple[Any, Any], folder: Path, tmp_path: Path
    ) -> None:
        header = whole[1].read_text().split("\n")[0]
        for text, word in (("hello\n", "does not say"), (f'{header}\n{{"x": 1}}\n', "line 2 is no measurement")):
            (tmp_path / "rows.jsonl").write_text(text)
            with pytest.raises(InputError) as error:
                tune(*loaded, folder, **FAST, rows=tmp_path / "rows.jsonl", progress=False)
            assert_says(error.value, word)

    def test_time_that_is_over_is_said(self, loaded: tuple[Any, Any], folder: Path) -> None:
        given = {**FAST, "measurements": None}
        found = tune(*loaded, folder, **given, minutes=1e-6, progress=False)
        assert found.config is None and "before the limit" in found.verdict[0]
        assert not found.plan["complete"]

    def test_what_a_limit_cut_says_how_it_is_repeated(self, whole: tuple[Tuning, Path]) -> None:
        assert not whole[0].plan["complete"] and whole[0].plan["measurements"] == FAST["measurements"]
        assert any(f"--measurements {FAST['measurements']}" in sentence for sentence in whole[0].verdict)

    def test_what_was_reused_is_said_as_what_it_is(
        self, whole: tuple[Tuning, Path], loaded: tuple[Any, Any], folder: Path, tmp_path: Path
    ) -> None:
        """Costs are no measurements: of those there are the preset's and as many as the limit allows."""
        file, heard = tmp_path / "rows.jsonl", Heard()
        file.write_bytes(whole[1].read_bytes())
        tune(*loaded, folder, **FAST, rows=file, progress=heard)
        (note,) = (note for note in heard.notes if note.startswith("reused from"))
        costs = sum(json.loads(line)["key"][0] == "cost" for line in file.read_text().splitlines()[1:])
        measurements, of_cost = map(int, re.findall(r"(\d+) (?:measurements|costs)", note))
        assert measurements == 1 + FAST["measurements"] and measurements < of_cost <= costs

    @pytest.mark.parametrize(
        "methods",
        [("illava-reference", "illava"), (HALF_IN_ENCODER, "illava-reference", "tome", "nearest")],
        ids=["two", "four"],
    )
    def test_the_order_of_methods_does_not_matter(
        self, loaded: tuple[Any, Any], folder: Path, methods: tuple[str | Method, ...]
    ) -> None:
        found = [
            tune(*loaded, folder, **{**FAST, "methods": order}, flops=0.6, progress=False)
            for order in (methods, methods[::-1], methods[:1] + methods)
        ]
        assert found[0].config is not None and found[0] == found[1] == found[2]

    @pytest.mark.parametrize(
        ("others", "flops", "remains"),
        [((), 0.4, "nothing remains"), (("illava",), 0.4, "nothing remains"), ((), 0.9, "a part is left out")],
    )
    def test_what_is_left_out_of_a_method_is_said_once(
        self, loaded: tuple[Any, Any], folder: Path, others: tuple[str, ...], flops: float, remains: str
    ) -> None:
        """A layout that wants square numbers: it merges in the decoder alone, which cannot save much."""
        heard = Heard()
        given = {**FAST, "methods": ["illava-reference", *others], "measurements": 6}
        found = tune(*loaded, folder, **given, flops=flops, progress=heard)
        (note,) = (note for note in heard.notes if "illava-reference" in note)
        assert re.match(rf"{remains} of method 'illava-reference': of \d+ candidates that were tried, ", note)
        assert "square number" in note and "\n" not in note
        assert (found.config is None) == (remains == "nothing remains" and not others)

    def test_a_method_that_costs_too_much_is_said_once(self, loaded: tuple[Any, Any], folder: Path) -> None:
        heard = Heard()
        tune(*loaded, folder, **{**FAST, "methods": "illava,tome".split(",")}, flops=0.15, progress=heard)
        (note,) = (note for note in heard.notes if "tome" in note)
        assert "nothing remains of method 'tome'" in note and "larger --flops" in note

    @pytest.mark.parametrize("flops", [0.4, 0.6])
    @pytest.mark.parametrize("method", ["tome", HALF_IN_LLM, HALF_IN_ENCODER], ids=["tome", "in llm", "in encoder"])
    def test_what_is_offered_is_within_reach(
        self, loaded: tuple[Any, Any], folder: Path, method: str | Method, flops: float
    ) -> None:
        """What is left behind every layer, by the report of a run, is what the settings say, to a token."""
        given = {**FAST, "methods": method, "measurements": 12}
        found = tune(*loaded, folder, **given, flops=flops, progress=False)
        offered = [point.settings for point in found.points if point.settings]
        assert offered
        for settings in offered:
            named = {"method": method} if isinstance(method, Method) else {}
            session = patch(loaded[0], **{**settings, **named})
            try:
                assert list(session.config.out_of_reach()) == []
                loaded[0](**item_inputs(loaded[1], [read(folder, question=QUESTION)[0].items[0]]))
                (visual,) = session.report.visuals
            finally:
                unpatch(loaded[0])
            assert_left(visual, settings)

    @pytest.mark.parametrize("methods", [["illava", "diverse"], ["tome"]], ids=str)
    def test_too_little_is_asked_for_and_what_is_said_helps(
        self, loaded: tuple[Any, Any], folder: Path, methods: list[str]
    ) -> None:
        given = {**FAST, "methods": methods, "measurements": 2, "progress": False}
        found = tune(*loaded, folder, **given, flops=0.01)
        assert found.config is None and found.verdict[0].startswith("merging does not pay: no candidate")
        with pytest.raises(InputError, match="nothing to save"):
            found.save("x.json")
        cure = re.search(r"give --flops ([\d.]+) or more", found.verdict[0])
        assert cure and tune(*loaded, folder, **given, flops=float(cure[1])).config is not None

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ({"least": 0.312}, ["costs 0.312", "give --flops 0.32 or more"]),
            ({"least": 0.7, "loyalty": 0.9}, ["costs 0.700", "give --flops 0.7 or more instead of --loyalty"]),
            ({"least": 0.97}, ["costs 0.970", "other --methods"]),
            ({"least": math.inf}, ["can run", "other --methods"]),
            ({"ranked": [BEST]}, ["over all questions", "a larger --flops"]),
            ({"ranked": [BEST], "loyalty": 0.9}, ["the best one has 80.0%", "a smaller --loyalty"]),
            ({"ended": "time"}, ["before the limit", "more minutes or measurements"]),
        ],
    )
    def test_every_refusal_names_its_cure(self, given: dict[str, Any], words: list[str]) -> None:
        judge: Any = SimpleNamespace(
            target=0.3, most=0.95, least=0.5, loyalty=None, choice=SimpleNamespace(seen=6), settings=lambda *_: {},
            sample=lambda *_: SimpleNamespace(loyalty=0.8), meter=SimpleNamespace(limit=SimpleNamespace(ended=None)),
        )  # fmt: skip
        vars(judge).update({name: value for name, value in given.items() if name in vars(judge)})
        judge.meter.limit.ended = given.get("ended")
        said = _why_not(judge, given.get("ranked", []))
        assert_says(InputError(said), *map(re.escape, words))
        assert "ask for less" not in said


def assert_left(visual: Any, settings: dict[str, Any]) -> None:
    """Each merging layer leaves the fraction that the settings name, to a token of each of two tiles."""
    tokens, layers = visual.vision_tokens, settings["vit_layers"]
    for layer in layers:
        assert tokens[layer + 1] == pytest.approx((1 - settings["vit_r"]) * tokens[layer], abs=2)
    left = visual.language_tokens[0]
    for _ in settings["llm_layers"]:
        left *= settings["llm_ratio"]
    assert visual.left == pytest.approx(left, abs=2)


def first_word(model: Any, inputs: Any) -> list[float]:
    with torch.inference_mode():
        logits = model(**inputs.to(model.device)).logits[0, -1].double()
    values: list[float] = logits.softmax(-1).tolist()
    return values


class TestLoyalty:
    def test_the_cheapest_that_keeps_it(self, loaded: tuple[Any, Any], folder: Path) -> None:
        found = tune(*loaded, folder, **{**FAST, "measurements": 3}, loyalty=0.5, progress=False)
        (tuned, *_), wanted = found.points, found.wanted
        assert tuned.name == "tuned" and wanted == {"loyalty": 0.5}
        preset = next(one for one in found.points if one.name == "preset")
        assert tuned.cost < preset.cost, "half of the answers can be kept for less"

    def test_out_of_reach(self, loaded: tuple[Any, Any]) -> None:
        """Noise that a model says something about, and something else as soon as a token is lost."""
        rng = np.random.default_rng(0)
        noise = [rng.integers(0, 256, (*SIZE, 3), np.uint8) for _ in range(24)]
        items = [Item("noise", (picture,), False, "which digit is it ?") for picture in noise]
        given: dict[str, Any] = {"methods": ["random"], "rounds": 1, "measurements": 2, "progress": False}
        found = tune(*loaded, items, **given, loyalty=1.0)
        assert found.config is None
        assert found.verdict[0].startswith("merging does not pay: no candidate that saves 5% of the FLOPs")
        assert "the best one has" in found.verdict[0]


class TestBadArguments:
    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ({"flops": 0}, ["flops is 0", "(0, 0.95]"]),
            ({"flops": 1.0}, ["flops is 1.0", "(0, 0.95]"]),
            ({"flops": math.nan}, ["flops is nan"]),
            ({"flops": True}, ["flops is True"]),
            ({"loyalty": 1.2}, ["loyalty is 1.2", "(0, 1]"]),
            ({"loyalty": -1}, ["loyalty is -1"]),
            ({"flops": 0.5, "loyalty": 0.9}, ["flops is 0.5 and loyalty is 0.9", "one of them"]),
            ({"minutes": 0}, ["minutes is 0"]),
            ({"minutes": math.nan}, ["minutes is nan"]),
            ({"rounds": 0}, ["rounds is 0", "1 or more"]),
            ({"measurements": 0}, ["measurements is 0"]),
            ({"seed": -1}, ["seed is -1"]),
            ({"methods": []}, ["methods is empty"]),
            ({"methods": ["nothing"]}, ["nothing", "choose one of"]),
            ({"methods": [Method("fastv", merge="nearest")]}, ["two methods", "fastv"]),
            ({"methods": Method("mine", encoder_score=lambda tokens: tokens.positions)}, ["encoder_score", "mine"]),
            ({"methods": Method("mine", merge="drop", llm_merge=RULES["drop"])}, ["llm_merge of method 'mine'"]),
            ({"question": "what is <image> ?"}, ["item 1: question contains '<image>'"]),
            ({"items": ""}, ["items is ''", "give a folder"]),
            ({"items": " "}, ["items is ' '"]),
        ],
    )
    def test_are_refused_in_one_line(
        self, loaded: tuple[Any, Any], folder: Path, given: dict[str, Any], words: list[str]
    ) -> None:
        with pytest.raises(illava_hooks.IllavaHooksError) as error:
            tune(*loaded, **{"items": folder, **given}, progress=False)
        assert_says(error.value, *map(re.escape, words))

    def test_a_patched_model(self, loaded: tuple[Any, Any], folder: Path) -> None:
        patch(loaded[0])
        try:
            with pytest.raises(PatchStateError, match="unpatch"):
                tune(*loaded, folder, progress=False)
        finally:
            unpatch(loaded[0])


class TestTheCommand:
    def test_writes_what_preset_takes(self, folder: Path, tmp_path: Path) -> None:
        file = tmp_path / "mine.json"
        command = ["tune", "--items", str(folder), "--rounds", "1", "--measurements", "2", "--output", str(file)]
        done = CliRunner().invoke(app, [*command, "--methods", "diverse", "--question", QUESTION])
        assert done.exit_code == 0, done.output
        assert "| tuned | 0." in done.stdout and "--preset" in done.stdout
        assert {path.name for path in tmp_path.iterdir()} >= {"mine.json", "mine.front.json", "mine.rows.jsonl"}
        body = json.loads((tmp_path / "mine.front.json").read_text())
        assert [one["name"] for one in body["points"]][:2] == ["tuned", "preset"]
        assert body["plan"]["measurements"] == 2 and body["questions"] == [6, 2]
        asked = CliRunner().invoke(app, ["ask", "--question", QUESTION, "--preset", str(file), "--json"])
        assert asked.exit_code == 0, asked.output
        page = (Path(__file__).parents[1] / "docs" / "tuning.md").read_text()
        (timed,) = re.findall(r"^illava-hooks (bench .*)$", page, re.M)
        command = [str(file) if word == "tuned.json" else word for word in timed.split()]
        command[command.index("--model") + 1] = "tiny"  # the page's is to be downloaded
        done = CliRunner().invoke(app, [*command, "--rounds", "1"])
        assert done.exit_code == 0 or not TAKES_READY_FEATURES, done.output

    def test_where_it_does_not_pay_no_settings_are_written(self, folder: Path, tmp_path: Path) -> None:
        file = tmp_path / "mine.json"
        command = ["tune", "--items", str(folder), "--rounds", "1", "--measurements", "1", "--output", str(file)]
        done = CliRunner().invoke(app, [*command, "--question", QUESTION, "--flops", "1/100"])
        assert done.exit_code == 1, done.output
        assert "merging does not pay" in done.stdout and not file.exists()

    @pytest.mark.parametrize(
        ("options", "word"),
        [(["--output", "x.txt"], "ends in .json"), (["--output", "no/x.json"], "where no file can be"),
         (["--flops", "half"], "--flops"), (["--loyalty", "2"], "loyalty is 2"), (["--items", "nowhere"], "nowhere"),
         (["--items", ""], "items is ''; give a folder"), (["--input", " "], "items is ' '"),
         (["--methods", " , "], "methods is empty"), (["--methods", "illava, nothing"], "method is 'nothing'")],
    )  # fmt: skip
    def test_errors_are_one_line(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], word: str
    ) -> None:
        monkeypatch.chdir(tmp_path)
        done = CliRunner().invoke(app, ["tune", "--items", str(folder), *options])
        assert done.exit_code == 2
        assert done.stderr.startswith("error: ") and word in done.stderr and done.stderr.count("\n") == 1


def test_named_methods_come_from_the_registry() -> None:
    """Whatever has a name and can meet a budget is tried, without being listed anywhere here."""
    from illava_hooks.tools.tune.run import _methods

    able = {name for name, method in illava_hooks.METHODS.items() if method.layout == "aligned"}
    assert set(_methods(None)) == able - {"random"}
    assert list(itertools.islice(_methods("diverse"), 2)) == ["diverse"]


@pytest.mark.parametrize(("cost", "said"), [(0.548, True), (0.519, False), (0.3, False)])
def test_a_cost_that_is_missed_on_what_was_not_seen_is_said(cost: float, said: bool) -> None:
    judge: Any = SimpleNamespace(loyalty=None, counts_language=True, kinds={"image", "video"})
    sample: Any = SimpleNamespace(cost=cost, loyalty=0.9, loss=0.1)
    config: Any = object()
    plan = {"complete": True}
    for held_out in (1, 40):
        found = Tuning(config, (), (), {"flops": 0.5}, (60, held_out), (60, held_out), plan)
        verdict = _verdict(found, judge, [], {TUNED: sample})
        assert any("more than the 0.500 that was wanted" in sentence for sentence in verdict) == said
        assert any("so few held-out questions, 1, tell little" in sentence for sentence in verdict) == (held_out == 1)
