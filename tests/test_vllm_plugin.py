"""The vLLM plugin as far as it needs no vLLM: settings, counts, digits, positions, hashes, refusals, registration.

What vLLM makes of it is in `tests/vllm_engine`, which `make test-vllm` runs.
"""

from __future__ import annotations

import json
import logging
import math
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from families import FAMILIES, family
from illava_hooks import MergeConfig, MergeConfigError, Method, PatchStateError, UnsupportedModelError
from illava_hooks.engine.counts import encoder_counts
from illava_hooks.engine.finding import find_family
from illava_hooks.integrations import vllm as plugin
from illava_hooks.integrations.vllm import positions
from illava_hooks.integrations.vllm.checks import settle
from illava_hooks.integrations.vllm.counts import KeptCounts, check_counts
from illava_hooks.integrations.vllm.models import BACKEND, MODELS
from illava_hooks.integrations.vllm.positions import (
    COLUMNS,
    Item,
    from_digits,
    grid_table,
    in_seconds,
    place,
    prompt_positions,
    to_digits,
    with_table,
)
from illava_hooks.integrations.vllm.settings import (
    AS_SERVED,
    Settings,
    Strength,
    overrides,
    settings_of,
    take_strength,
)
from tiny_models import tiny_model

IMAGE, TEXT = 7, 1


def configuration(name: str, given: Any) -> Any:
    """A model's configuration as vLLM leaves it behind ``hf_overrides``; it travels as JSON."""
    config = tiny_model(name).config
    config.illava = json.loads(json.dumps(given))
    return config


def settings(name: str = "qwen2_vl", **given: Any) -> Settings:
    found = settings_of(configuration(name, overrides(**given)["illava"]))
    assert found is not None
    return found


class TestSettings:
    def test_without_any_everything_is_stock(self) -> None:
        assert settings_of(tiny_model("qwen2_vl").config) is None

    @pytest.mark.parametrize("name", sorted(FAMILIES))
    def test_they_are_those_of_patch(self, name: str) -> None:
        layers = family(name).merging_layers[:2]
        found = settings(name, vit_layers=layers, vit_r=0.3)
        expected = MergeConfig.build(found.limits, layers, 0.3, [], 1.0, "illava", "auto", False)
        assert (found.config.image, found.config.video) == (expected.image, expected.video)
        assert not found.config.llm_layers

    def test_one_number_is_what_is_left_behind_the_encoder(self) -> None:
        schedule = settings(vit_layers=[1, 2], keep_encoder=0.5).config.image
        assert schedule.encoder_removed(400, 4) == [116, 84]

    def test_a_preset_fills_in_what_is_missing(self) -> None:
        config = tiny_model("qwen2_vl").config
        config.illava_presets = {"image": {"vit_layers": [1], "vit_r": 0.4, "llm_layers": [2], "llm_ratio": 0.5}}
        config.illava_presets["video"] = config.illava_presets["image"]
        for given in ({}, "auto", {"preset": "image"}):
            config.illava = given
            found = settings_of(config)
            assert found is not None and found.config.image.vit_r == 0.4 and not found.config.llm_layers

    def test_a_file_travels_by_its_contents(self, tmp_path: Path) -> None:
        said = settings(vit_layers=[1], vit_r=0.4, method=Method("mine", "uniform", merge="diverse"))
        said.config.save(tmp_path / "saved.json")
        sent = overrides(preset=tmp_path / "saved.json")
        (tmp_path / "saved.json").unlink()
        found = settings_of(configuration("qwen2_vl", sent["illava"]))
        assert found is not None and found.config == said.config

    @pytest.mark.parametrize("form", ["path", "contents"])
    def test_a_file_with_a_language_stage(self, tmp_path: Path, form: str) -> None:
        limits = settings(vit_layers=[1], vit_r=0.4).limits
        MergeConfig.build(limits, [1], 0.4, [2], 0.5, "illava", "auto", False).save(tmp_path / "both.json")
        path = str(tmp_path / "both.json")
        given = path if form == "path" else json.loads(Path(path).read_text())
        with pytest.raises(MergeConfigError, match=r"llm_layers is \[2\] in the preset's file.*Ray Data"):
            settings_of(configuration("qwen2_vl", given))

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            (3, "illava is 3; give an object"),
            ({"vit_r": 0.3, "keep_encoder": 0.3}, "keep_encoder is 0.3 and vit_r is 0.3; give one of them"),
            ({"llm_layers": [2]}, "llm_layers is .2.: inside vLLM only the vision encoder merges"),
            ({"llm_ratio": 0.5}, "llm_ratio is 0.5: inside vLLM"),
            ({"keep": 0.5}, "keep is 0.5: inside vLLM"),
            ({"vit_layer": [2]}, "unknown key 'vit_layer'; it may have"),
            ({"vit_layers": [99], "vit_r": 0.5}, "vit_layers"),
            ({"vit_layers": [1], "vit_r": 1.5}, "vit_r is 1.5"),
            ({"method": "no-such-method", "vit_layers": [1], "vit_r": 0.5}, "method is 'no-such-method'"),
            ({"method": {"merges": "drop"}, "vit_layers": [1], "vit_r": 0.5}, "unknown key 'merges'"),
            ("no-such-file.json", "cannot be read"),
            ("no-such-preset", "preset is 'no-such-preset'"),
        ],
    )
    def test_refusals(self, given: Any, words: str) -> None:
        with pytest.raises(MergeConfigError, match=words) as refused:
            settings_of(configuration("qwen2_vl", given))
        assert "\n" not in str(refused.value)

    def test_what_asks_nothing_of_the_language_model_is_taken(self) -> None:
        given: dict[str, Any]
        for given in ({"llm_layers": []}, {"llm_ratio": 1.0}, {"keep": None}):
            assert settings_of(configuration("qwen2_vl", {"vit_layers": [1], "vit_r": 0.5, **given})) is not None

    def test_functions_do_not_travel(self) -> None:
        with pytest.raises(MergeConfigError, match="encoder_score of method 'mine' is a function"):
            overrides(method=Method("mine", lambda inputs: inputs.positions))

    def test_a_method_of_names_travels(self) -> None:
        mine = Method("mine", "uniform", merge="diverse")
        assert settings(vit_layers=[1], vit_r=0.5, method=mine).config.method == replace(mine, quota=True)
        given = {"vit_layers": [1], "vit_r": 0.5, "method": {"encoder_score": "uniform", "merge": "diverse"}}
        found = settings_of(configuration("qwen2_vl", given))
        assert found is not None and found.config.method == Method("custom", "uniform", merge="diverse", quota=True)


class TestStrengths:
    @pytest.mark.parametrize("amount", [None, 0, 1, 16, 0.5, 0.1, 1 / 3])
    def test_numbers_travel_exactly(self, amount: Any) -> None:
        for strength in (Strength(vit_r=amount), Strength(keep_encoder=amount)):
            sent = torch.tensor([strength.to_numbers()])
            back = Strength.from_numbers(sent[0].tolist())
            assert back == strength and type(back.vit_r) is type(strength.vit_r)

    def test_they_are_taken_out_of_a_requests_arguments(self) -> None:
        left, strength = take_strength({"min_pixels": 4, "illava_vit_r": 0.25})
        assert left == {"min_pixels": 4} and strength == Strength(vit_r=0.25)
        assert take_strength({"min_pixels": 4}) == ({"min_pixels": 4}, AS_SERVED)

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ({"illava_llm_ratio": 0.5}, "illava_llm_ratio is 0.5; a request may say"),
            ({"illava_vit_r": "0.5"}, "illava_vit_r is '0.5'; it must be a number"),
            ({"illava_vit_r": True}, "illava_vit_r is True; it must be a number"),
            ({"illava_vit_r": 0.5, "illava_keep_encoder": 0.5}, "give one of them"),
        ],
    )
    def test_refusals(self, given: Any, words: str) -> None:
        with pytest.raises(MergeConfigError, match=words):
            take_strength(given)

    def test_they_are_those_of_patch(self) -> None:
        served = settings(vit_layers=[1, 2], vit_r=0.25)
        assert served.at(AS_SERVED) == served.config
        for strength, given in ((Strength(vit_r=16), {"vit_r": 16}), (Strength(vit_r=0.5), {"vit_r": 0.5})):
            assert served.at(strength) == settings(vit_layers=[1, 2], **given).config
        assert served.at(Strength(keep_encoder=0.4)) == settings(vit_layers=[1, 2], keep_encoder=0.4).config
        kept = settings(vit_layers=[1, 2], keep_encoder=0.4)
        assert kept.at(Strength(vit_r=16)) == settings(vit_layers=[1, 2], vit_r=16).config
        assert not kept.at(Strength(vit_r=0)).image.merges_in_encoder

    def test_a_server_may_start_without_merging(self) -> None:
        idle = settings(vit_layers=[1, 2], vit_r=0)
        assert not idle.config.image.merges_in_encoder
        assert idle.at(Strength(vit_r=0.5)) == settings(vit_layers=[1, 2], vit_r=0.5).config
        with pytest.raises(MergeConfigError, match=r"vit_layers is \[\] on this server"):
            settings(vit_layers=[], vit_r=0).at(Strength(vit_r=0.5))

    def test_out_of_range(self) -> None:
        for strength in (
            Strength(vit_r=1.5),
            Strength(vit_r=-1),
            Strength(keep_encoder=0.0),
            Strength(vit_r=math.inf),
        ):
            with pytest.raises(MergeConfigError):
                settings(vit_layers=[1, 2], vit_r=0.25).at(strength)

    def test_hashes_tell_settings_apart(self) -> None:
        """And nothing else does: equal settings that were given in two ways share what is cached."""
        digests = [settings(vit_layers=[1], vit_r=r).digest for r in (0.25, 0.5, 16)]
        digests.append(settings(vit_layers=[1], vit_r=0.25, method="nearest").digest)
        digests.append(settings(vit_layers=[1, 2], vit_r=0.25).digest)
        assert len(set(digests)) == 5
        config = configuration("qwen2_vl", settings(vit_layers=[1], vit_r=0.25).config.to_entry())
        again = settings_of(config)
        assert again is not None and again.digest == digests[0]


class TestCounts:
    @pytest.mark.parametrize("name", sorted(name for name in FAMILIES if name.startswith("qwen")))
    def test_packed_rows(self, name: str, draw: random.Random) -> None:
        """Against the shared function, by hand; the whole of it against runs is in `test_counts`."""
        served = settings(name, vit_layers=family(name).merging_layers[:2], vit_r=0.25)
        counts = KeptCounts(served, configuration(name, {}))
        found: Any = find_family(tiny_model(name))
        traits = found.traits(4, False)
        for _ in range(20):
            time, height, width = draw.randint(1, 4), 2 * draw.randint(1, 12), 2 * draw.randint(1, 12)
            strength = draw.choice([AS_SERVED, Strength(vit_r=draw.randint(0, 40)), Strength(keep_encoder=0.3)])
            units = encoder_counts(served.at(strength), "video", traits, height * width).units
            assert counts("video", (time, height, width), strength) == time * units[-1]

    def test_tiles(self) -> None:
        """Cropped ones, too: what is shown keeps its share."""
        served = settings("llava_onevision", vit_layers=[1], vit_r=4)
        model = tiny_model("llava_onevision")
        counts = KeptCounts(served, model.config)
        for shape in ((1, 32, 32), (5, 64, 40), (3, 30, 64)):
            expected = find_family(model).kept_tokens(model.model, served.config, "image", shape)
            assert counts("image", shape, AS_SERVED) == expected

    def test_another_number_is_told(self) -> None:
        check_counts([3, 4], [3, 4])
        with pytest.raises(PatchStateError, match=r"left \[3, 4\] tokens, and the prompt has places for \[3, 5\]"):
            check_counts([3, 4], [3, 5])


@pytest.fixture
def draw() -> random.Random:
    return random.Random(5)


class TestDigits:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_any_length_survives_any_dtype(self, dtype: torch.dtype) -> None:
        numbers = torch.tensor([[0, 255], [256, 257], [301, 4095], [65535, 32768]])
        assert torch.equal(from_digits(to_digits(numbers).to(dtype)), numbers)

    def test_one_column_would_not(self) -> None:
        assert int(torch.tensor(301.0, dtype=torch.bfloat16)) == 300

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("interval", [1.0, 2, 1.6, 0.4, 12.5])
    def test_slices_by_the_clock(self, interval: float, dtype: torch.dtype) -> None:
        """Rounded down one by one; the rest stays."""
        slices, height, width = 40, 2, 3
        seats = torch.arange(0, slices * height * width, 5)
        rows = with_table(torch.zeros(len(seats), 4, dtype=dtype), grid_table(seats, height, width, slices))
        table = from_digits(in_seconds(rows, interval, 300)[:, -COLUMNS:])
        for seat, (t, h, w, extent) in zip(seats.tolist(), table.tolist(), strict=True):
            assert t == math.floor(seat // 6 * interval) and (h, w) == (seat % 6 // 3, seat % 3)
            assert extent == 300

    def test_places_in_a_grid(self) -> None:
        table = grid_table(torch.arange(2 * 3 * 4), 3, 4, 9)
        assert table.tolist() == [[t, h, w, 9] for t in range(2) for h in range(3) for w in range(4)]


def slow_positions(
    ids: list[int], grids: list[tuple[int, int, int]], kept: list[list[int]], flat: bool = False
) -> tuple[list[Any], int]:
    """Positions of a compacted prompt with plain loops: stock's positions of the whole prompt, at the survivors.

    By M-RoPE, or one after the other where ``flat``.
    """
    found: list[Any] = []
    base, visual = 0, iter(zip(grids, kept, strict=True))
    left = 0
    for token in ids:
        if token != IMAGE:
            found.append((base,) * 3)
            base += 1
            continue
        if not left:
            (time, height, width), seats = next(visual)
            places = [(t, h, w) for t in range(time) for h in range(height) for w in range(width)]
            found += [tuple(base + n for n in ((seat,) * 3 if flat else places[seat])) for seat in seats]
            base, left = base + (len(places) if flat else max(time, height, width)), len(seats)
        left -= 1
    return found, base - len(ids)


class Prompt:
    """A prompt with pictures of which some tokens are left."""

    def __init__(self, draw: random.Random, ends_with_text: bool = True, flat: bool = False) -> None:
        self.flat = flat
        self.ids: list[int] = []
        self.grids: list[tuple[int, int, int]] = []
        self.kept: list[list[int]] = []
        self.items: list[Item] = []
        self.embeddings: list[Tensor] = []
        for _ in range(draw.randint(1, 3)):
            self.ids += [TEXT] * draw.randint(0 if flat else 1, 5)
            grid = draw.randint(1, 3), draw.randint(1, 20), draw.randint(1, 20)
            whole = math.prod(grid)
            seats = sorted(draw.sample(range(whole), draw.randint(1, whole)))
            extent = whole if flat else max(grid)
            self.items.append(Item(len(self.ids), len(seats), extent))
            table = grid_table(torch.tensor(seats), grid[1], grid[2], extent)
            if flat:
                table[:, 0] = torch.tensor(seats)
            self.embeddings.append(with_table(torch.randn(len(seats), 6), table))
            self.ids += [IMAGE] * len(seats)
            self.grids.append(grid)
            self.kept.append(seats)
        if ends_with_text:
            self.ids += [TEXT] * draw.randint(1, 5)

    def expected(self) -> tuple[Tensor, int]:
        found, delta = slow_positions(self.ids, self.grids, self.kept, self.flat)
        return torch.tensor(found).T, delta

    def chunk(self, start: int, end: int) -> list[Tensor]:
        """What vLLM hands over with tokens ``start .. end - 1``."""
        parts = []
        for item, rows in zip(self.items, self.embeddings, strict=True):
            first, last = max(start - item.offset, 0), min(end - item.offset, item.length)
            if first < last:
                parts.append(rows[first:last])
        return parts


class TestPositions:
    @pytest.mark.parametrize("flat", [False, True])
    @pytest.mark.parametrize("ends_with_text", [True, False])
    @pytest.mark.parametrize("seed", range(12))
    def test_chunks_of_any_size(self, seed: int, ends_with_text: bool, flat: bool) -> None:
        """Also of text models with plain positions, which look at the first row; there pictures may touch."""
        draw = random.Random(seed)
        prompt = Prompt(draw, ends_with_text, flat)
        rows = 1 if flat else 3
        expected, delta = prompt.expected()
        found, told = prompt_positions(len(prompt.ids), prompt.items, flat)
        text = torch.tensor(prompt.ids) == TEXT
        assert told == delta and torch.equal(found[:rows, text], expected[:rows, text])
        start = 0
        while start < len(prompt.ids):
            end = min(len(prompt.ids), start + draw.randint(1, 40))
            told = self.step(prompt, found, start, end)
            assert told == delta and torch.equal(found[:rows, :end], expected[:rows, :end])
            start = end
        assert place(prompt.ids, [IMAGE], [], found, start, flat)[2] == delta
        # Preempted, and from the start again; and behind what a prefix cache had.
        for start in (0, draw.randint(0, len(prompt.ids) - 1)):
            assert self.step(prompt, found, start, len(prompt.ids)) == delta
            assert torch.equal(found[:rows], expected[:rows])

    def step(self, prompt: Prompt, held: Tensor, start: int, end: int) -> int:
        rows = prompt.chunk(start, end)
        clean, placed, delta = place(prompt.ids, [IMAGE], rows, held, start, prompt.flat)
        assert all(a.shape[1] + COLUMNS == b.shape[1] for a, b in zip(clean, rows, strict=True))
        held.copy_(placed)
        return delta

    @pytest.mark.parametrize("seed", range(6))
    def test_an_engine_that_hands_over_copies(self, seed: int) -> None:
        """What is remembered beside the tensor is not there; the digits tell how far the last picture reaches."""
        draw = random.Random(seed)
        prompt = Prompt(draw, ends_with_text=False)
        expected, delta = prompt.expected()
        held = prompt_positions(len(prompt.ids), prompt.items)[0]
        middle = draw.randint(1, len(prompt.ids) - 1)
        for start, end in ((0, middle), (middle, len(prompt.ids))):
            rows = prompt.chunk(start, end)
            if rows:
                _, held, told = place(torch.tensor(prompt.ids), [IMAGE], rows, held.clone(), start)
                assert told == delta
        assert torch.equal(held, expected)

    @pytest.mark.parametrize("broken", ["h and w", "one digit", "extent"])
    def test_mutations(self, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
        right = positions.grid_table
        changes: dict[str, tuple[str, Callable[..., Any]]] = {
            "h and w": ("grid_table", lambda *given: right(*given)[:, [0, 2, 1, 3]]),
            "one digit": ("from_digits", lambda columns: columns.long()[:, 1::2]),
            "extent": ("Item", lambda offset, length, extent: Item(offset, length, extent + 1)),
        }
        name, change = changes[broken]
        seats = list(range(0, 900, 3))
        ids = [TEXT, *[IMAGE] * len(seats), TEXT]
        expected, _ = slow_positions(ids, [(1, 3, 300)], [seats])

        def found() -> Tensor:
            rows = with_table(torch.zeros(len(seats), 1), positions.grid_table(torch.tensor(seats), 3, 300, 300))
            held, _ = prompt_positions(len(ids), [positions.Item(1, len(seats), 300)])
            return place(ids, [IMAGE], [rows], held, 0)[1]

        assert torch.equal(found(), torch.tensor(expected).T)
        monkeypatch.setattr(positions, name, change)
        assert not torch.equal(found(), torch.tensor(expected).T)


def engine_config(given: Any, name: str = "qwen2_vl", **changes: Any) -> Any:
    """The parts of vLLM's configuration that are looked at."""
    model = SimpleNamespace(
        hf_config=configuration(name, given),
        architecture=changes.pop("architecture", next(iter(MODELS))),
        multimodal_config=SimpleNamespace(
            enable_mm_embeds=changes.pop("enable_mm_embeds", False),
            video_pruning_rate=changes.pop("video_pruning_rate", None),
        ),
    )
    lora = changes.pop("lora", None)
    parallel = SimpleNamespace(pipeline_parallel_size=changes.pop("pipeline_parallel_size", 1))
    compilation = SimpleNamespace(compile_mm_encoder=changes.pop("compile_mm_encoder", False))
    return SimpleNamespace(
        model_config=model,
        parallel_config=parallel,
        lora_config=lora,
        speculative_config=changes.pop("draft", None),
        compilation_config=compilation,
    )


class TestRefusals:
    GIVEN = {"vit_layers": [1], "vit_r": 0.5}

    @pytest.mark.parametrize(
        ("given", "changes", "words"),
        [
            ({}, {"pipeline_parallel_size": 2}, "pipeline_parallel_size is 2"),
            ({}, {"lora": SimpleNamespace(enable_tower_connector_lora=True)}, "LoRA on the vision encoder"),
            ({}, {"compile_mm_encoder": True}, "compile_mm_encoder is True"),
            ({}, {"draft": object()}, "speculative decoding is on"),
            ({}, {"enable_mm_embeds": True}, "ready-made embeddings"),
            ({}, {"video_pruning_rate": 0.5}, "video_pruning_rate is 0.5"),
            ({}, {"architecture": "SomeForCausalLM"}, "SomeForCausalLM, in which nothing can merge"),
            ({"method": "diverse"}, {}, "'diverse' weighs merged tokens"),
            ({"method": "novel"}, {}, "'novel' weighs merged tokens"),
            ({"method": "random"}, {}, "'random' draws lots"),
            ({"method": "illava-reference"}, {}, "as published code does"),
            ({"vit_r": 2.5}, {}, "vit_r is 2.5"),
        ],
    )
    def test_what_does_not_go_together(self, given: Any, changes: Any, words: str) -> None:
        with pytest.raises(UnsupportedModelError, match=words) as refused:
            settle(engine_config({**self.GIVEN, **given}, **changes), True)
        assert "\n" not in str(refused.value) and str(refused.value).startswith("illava: ")

    def test_every_process_reads_the_same(self) -> None:
        config = engine_config(self.GIVEN, lora=SimpleNamespace(enable_tower_connector_lora=False))
        before = settings_of(config.model_config.hf_config)
        settle(config, True)
        entry = config.model_config.hf_config.illava
        assert json.loads(json.dumps(entry)) == entry and entry["image"]["vit_layers"] == [1]
        after = settings_of(config.model_config.hf_config)
        assert before is not None and after is not None and before.config == after.config


class TestRegistration:
    @pytest.mark.parametrize(
        ("version", "known"),
        [("0.29.0", True), ("0.32.0+cpu", True), ("0.32.1rc1", True), ("0.28.9", False), ("0.33.0", False)]
        + [("1.0.0", False), ("dev", False)],
    )
    def test_versions(self, version: str, known: bool) -> None:
        number = plugin.version_of(version)
        assert (number is not None and plugin.SUPPORTED[0] <= number < plugin.SUPPORTED[1]) == known

    def stand_in(self, monkeypatch: pytest.MonkeyPatch, version: str) -> Any:
        """As much of vLLM as registration touches."""

        class VllmConfig:
            checked = 0

            def try_verify_and_update_config(self) -> None:
                VllmConfig.checked += 1

        vllm, config = ModuleType("vllm"), ModuleType("vllm.config")
        models: dict[str, str] = {}
        vllm.__version__ = version  # type: ignore[attr-defined]
        vllm.ModelRegistry = SimpleNamespace(register_model=models.__setitem__)  # type: ignore[attr-defined]
        config.VllmConfig = VllmConfig  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "vllm", vllm)
        monkeypatch.setitem(sys.modules, "vllm.config", config)
        return SimpleNamespace(models=models, config=VllmConfig)

    def test_it_can_be_repeated(self, monkeypatch: pytest.MonkeyPatch) -> None:
        vllm = self.stand_in(monkeypatch, "0.32.0+cpu")
        plugin.register()
        once = vllm.config.try_verify_and_update_config
        plugin.register()
        assert vllm.models == {**MODELS, **BACKEND} and vllm.config.try_verify_and_update_config is once
        served = vllm.config()
        served.model_config = SimpleNamespace(hf_config=SimpleNamespace())
        served.try_verify_and_update_config()
        assert vllm.config.checked == 1, "stock's own checks"
        served.model_config = None
        served.try_verify_and_update_config()
        assert vllm.config.checked == 2
        served = engine_config({"vit_r": 0.5, "vit_layers": [1]}, pipeline_parallel_size=2)
        with pytest.raises(UnsupportedModelError, match="pipeline_parallel_size is 2"):
            once(served)
        served.model_config.config_updated = True
        once(served)  # what stock has checked is not checked again

    def test_an_unknown_version_is_left_alone(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        vllm = self.stand_in(monkeypatch, "0.41.0")
        stock = vllm.config.try_verify_and_update_config
        with caplog.at_level(logging.WARNING, "illava_hooks"):
            plugin.register()
        assert vllm.models == {} and vllm.config.try_verify_and_update_config is stock
        (line,) = caplog.messages
        assert "0.41.0" in line and "nothing merges" in line and "\n" not in line

    def test_vllm_finds_it(self) -> None:
        import tomllib

        root = Path(__file__).resolve().parents[1]
        project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
        (entry,) = project["entry-points"]["vllm.general_plugins"].values()
        assert entry == "illava_hooks.integrations.vllm:register"
        needed = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
        assert not any(name.startswith("vllm") for name in needed)

    def test_classes_are_named_by_strings(self) -> None:
        for model in (*MODELS.values(), *BACKEND.values()):
            module, name = model.split(":")
            path = Path(plugin.__file__).parent / f"{module.rsplit('.', 1)[1]}.py"
            assert f"class {name}(" in path.read_text()
