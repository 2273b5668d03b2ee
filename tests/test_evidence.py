"""`bench` and `evaluate`: what they measure is what was asked, and their arithmetic is right."""

from __future__ import annotations

import contextlib
import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from families import families, families_and_methods, family_of
from helpers import needs_ready_features
from illava_hooks import METHODS, PRESETS, MergeReport, patch, session_of, tiny
from illava_hooks.cli import app
from illava_hooks.engine.compat import CACHE
from illava_hooks.engine.regions import listening
from illava_hooks.errors import InputError, MergeConfigError
from illava_hooks.tools.bench import (
    SHAPES,
    Comparison,
    Measurement,
    MergeCost,
    Stage,
    Workload,
    build_shape,
    build_workload,
    comparison,
    flops_fit,
    measure,
    measure_alternating,
    merge_cost,
    verdict,
)
from illava_hooks.tools.bench.meters import Memory, Stopwatch, timed
from illava_hooks.tools.datasets import load_items, read_items, scene_items
from illava_hooks.tools.evaluate import (
    Outcome,
    budget_settings,
    downsampled,
    interval,
    paired_interval,
    run_items,
    sweep,
)
from illava_hooks.tools.progress import Progress

FAMILIES = families(embedded=True)
#: The smallest shape of each family.
NARROW = {name: next(iter(family_of(name).shapes)) for name in families(shapes=True)}


class Heard(Progress):
    """Which rows run."""

    def __init__(self) -> None:
        self.steps: list[str] = []

    def step(self, what: str) -> None:
        self.steps.append(what)


class TestStatistics:
    def test_interval_of_a_share(self) -> None:
        values = np.random.default_rng(0).random(2000) < 0.8
        low, high = interval(values)
        half = 1.96 * np.sqrt(values.mean() * (1 - values.mean()) / len(values))
        assert low == pytest.approx(values.mean() - half, abs=0.003)
        assert high == pytest.approx(values.mean() + half, abs=0.003)
        assert interval(values) == (low, high), "the same resamples each time"

    def test_pairs_are_compared_question_by_question(self) -> None:
        rng = np.random.default_rng(1)
        hard = rng.random(2000)
        one, other = hard < 0.80, hard < 0.78  # the same questions: every answer of the second is one of the first
        low, high = paired_interval(one, other)
        assert 0 < low < 0.02 < high < 0.04
        assert interval(one)[0] < interval(other)[1], "which intervals of their own do not show"

    def test_divergence(self) -> None:
        logits = torch.randn(2, 3, 5, dtype=torch.float64)
        p, q = logits.log_softmax(-1)
        first, second = (Outcome([""] * 3, rows.numpy()) for rows in (p, q))
        expected = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
        np.testing.assert_allclose(first.divergence(second), expected.numpy(), atol=1e-9)
        assert first.divergence(first).max() < 1e-12


class TestBudgets:
    @pytest.mark.parametrize("stage", ["encoder", "language", "both"])
    @pytest.mark.parametrize("kept", [0.5, 1 / 3, 2 / 9, 1 / 9])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_are_met(self, family: str, kept: float, stage: str) -> None:
        model, processor = tiny.load(family)
        session = patch(model, **budget_settings(PRESETS[f"{family}/tiny"]["image"], stage, kept))
        run_items(model, processor, scene_items(20), batch_size=20)
        # Whole tokens per tile, whole 2x2 groups, and newlines, which the encoder cannot merge.
        assert session.report.kept_fraction == pytest.approx(kept, abs=0.09 if stage == "encoder" else 0.06)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_whole_fraction_is_identity(self, family: str) -> None:
        model = tiny.load(family)[0]
        config = patch(model, **budget_settings(PRESETS[f"{family}/tiny"]["image"], "both", 1.0)).config
        assert config.image.is_identity

    @pytest.mark.parametrize("family", FAMILIES)
    def test_out_of_range(self, family: str) -> None:
        schedule = PRESETS[f"{family}/tiny"]["image"]
        for wrong in (0.0, 1.5):
            with pytest.raises(InputError, match="kept is"):
                budget_settings(schedule, "both", wrong)
        with pytest.raises(InputError, match="stage is 'none'"):
            budget_settings(schedule, "none", 0.5)

    def test_downsampled_pictures_have_the_area(self) -> None:
        item = scene_items(20)[-1]
        (small,) = downsampled([item], 0.25)[0].pictures
        assert small.shape == (item.pictures[0].shape[0] // 2, item.pictures[0].shape[1] // 2, 3)


class TestSweep:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_rows_are_right_and_resumable(self, family: str, tmp_path: Path) -> None:
        model, processor = tiny.load(family)
        items = scene_items(20)
        file = tmp_path / "rows.jsonl"
        settings: dict[str, Any] = {"stages": ["both"], "fractions": [1.0, 0.5], "file": file, "batch_size": 5}
        rows = sweep(model, processor, items, ["illava"], **settings)
        assert [row.method for row in rows] == ["none", "illava"] and session_of(model) is None
        stock, merged = rows
        assert stock.loyalty == 1 and stock.divergence == 0 and stock.accuracy == np.mean(stock.right)
        assert merged.divergence > 0 and merged.measured < 0.6
        again = sweep(model, processor, items, ["illava", "random"], **settings, progress=(heard := Heard()))
        assert heard.steps == ["unpatched", "random, both, 0.500"] and again[1] == merged
        assert len(file.read_text().splitlines()) == 4, "a header and three rows"

    @pytest.mark.parametrize(
        ("asked", "told"),
        [
            ((["illava", "best"], ["both"], [0.5]), "method is 'best'"),
            ((["illava"], ["both", "head"], [0.5]), "stage is 'head'"),
            ((["illava"], ["both"], [0.5, 2.0]), r"kept is 2.0; give a fraction in \(0, 1\]"),
            ((["downsample"], ["both"], [0.0]), "kept is 0.0"),
        ],
    )
    def test_what_cannot_be_is_told_before_anything_runs(self, asked: tuple[Any, Any, Any], told: str) -> None:
        model, processor = tiny.load(FAMILIES[0])
        with pytest.raises((InputError, MergeConfigError), match=told):
            sweep(model, processor, scene_items(5), *asked, progress=(heard := Heard()))
        assert heard.steps == []

    def test_items_of_your_own(self, tmp_path: Path) -> None:
        for index, item in enumerate(scene_items(5)):
            Image.fromarray(item.pictures[0]).save(tmp_path / f"{index}.png")
        rows = [
            {"image": "0.png", "question": "is there a red circle ?", "answer": "no"},
            {
                "image": ["0.png", "1.png"],
                "question": "which image has a red circle ?",
                "answer": "first",
                "kind": "two",
            },
            {"video": str(tiny.media("clip.gif")), "question": "which way does the circle move ?", "answer": "left"},
        ]
        file = tmp_path / "mine.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
        items = read_items(file)
        assert [(item.kind, item.video, len(item.pictures)) for item in items] == [
            ("mine", False, 1),
            ("two", False, 2),
            ("mine", True, 1),
        ]
        assert items[2].pictures[0].shape[0] == 8
        file.write_text('{"image": "0.png"}')
        with pytest.raises(InputError, match=r"mine.jsonl, line 1 is no item"):
            read_items(file)
        with pytest.raises(InputError, match="choose one of"):
            load_items("nothing", 5)

    def test_command(self) -> None:
        model = family_of(FAMILIES[-1]).embedded
        arguments = f"evaluate --questions 20 --methods illava,uniform,downsample --kept 0.5 --model {model}"
        result = CliRunner().invoke(app, arguments.split())
        assert result.exit_code == 0, result.output
        rows = [line for line in result.stdout.splitlines() if line.startswith("| ")]
        assert len(rows) == 5 and "| none | both | 1.000 |" in rows[1]
        refused = CliRunner().invoke(app, ["evaluate", "--methods", "best", "--questions", "5"])
        assert refused.exit_code == 2 and "method is 'best'" in refused.stderr


class TestBench:
    @needs_ready_features
    @pytest.mark.parametrize("shape", NARROW.values())
    @pytest.mark.parametrize("kind", ["tiles", "images", "frames"])
    def test_workloads_run_and_merge(self, shape: str, kind: str, caplog: pytest.LogCaptureFixture) -> None:
        load = {
            "tiles": Workload(tiles=3, patches=400, text=40, new=3),
            "images": Workload(images=2, patches=256, batch=2, text=40, new=3),
            "frames": Workload(frames=4, patches=256, text=40, new=3),
        }[kind]
        caplog.set_level("WARNING", logger="illava_hooks")
        model = build_shape(shape, narrow=True)
        known = family_of(model)
        if load.frames and not (known.takes_frames or known.tiles_are_visuals):
            pytest.skip("takes images only")
        inputs = build_workload(model, load)
        (plain,), (merged,) = measure_alternating(model, inputs, {}, 1, load.new, warm_up=False)
        assert (plain.merged, merged.merged) == (False, True)
        stages = [getattr(run, name) for run in (plain, merged) for name in ("encoder", "projector", "language")]
        assert min(stage.wall_s for stage in stages) > 0 and min(stage.cpu_s for stage in stages) > 0
        assert plain.decode_s > 0 and plain.cpu_s == pytest.approx(sum(stage.cpu_s for stage in stages[:3]))
        cost = merge_cost(model, inputs, {}, steps=2)
        assert session_of(model) is None and 0 < cost.share < 1 and 0.1 < cost.decoding < 10
        after, before = cost.report.kv_bytes
        assert (merged.kv_bytes, plain.kv_bytes) == (after, before) and after < before
        visuals = load.batch * load.images
        if family_of(model).tiles_are_visuals:
            visuals = load.batch * load.frames or visuals * load.tiles
        assert len(cost.report.visuals) == visuals
        # The features go to a forward: there is nothing to warn of.
        assert not [record.message for record in caplog.records if "outside of a forward" in record.message]

    def test_published_shapes(self) -> None:
        sizes = {}
        for name in SHAPES:
            with torch.device("meta"):
                model = build_shape(name, "meta")
            sizes[name] = model.num_parameters() / 1e9
        # Published sizes less the vocabularies: 152,000 words times the width, twice where they are not tied.
        assert sizes == pytest.approx(
            {shape: billions for name in NARROW for shape, billions in family_of(name).shapes.items()}
            | {"gemma-3-4b": 3.63, "gemma-3-12b": 11.18}
            # Effective sizes, of which no audio tower is a part here, and with the vision tower.
            | {"gemma-4-e2b": 2.3 - 0.40 + 0.17, "gemma-4-e4b": 4.6 - 0.67 + 0.17},
            rel=0.04,
        )

    @needs_ready_features
    @pytest.mark.parametrize("shape", ["gemma-3-4b", "gemma-4-e2b"])
    def test_where_the_language_model_is_left_alone(self, shape: str) -> None:
        """Gemma: its cache is an unpatched one's, and what FLOPs allow is the encoder's share of the time."""
        model = build_shape(shape, narrow=True)
        found = comparison.compare(model, Workload(images=2, patches=300, text=20, new=3), {}, 1, warm_up=False)
        (plain,), (merged,) = found.plain, found.merged
        report = found.report
        assert plain.kv_bytes == merged.kv_bytes and report.llm_flops == report.kv_bytes == (0, 0)
        assert len(report.visuals) == 2 and report.encoder_flops[0] < report.encoder_flops[1]
        allowed = report.encoder_flops[0] / report.encoder_flops[1]
        times = [stage.wall_s for stage in (plain.encoder, plain.projector, plain.language)]
        assert found.ideal == pytest.approx((allowed * times[0] + times[1] + times[2]) / sum(times))
        assert allowed < found.ideal < 1 and 0 < found.cost.share < 1 and found.cost.decoding > 0
        assert flops_fit([found], merged=True) == 0

    def test_frames_of_gemma(self) -> None:
        """Gemma 3 takes images only, Gemma 4 frames of as many blocks as there is room for, where stock does."""
        with pytest.raises(InputError, match="frames is 4, and Gemma 3 takes images only"):
            build_workload(build_shape("gemma-3-4b", narrow=True), Workload(frames=4))
        model = build_shape("gemma-4-e2b", narrow=True)
        with pytest.raises(InputError, match="patches is 8; give 9 or more"):
            build_workload(model, Workload(patches=8))
        load = Workload(frames=4, patches=300, text=20, batch=2)
        if "num_frames_per_video" not in inspect.signature(type(model).forward).parameters:
            with pytest.raises(InputError, match="frames is 4, and this transformers joins no video with text"):
                build_workload(model, load)
            return
        inputs = build_workload(model, load)
        assert inputs["pixel_values_videos"].shape[:2] == (8, 270), "30 blocks of 9, of the 33 that there is room for"
        assert inputs["num_frames_per_video"].tolist() == [4, 4]
        session = patch(model, [5, 6], 0.16)
        with torch.no_grad():
            model(**inputs)
        assert [video.prompt_tokens for video in session.report.videos] == [120, 120]
        assert session.report.encoder_flops[0] < session.report.encoder_flops[1]

    @needs_ready_features
    @pytest.mark.parametrize("shape", NARROW.values())
    def test_patched_model_is_measured_in_turn(self, shape: str) -> None:
        model = build_shape(shape, narrow=True)
        inputs = build_workload(model, Workload(patches=256, text=20))
        plain, merged = measure_alternating(model, inputs, {}, rounds=2, new_tokens=1)
        assert [m.merged for m in plain] == [False] * 2 and [m.merged for m in merged] == [True] * 2
        assert session_of(model) is None and not measure(model, inputs, 1).merged
        patch(model)
        assert measure(model, inputs, 1).merged

    @needs_ready_features
    @pytest.mark.parametrize("shape", NARROW.values())
    def test_decode_steps_read_as_many_keys(self, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
        model = build_shape(shape, narrow=True)
        inputs = build_workload(model, Workload(tiles=3, patches=256, text=20))
        seen: list[tuple[bool, int, int]] = []
        stock, attending = type(model).forward, family_of(model).attending(model)

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            holding = [kwargs[CACHE].layers[index] for index in attending]
            keys = sum(layer.keys.shape[-2] for layer in holding if layer.is_initialized)
            if kwargs["input_ids"].shape[1] == 1:
                seen.append((session_of(self) is not None, keys, self.lm_head.weight.data_ptr()))
            return stock(self, *args, **kwargs)

        monkeypatch.setattr(type(model), "forward", forward)
        cost = merge_cost(model, inputs, {}, steps=3)
        assert [merged for merged, _, _ in seen] == [True, False] * 3, "in turn, one of them unpatched"
        layers = len(attending)
        for (_, ours, weight), (_, theirs, twin) in zip(seen[::2], seen[1::2], strict=True):
            assert abs(ours - theirs) <= layers / 2 and weight == twin
        width = cost.report.kv_bytes[0] / seen[0][1]
        assert width == cost.report.kv_bytes[1] / (layers * inputs["input_ids"].shape[1])

    def test_verdict_is_plain(self) -> None:
        def run(prefill: float, decode: float) -> Measurement:
            none = Stage(0.0, 0.0)
            return Measurement(False, none, none, Stage(prefill, prefill), decode, 0)

        assert verdict([run(1.0, 0.1)], [run(0.5, 0.1)], 2).startswith("Worth it? Yes: 45% less")
        assert verdict([run(1.0, 0.1)], [run(0.5, 0.1)], 1000).startswith("Worth it? Hardly: 0%")
        assert verdict([run(0.1, 0.1)], [run(0.15, 0.1)], 10).startswith(
            "Worth it? No: the prefill takes 50 ms longer"
        )

    def test_memory_is_that_of_the_stage(self) -> None:
        if not Path("/proc/self/clear_refs").exists():
            pytest.skip("memory peaks are read from Linux's /proc")
        memory = Memory(torch.device("cpu"))
        block = torch.ones(40_000_000)  # 160 MB: above what malloc serves from pages that it kept
        del block
        assert memory.peak() > 150e6
        assert Memory(torch.device("cpu")).peak() < 20e6

    @needs_ready_features
    @pytest.mark.parametrize("shape", NARROW.values())
    def test_regions_are_told_to_who_listens(self, shape: str) -> None:
        """What merging adds to each stage has a name; an unpatched forward and a decode step have none of it."""
        model, heard = build_shape(shape, narrow=True), list[str]()
        inputs = build_workload(model, Workload(tiles=3, patches=256, text=20))

        def note(name: str, *what: Any) -> contextlib.AbstractContextManager[None]:
            heard.append(name)
            return contextlib.nullcontext()

        def fail(*what: Any) -> Any:
            return 1 / 0

        with listening(note):
            measure(model, inputs, new_tokens=2)
            assert heard == []
            patch(model)
            with pytest.raises(ZeroDivisionError), listening(fail):
                measure(model, inputs, new_tokens=1)
            measure(model, inputs, new_tokens=1)
            once = list(heard)
            measure(model, inputs, new_tokens=3)
        both = {"encoder_plan", "encoder_enter", "encoder_merge", "attention", "records", "report", "restore"}
        assert {f"illava::{name}" for name in (*both, "prefill", "rank", "decoder_merge")} <= set(once)
        assert heard == 2 * once
        session = session_of(model)
        assert session is not None and once.count("illava::encoder_merge") == len(session.config.image.vit_layers)
        measure(model, inputs, new_tokens=1)
        assert heard == 2 * once, "nobody listens any more"

    def test_timed_functions_are_put_back(self) -> None:
        class Owner:
            def work(self, depth: int = 1) -> int:
                return self.work(depth - 1) + 1 if depth else 0

        stock = Owner.work
        spent: list[tuple[float, float]] = []
        with pytest.raises(ZeroDivisionError), timed(Stopwatch(torch.device("cpu")), [(Owner, "work")], spent):
            assert Owner().work(3) == 3
            1 / 0  # noqa: B018  # an error inside
        assert Owner.work is stock and len(spent) == 1, "inner calls belong to the outer one"

    def test_time_follows_the_flops(self) -> None:
        def found(flops: int, seconds: float) -> Comparison:
            run = Measurement(True, Stage(0.0, 0.0), Stage(0.0, 0.0), Stage(seconds, seconds), 0.0, 1)
            report = MergeReport((), (), (), (0, 0), (0, 0), (flops, 2 * flops), (1, 1))
            return Comparison("", [run], [run], MergeCost(report, 0.0, 0.0))

        assert flops_fit([found(100, 1.0), found(200, 2.0), found(300, 3.0)], merged=True) == pytest.approx(0)
        assert flops_fit([found(100, 1.0), found(200, 2.0), found(300, 3.3)], merged=True) == pytest.approx(0.1)

    @needs_ready_features
    @pytest.mark.parametrize("shape", [NARROW[name] for name in families(shapes=True, with_tiles=True)])
    def test_command(self, shape: str, tmp_path: Path) -> None:
        plot = tmp_path / "plot.png"
        arguments = f"bench --shape {shape} --narrow --tiles 3 --rounds 1 --new-tokens 2".split()
        result = CliRunner().invoke(app, [*arguments, "--plot", str(plot)])
        assert result.exit_code == 0, result.output
        for word in ("encoder", "language model", "KV cache", "Worth it?", "ideal", "as many keys", "too short"):
            assert word in result.stdout
        with Image.open(plot) as picture:
            assert picture.format == "PNG"
        body = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
        assert body["ideal_ratio"] == pytest.approx(body["flops"]["merged"] / body["flops"]["unpatched"])
        assert body["decoding_at_equal_kv"] > 0 and 0 < body["merge_share"] < 1
        assert CliRunner().invoke(app, ["bench"]).exit_code == 2
        assert "shape is 'gpt'" in CliRunner().invoke(app, ["bench", "--shape", "gpt"]).stderr

    @needs_ready_features
    @pytest.mark.parametrize("family", families(shapes=True, one_to_one=True, with_tiles=False))
    def test_fresh_processes(self, family: str) -> None:
        shape = NARROW[family]
        arguments = f"bench --shape {shape} --narrow --patches 256 --rounds 1 --new-tokens 1 --fresh --json".split()
        body = json.loads(CliRunner().invoke(app, arguments).stdout)
        assert [body[kind]["runs"][0]["merged"] for kind in ("unpatched", "merged")] == [False, True]
        assert body["report"]["visuals"][0]["prompt_tokens"] == 256 // family_of(family).patches_per_token
        # Only a fresh process has a peak that earlier runs did not leave room for.
        assert all(body[kind]["runs"][0]["encoder"]["peak_bytes"] > 0 for kind in ("unpatched", "merged"))

    @needs_ready_features
    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_model_with_few_words(self, family: str) -> None:
        """The embedded models know some eighty words."""
        arguments = f"bench --model {family_of(family).embedded} --patches 256 --rounds 1 --new-tokens 2".split()
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0 and "Worth it?" in result.stdout, result.output

    @needs_ready_features
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("kind", ["images", "frames"])
    @pytest.mark.parametrize("change", ["few words", "placeholder among the words", "brackets mean something"])
    def test_words_are_those_of_the_model(self, family: str, kind: str, change: str) -> None:
        model = tiny.load(family)[0]
        size = model.get_input_embeddings().num_embeddings
        if change == "few words":
            size = max(model.config.image_token_id, model.config.video_token_id) + 3
            model.resize_token_embeddings(size)
        if change == "placeholder among the words":
            model.config.image_token_id, model.config.video_token_id = 20, 21
        if change == "brackets mean something":
            model.config.image_token_id, model.config.video_token_id = 3, 4
        load = (
            Workload(images=2, patches=64, text=200) if kind == "images" else Workload(frames=2, patches=64, text=200)
        )
        inputs = build_workload(model, load)
        ids, special = inputs["input_ids"], [model.config.image_token_id, model.config.video_token_id]
        assert 0 <= ids.min() and ids.max() < size
        visual = ids[torch.isin(ids, torch.tensor(special))]
        assert len(visual.unique()) == 1, "text holds no placeholders"
        assert len(visual) == ids.shape[1] - load.text - 2 * load.images, "nor do the words around a visual"
        measure(model, inputs, new_tokens=1)

    @needs_ready_features
    @pytest.mark.parametrize("shape", [NARROW[n] for n in families(shapes=True, one_to_one=True, with_tiles=False)])
    def test_sweeps(self, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(comparison.SWEEPS, "patches", (64, 256))
        arguments = f"bench --shape {shape} --narrow --rounds 1 --new-tokens 2 --sweep patches".split()
        result = CliRunner().invoke(app, arguments)
        rows = [line for line in result.stdout.splitlines() if line.startswith("| ")]
        assert len(rows) == 3 and rows[1].startswith("| 64 patches") and "follow the FLOPs within" in result.stdout
        refused = CliRunner().invoke(app, [*arguments[:-1], "moons"])
        assert refused.exit_code == 2 and "sweep is 'moons'" in refused.stderr

    @pytest.mark.parametrize("family", families(embedded=True, one_to_one=True))
    def test_every_method_has_a_budget(self, family: str) -> None:
        model, processor = tiny.load(family)
        methods = [method for name, method in families_and_methods([*METHODS, "uniform"]) if name == family]
        rows = sweep(model, processor, scene_items(5), methods, ["both"], [0.6], batch_size=5)
        assert len(rows) == len(methods) + 1
