"""Qwen2.5-VL and Qwen3-VL in vLLM say what a patched model of transformers says, with weights drawn from a seed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from asking import Reference, ask_engine, largest_difference, request_of, timed
from drawn import FAMILIES
from engines import counted, running

from illava_hooks import PatchStateError
from illava_hooks.integrations.vllm import overrides
from illava_hooks.tools.datasets import clip_items, pair_items, scene_items
from illava_hooks.tools.items import Item

pytestmark = pytest.mark.filterwarnings("default")  # vLLM's own

CLOSE = 1e-4
COUNTS = counted(100), counted(40), counted(40)
SETTINGS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {"vit_layers": [1, 3], "vit_r": 0.29},
    "qwen3_vl": {"vit_layers": [1, 2], "vit_r": 0.29},
}


def questions() -> dict[str, list[Item]]:
    """Held-out questions by kind."""
    scenes, pairs, clips = COUNTS
    return {"scenes": scene_items(scenes), "pairs": pair_items(pairs), "clips": clip_items(clips)}


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def ours(name: str, reference: Callable[[str], Reference]) -> Reference:
    return reference(name)


@pytest.fixture(scope="module")
def engine(name: str, folder: Callable[[str], Path]) -> Iterator[Any]:
    with running(folder(name), hf_overrides=overrides(**SETTINGS[name])) as made:
        yield made


def requests(ours: Reference, items: list[Item], arguments: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    return [request_of(ours.processor, item, arguments) for item in items]


@pytest.mark.parametrize("kind", ["scenes", "pairs", "clips"])
def test_answers_are_those_of_patch(engine: Any, ours: Reference, name: str, kind: str) -> None:
    items = questions()[kind]
    found, expected = ask_engine(engine, requests(ours, items)), ours.ask(items, SETTINGS[name])
    assert largest_difference(found, expected) < CLOSE
    assert len({answer.ids for answer in found}) > len(items) // 4, "answers tell pictures apart"
    plain = ours.ask(items[:4], None)
    assert all(mine.prompt < whole.prompt for mine, whole in zip(found, plain, strict=False))


def test_strengths_are_interleaved(engine: Any, ours: Reference, name: str) -> None:
    """The same pictures at three strengths and at none, all in one batch."""
    items = scene_items(4) + clip_items(2)
    strengths = [{"vit_r": 0.1}, {"vit_r": 24}, {"keep_encoder": 0.4}]
    asked = [
        request_of(ours.processor, item, {f"illava_{key}": value for key, value in strength.items()})
        for item in items
        for strength in [*strengths, {"vit_r": 0}]
    ]
    found = ask_engine(engine, asked)
    assert largest_difference(found[3::4], ours.ask(items, None)) < CLOSE
    for number, strength in enumerate(strengths):
        said = {
            "vit_layers": SETTINGS[name]["vit_layers"],
            **{key.removesuffix("_encoder"): value for key, value in strength.items()},
        }
        assert largest_difference(found[number::4], ours.ask(items, said)) < CLOSE, strength


class TestMutations:
    """What these towers have beside Qwen2-VL's; a strength of its own each time, so that no cache answers."""

    def differs(self, engine: Any, ours: Reference, name: str, amount: float) -> bool:
        items = scene_items(4) + clip_items(3)  # of 4, 4 and 8 frames
        try:
            found = ask_engine(engine, requests(ours, items, {"illava_vit_r": amount}))
            return largest_difference(found, ours.ask(items, {**SETTINGS[name], "vit_r": amount})) > CLOSE
        except (AssertionError, PatchStateError):
            return True

    def test_none(self, engine: Any, ours: Reference, name: str) -> None:
        assert not self.differs(engine, ours, name, 0.291)

    def test_windows(self, engine: Any, ours: Reference, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of survivors that see beyond their window."""
        if name != "qwen2_5_vl":
            pytest.skip("has no windows")
        from illava_hooks.integrations.vllm import qwen2_5_vl
        from illava_hooks.integrations.vllm.blocks import TowerMerging

        monkeypatch.setattr(qwen2_5_vl.WindowedTower, "borders", TowerMerging.borders)
        assert self.differs(engine, ours, name, 0.292)

    def test_order(self, engine: Any, ours: Reference, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of places in the row that are taken for places in the picture."""
        if name != "qwen2_5_vl":
            pytest.skip("keeps pictures in order")
        from illava_hooks.integrations.vllm.blocks import TowerMerging

        monkeypatch.setattr(TowerMerging, "_seats", lambda self, run: run.final.origins[0])
        assert self.differs(engine, ours, name, 0.293)

    def test_seconds(self, engine: Any, ours: Reference, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        if name != "qwen2_5_vl" or not timed(ours.processor):
            pytest.skip("tells times in words, or is not told any")
        from illava_hooks.integrations.vllm import qwen2_5_vl

        monkeypatch.setattr(qwen2_5_vl, "in_seconds", lambda embeddings, *given: embeddings)
        assert self.differs(engine, ours, name, 0.294)

    def test_features_of_earlier_blocks(
        self, engine: Any, ours: Reference, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """That are picked from, instead of going through the merges."""
        if name != "qwen3_vl":
            pytest.skip("has no DeepStack")
        from illava_hooks.integrations.vllm import qwen3_vl

        monkeypatch.setattr(
            qwen3_vl,
            "apply_merge",
            lambda tokens, plan: tokens.gather(1, plan.keep_indices[..., None].expand(-1, -1, tokens.shape[2])),
        )
        assert self.differs(engine, ours, name, 0.295)

    def test_slices_apart(self, engine: Any, ours: Reference, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        if name != "qwen3_vl":
            pytest.skip("has slices together")
        from illava_hooks.integrations.vllm import qwen3_vl

        monkeypatch.setattr(qwen3_vl.StackedTower, "apart", False)
        assert self.differs(engine, ours, name, 0.296)


def test_runs_of_tokens_are_shortened() -> None:
    """Equally, and text between them stays; other runs than those that are expected are refused."""
    from vllm.multimodal.processing import PromptUpdateDetails

    from illava_hooks import MergeConfigError
    from illava_hooks.integrations.vllm.processing import shortened

    two = PromptUpdateDetails.select_token_id([1, 7, 7, 7, 2, 3, 7, 7, 7, 4], 7)
    assert list(shortened(two, 4, 2).full) == [1, 7, 7, 2, 3, 7, 7, 4]
    assert shortened([7, 7, 7], 2) == [7, 7]
    for count, spans in ((4, 1), (3, 2)):
        with pytest.raises(MergeConfigError, match="separators"):
            shortened(two, count, spans)


def test_an_attention_with_tables_of_its_own_is_refused() -> None:
    from illava_hooks import UnsupportedModelError
    from illava_hooks.engine.traits import EncoderTraits
    from illava_hooks.integrations.vllm.blocks import MergingBlock, TowerMerging

    tower = SimpleNamespace(attn_backend=SimpleNamespace(name="FLASHINFER"))
    with pytest.raises(UnsupportedModelError, match="FLASHINFER"):
        TowerMerging(tower, MergingBlock, EncoderTraits(4, granularity=4), False)


@pytest.mark.slow
def test_chunks_of_sixteen(name: str, folder: Callable[[str], Path], ours: Reference) -> None:
    """Pictures are cut at every place, and so are videos between their times; asked twice, with a prefix cache."""
    chunked = {"max_num_batched_tokens": 16, "max_num_seqs": 4, "enable_chunked_prefill": True}
    items = pair_items(COUNTS[1]) + clip_items(COUNTS[2]) + scene_items(COUNTS[0] // 4)
    with running(folder(name), hf_overrides=overrides(**SETTINGS[name]), **chunked) as engine:
        first, again = (ask_engine(engine, requests(ours, items)) for _ in range(2))
    expected = ours.ask(items, SETTINGS[name])
    assert largest_difference(first, expected) < CLOSE and largest_difference(again, expected) < CLOSE


@pytest.mark.slow
def test_off_is_bitwise_stock(name: str, tmp_path: Path, folder: Callable[[str], Path], ours: Reference) -> None:
    from drawn import drawn
    from vllm import ModelRegistry
    from vllm.model_executor.models import registry

    from illava_hooks.integrations.vllm.models import MODELS

    items, found = scene_items(4) + pair_items(2) + clip_items(2), {}
    (architecture,) = json.loads((folder(name) / "config.json").read_text())["architectures"]
    module, kind = registry._MULTIMODAL_MODELS[architecture]
    stock = f"vllm.model_executor.models.{module}:{kind}"
    for label, model in (("stock", stock), ("off", MODELS[architecture])):
        ModelRegistry.register_model(architecture, model)
        with running(drawn(name, tmp_path / label)) as engine:  # vLLM remembers a folder's class
            found[label] = ask_engine(engine, requests(ours, items))
    assert found["off"] == found["stock"]
    assert largest_difference(found["off"], ours.ask(items, None)) < CLOSE
