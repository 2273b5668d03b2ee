"""Qwen2-VL in vLLM says what a patched model of transformers says: the encoder stage, in float32."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from asking import Answer, Reference, ask_engine, largest_difference, request_of
from checkpoints import padded
from engines import FORM, counted, model_of, running

from illava_hooks import PatchStateError, tiny
from illava_hooks.integrations.vllm import overrides
from illava_hooks.tools.datasets import clip_items, pair_items, scene_items
from illava_hooks.tools.items import Item

pytestmark = pytest.mark.filterwarnings("default")  # vLLM's own

NAME = "qwen2_vl"
SETTINGS: dict[str, Any] = {"vit_layers": [3, 4], "vit_r": 0.29}
CLOSE = 1e-4
COUNTS = counted(100), counted(40), counted(40)


def questions() -> dict[str, list[Item]]:
    """Held-out questions by kind."""
    scenes, pairs, clips = COUNTS
    return {"scenes": scene_items(scenes), "pairs": pair_items(pairs), "clips": clip_items(clips)}


@pytest.fixture(scope="module")
def ours(reference: Callable[[str], Reference]) -> Reference:
    return reference(NAME)


@pytest.fixture(scope="module")
def cut_short(ours: Reference, tmp_path_factory: pytest.TempPathFactory) -> list[Answer]:
    """What stock says where nothing stands behind the picture."""
    with running(padded(NAME, tmp_path_factory.mktemp("stock"))) as stock:
        return ask_engine(stock, without_text_behind(requests(ours, scene_items(4))))


def without_text_behind(asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**request, "prompt": request["prompt"].split("<|vision_end|>")[0]} for request in asked]


@pytest.fixture(scope="module")
def engine(folder: Callable[[str], Path], cut_short: list[Answer]) -> Iterator[Any]:
    """Made behind the other one, whose end takes what all engines of a process share."""
    with running(folder(NAME), hf_overrides=overrides(**SETTINGS)) as made:
        yield made


def requests(ours: Reference, items: list[Item], arguments: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    return [request_of(ours.processor, item, arguments) for item in items]


class TestMerging:
    """One engine for all of them."""

    @pytest.mark.parametrize("kind", ["scenes", "pairs", "clips"])
    def test_answers_are_those_of_patch(self, engine: Any, ours: Reference, kind: str) -> None:
        items = questions()[kind]
        found, expected = ask_engine(engine, requests(ours, items)), ours.ask(items, SETTINGS)
        assert largest_difference(found, expected) < CLOSE
        plain = ours.ask(items[:4], None)
        assert all(mine.prompt < whole.prompt for mine, whole in zip(found, plain, strict=False))

    def test_a_prefix_is_found_again(self, engine: Any, ours: Reference) -> None:
        """Also behind the picture: the same prompt twice, in two calls."""
        items = pair_items(COUNTS[1])
        first = ask_engine(engine, requests(ours, items))
        before = hits(engine)
        again = ask_engine(engine, requests(ours, items))
        assert hits(engine) > before
        expected = ours.ask(items, SETTINGS)
        assert largest_difference(first, expected) < CLOSE and largest_difference(again, expected) < CLOSE

    def test_strengths_are_interleaved(self, engine: Any, ours: Reference) -> None:
        """The same pictures at three strengths, all in one batch."""
        items = scene_items(COUNTS[0] // 3)
        strengths = [{"vit_r": 0.1}, {"vit_r": 24}, {"keep_encoder": 0.4}]
        asked = [
            request_of(ours.processor, item, {f"illava_{name}": value for name, value in strength.items()})
            for item in items
            for strength in strengths
        ]
        found = ask_engine(engine, asked)
        for number, strength in enumerate(strengths):
            said = {"vit_layers": [3, 4], **{name.removesuffix("_encoder"): v for name, v in strength.items()}}
            assert largest_difference(found[number::3], ours.ask(items, said)) < CLOSE, strength

    def test_nothing_merged_is_the_unpatched_answer(self, engine: Any, ours: Reference) -> None:
        items = scene_items(4) + pair_items(2)
        found = ask_engine(engine, requests(ours, items, {"illava_vit_r": 0}))
        assert largest_difference(found, ours.ask(items, None)) < CLOSE

    def test_a_prompt_that_ends_with_a_picture(self, engine: Any, ours: Reference, cut_short: list[Answer]) -> None:
        """Where its answer stands follows from shapes; transformers counts otherwise there, so vLLM is asked."""
        found = ask_engine(engine, without_text_behind(requests(ours, scene_items(4), {"illava_vit_r": 0})))
        assert largest_difference(found, cut_short) < CLOSE

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"illava_vit_r": 1.5}, "vit_r is 1.5"),
            ({"illava_vit_r": 0.3, "illava_keep_encoder": 0.3}, "give one of them"),
            ({"illava_llm_ratio": 0.3}, "illava_llm_ratio is 0.3"),
        ],
    )
    def test_a_request_is_refused(self, engine: Any, ours: Reference, arguments: dict[str, Any], words: str) -> None:
        with pytest.raises(ValueError, match=words):
            ask_engine(engine, requests(ours, scene_items(1), arguments))

    def test_two_pictures_need_a_token_between_them(self, engine: Any, ours: Reference) -> None:
        (request,) = requests(ours, pair_items(1))
        first, *_, last = request["prompt"].split("<|image_pad|>")
        request["prompt"] = f"{first}<|image_pad|><|image_pad|>{last}"
        with pytest.raises(ValueError, match="without a token between them"):
            ask_engine(engine, [request])


def hits(engine: Any) -> int:
    """Tokens of prompts that the prefix cache had."""
    return int(sum(m.value for m in engine.get_metrics() if m.name == "vllm:prefix_cache_hits"))


class TestMutations:
    """Each seam is seen: where it breaks, answers or their chances are others.

    A strength of its own each time, so that no cache answers.
    """

    def differs(self, engine: Any, ours: Reference, amount: float) -> bool:
        items = scene_items(4) + pair_items(2)
        said = {**SETTINGS, "vit_r": amount}
        try:
            found = ask_engine(engine, requests(ours, items, {"illava_vit_r": amount}))
            return largest_difference(found, ours.ask(items, said)) > CLOSE
        except (AssertionError, PatchStateError):
            return True

    def test_none(self, engine: Any, ours: Reference) -> None:
        assert not self.differs(engine, ours, 0.291)

    def test_positions(self, engine: Any, ours: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
        from illava_hooks.integrations.vllm import blocks

        right = blocks.grid_table
        monkeypatch.setattr(blocks, "grid_table", lambda *given: right(*given)[:, [0, 2, 1, 3]])
        assert self.differs(engine, ours, 0.292)

    def test_extents(self, engine: Any, ours: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
        from illava_hooks.integrations.vllm import packed_model

        right = packed_model.Item
        monkeypatch.setattr(packed_model, "Item", lambda offset, length, extent: right(offset, length, extent + 1))
        assert self.differs(engine, ours, 0.293)

    def test_hash(self, engine: Any, ours: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of an item that no longer says its strength: another strength finds what the first one left."""
        from vllm.multimodal.processing.inputs import ProcessorInputs

        right = ProcessorInputs.get_mm_hashes

        def blind(self: Any, *given: Any) -> Any:
            self.hf_processor_mm_kwargs, kept = {}, self.hf_processor_mm_kwargs
            try:
                return right(self, *given)
            finally:
                self.hf_processor_mm_kwargs = kept

        monkeypatch.setattr(ProcessorInputs, "get_mm_hashes", blind)
        self.differs(engine, ours, 0.295)
        assert self.differs(engine, ours, 0.15)

    def test_settings_are_in_hashes(self, engine: Any, ours: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of the server, beside the strength of a request: other servers may share what is cached."""
        from vllm.multimodal.processing.inputs import ProcessorInputs

        from illava_hooks.integrations.vllm.settings import settings_of

        seen, right = set[str](), ProcessorInputs.get_mm_hashes

        def told(self: Any, model: str, *given: Any) -> Any:
            seen.add(model)
            return right(self, model, *given)

        monkeypatch.setattr(ProcessorInputs, "get_mm_hashes", told)
        ask_engine(engine, requests(ours, scene_items(1)))
        served = settings_of(engine.llm_engine.model_config.hf_config)
        assert served is not None and {name.split("#")[1] for name in seen} == {f"illava-{served.digest}"}

    def test_attention(self, engine: Any, ours: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of queries that are keys."""
        from illava_hooks.engine.attention_tap import EncoderTap

        right = EncoderTap.hear
        monkeypatch.setattr(EncoderTap, "hear", lambda self, query, key, scale: right(self, key, key, scale))
        assert self.differs(engine, ours, 0.296)

    def test_counts(self, engine: Any, ours: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
        """The last one: the engine stops there."""
        from illava_hooks.integrations.vllm.counts import KeptCounts

        right = KeptCounts.__call__
        monkeypatch.setattr(KeptCounts, "__call__", lambda self, *given: right(self, *given) - 1)
        assert self.differs(engine, ours, 0.294)


@pytest.mark.slow
def test_chunks_of_sixteen(folder: Callable[[str], Path], ours: Reference) -> None:
    """Pictures are cut at every place."""
    chunked = {"max_num_batched_tokens": 16, "max_num_seqs": 4, "enable_chunked_prefill": True}
    items = pair_items(COUNTS[1]) + clip_items(COUNTS[2]) + scene_items(COUNTS[0])
    with running(folder(NAME), hf_overrides=overrides(**SETTINGS), **chunked) as engine:
        found = ask_engine(engine, requests(ours, items))
    assert largest_difference(found, ours.ask(items, SETTINGS)) < CLOSE


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    ["nearest", {"encoder_score": "uniform", "merge": "diverse"}, {"encoder_score": "uniform", "merge": "selective"}],
    ids=["by keys", "without a score", "averages what is alike"],
)
def test_other_methods(folder: Callable[[str], Path], ours: Reference, method: Any) -> None:
    from illava_hooks import Method

    how = method if isinstance(method, str) else Method("own", **method)
    items = scene_items(COUNTS[0] // 2) + pair_items(4)
    with running(folder(NAME), hf_overrides=overrides([3, 4], keep_encoder=0.5, method=how)) as engine:
        found = ask_engine(engine, requests(ours, items))
    expected = ours.ask(items, {"vit_layers": [3, 4], "keep": 0.5, "method": how})
    assert largest_difference(found, expected) < CLOSE


@pytest.mark.slow
class TestOff:
    """Without settings."""

    def test_it_is_bitwise_stock(self, tmp_path: Path, ours: Reference) -> None:
        from vllm import ModelRegistry
        from vllm.model_executor.models.qwen2_vl import Qwen2VLForConditionalGeneration

        from illava_hooks.integrations.vllm.models import MODELS

        items = scene_items(8) + pair_items(4) + clip_items(4)
        found: dict[str, list[Answer]] = {}
        name = "Qwen2VLForConditionalGeneration"
        for kind, model in (("stock", Qwen2VLForConditionalGeneration), ("off", MODELS[name])):
            ModelRegistry.register_model(name, model)
            with running(padded(NAME, tmp_path / kind)) as engine:  # vLLM remembers a folder's class
                served = type(model_of(engine))
                assert (served is Qwen2VLForConditionalGeneration) == (kind == "stock")
                found[kind] = ask_engine(engine, requests(ours, items))
                if kind == "off":
                    with pytest.raises(ValueError, match="started without illava"):
                        ask_engine(engine, requests(ours, items[:1], {"illava_vit_r": 0.5}))
        assert found["off"] == found["stock"]
        assert largest_difference(found["off"], ours.ask(items, None)) < CLOSE


class TestRefusals:
    """Before a worker starts, in one line."""

    @pytest.mark.parametrize(
        ("given", "options", "words"),
        [
            ({"vit_layers": [3], "vit_r": 0.5}, {"pipeline_parallel_size": 2}, "pipeline_parallel_size is 2"),
            ({"llm_layers": [2]}, {}, "llm_layers is"),
            ({"vit_layers": [9], "vit_r": 0.5}, {}, "vit_layers"),
            ({"method": "diverse"}, {}, "not proportional"),
            ({"method": "illava-reference"}, {}, "as published code does"),
            ({"vit_r": 0.5, "keep_encoder": 0.5}, {}, "give one of them"),
            ({"vit_rr": 0.5}, {}, "unknown key 'vit_rr'"),
            ("no-such-file.json", {}, "cannot be read"),
            ({}, {"enable_mm_embeds": True}, "enable_mm_embeds is True"),
            ({}, {"enable_lora": True, "enable_tower_connector_lora": True}, "LoRA on the vision encoder"),
        ],
    )
    def test_settings(self, folder: Callable[[str], Path], given: Any, options: dict[str, Any], words: str) -> None:
        from vllm.engine.arg_utils import EngineArgs

        from illava_hooks import UnsupportedModelError

        arguments = EngineArgs(model=str(folder(NAME)), hf_overrides={"illava": given}, max_model_len=1024, **options)
        with pytest.raises(UnsupportedModelError, match=words) as refused:
            arguments.create_engine_config()
        assert "\n" not in str(refused.value)

    def test_a_class_in_which_nothing_merges(self, folder: Callable[[str], Path]) -> None:
        from vllm.engine.arg_utils import EngineArgs

        from illava_hooks import UnsupportedModelError

        try:
            import vllm.model_executor.models.llava_onevision  # noqa: F401
        except ImportError as error:
            pytest.skip(f"this vLLM cannot load its own class beside this transformers, merged or not: {error}")
        arguments = EngineArgs(model=str(folder("llava_onevision")), hf_overrides={"illava": {}}, max_model_len=1024)
        with pytest.raises(UnsupportedModelError, match="LlavaOnevisionForConditionalGeneration"):
            arguments.create_engine_config()


@pytest.mark.slow
def test_the_example(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At night as vLLM compiles it."""
    import vllm_offline

    asked = ["--model", str(folder(NAME)), "--question", "how many triangles are there ?", "--max-new-tokens", "4"]
    asked += ["--max-model-len", "1024", *([] if FORM == "all" else ["--enforce-eager"])]
    monkeypatch.setattr("sys.argv", ["vllm_offline.py", *asked, str(tiny.media("scene.png"))])
    vllm_offline.main()
    said = re.search(r"scene.png: (\d+) tokens, merged (\d+)", capsys.readouterr().out)
    assert said is not None and int(said[1]) > int(said[2])


def test_items_of_warm_up_stand_apart() -> None:
    """Of an image and a video that touch the processor refuses to tell positions."""
    from illava_hooks.integrations.vllm.qwen2_vl import Dummies

    tokens = SimpleNamespace(image_token="<i>", video_token="<v>")
    for merging, text in ((object(), "<i>.<i>.<v>"), (None, "<i><i><v>")):
        made = Dummies(SimpleNamespace(merging=merging, get_hf_processor=lambda: tokens))
        assert made.get_dummy_text({"image": 2, "video": 1}) == text
