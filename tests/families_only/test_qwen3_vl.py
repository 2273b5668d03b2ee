"""What only Qwen3-VL has: DeepStack in both stages, slices of a video apart, one feature method inside of another.

The slow reference carries DeepStack features token by token (`tests/reference.py`); each test against it has a
mutation that makes it fail.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2VLImageProcessor, Qwen3VLVideoProcessor

import reference as ref
from helpers import PROMPTS, assert_says, feature_outputs, needs_ready_features
from illava_hooks import METHODS, UnsupportedModelError, patch, session_of
from illava_hooks.engine.encoder import EncoderRun
from illava_hooks.merge.plan import take_kept
from illava_hooks.patchers import qwen3_vl
from illava_hooks.tools.bench import SHAPES, Workload, build_shape, build_workload
from reference_checks import SAMPLES, TOLERANCE, assert_close, check_forward, library_method
from tiny_models import inputs_for, real_positions, tiny_model

NAME = "qwen3_vl"

RAGGED = {
    "images": PROMPTS["ragged"],
    "image and video": (SAMPLES["video, image"], SAMPLES["text"], SAMPLES["image"]),
}
ENCODER: dict[str, Any] = {"vit_layers": [1, 2], "vit_r": 0.25, "llm_layers": [], "llm_ratio": 1.0}
DECODER: dict[str, Any] = {"vit_layers": [], "vit_r": 0, "llm_ratio": 0.6}
RULES = ("recycle", "diverse", "drop")


# ----------------------------------------------------------------------------------------- the decoder


@pytest.mark.parametrize("layers", [[1], [2], [3], [1, 2, 3]], ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("batch", RAGGED)
def test_stacked_features_follow_the_merges_of_the_decoder(batch: str, rule: str, layers: list[int]) -> None:
    check_forward(NAME, RAGGED[batch], rule, DECODER | {"llm_layers": layers})


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("batch", RAGGED)
def test_stacked_features_follow_the_merges_of_both_stages(batch: str, rule: str, side: Any) -> None:
    check_forward(NAME, RAGGED[batch], rule, ENCODER | {"llm_layers": [1, 2], "llm_ratio": 0.6}, side=side)


def taken(tokens: Any, plan: Any) -> Any:
    """A survivor's own features, without those that were merged into it."""
    return take_kept(tokens, plan)


@pytest.mark.parametrize("layers", [[1], [2], [1, 2, 3]], ids=str)
@pytest.mark.parametrize("rule", ["recycle", "diverse"])
def test_taking_features_in_the_decoder_is_noticed(
    rule: str, layers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qwen3_vl, "apply_merge", taken)
    with pytest.raises(AssertionError, match="not close"):
        check_forward(NAME, RAGGED["images"], rule, DECODER | {"llm_layers": layers})


def test_features_of_a_neighbour_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shifted(qwen3_vl.StackedFeatures):
        def __init__(self, run: Any, layer_idx: int, features: Any, rows: Any) -> None:
            super().__init__(run, layer_idx, features, torch.where(rows > 0, rows - 1, rows))

    monkeypatch.setattr(qwen3_vl, "StackedFeatures", Shifted)
    with pytest.raises(AssertionError, match="not close"):
        check_forward(NAME, RAGGED["images"], "drop", DECODER | {"llm_layers": [3]})


def test_merging_behind_the_last_stacked_features_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are added behind layers 0, 1 and 2, and layer 3 merges."""
    monkeypatch.setattr(qwen3_vl, "apply_merge", taken)
    check_forward(NAME, RAGGED["images"], "recycle", DECODER | {"llm_layers": [3]})


@torch.no_grad()
def test_hidden_states_are_those_in_front_of_stacked_features() -> None:
    """As in stock: an entry is what its layer put out, and the next layer gets more than that."""
    model = tiny_model(NAME)
    patch(model, **DECODER | {"llm_layers": [2]})
    into: dict[int, Tensor] = {}
    out: dict[int, Tensor] = {}
    for index, layer in enumerate(model.model.language_model.layers):
        layer.register_forward_pre_hook(lambda _, args, i=index: into.__setitem__(i, args[0]))
        layer.register_forward_hook(lambda _, args, output, i=index: out.__setitem__(i, output))
    inputs = inputs_for(model, PROMPTS["images"])
    states = model(**inputs, output_hidden_states=True).hidden_states
    visual = (inputs["input_ids"] == model.config.image_token_id)[0]
    for index in range(2):
        torch.testing.assert_close(states[index + 1], out[index], atol=0, rtol=0)
    added = into[1] - out[0]
    assert (added[0, ~visual] == 0).all() and (added[0, visual].abs().amax(-1) > 0).all()
    assert out[2].shape[1] < states[3].shape[1] == inputs["input_ids"].shape[1]


# ----------------------------------------------------------------------------------------- the encoder


def check_features(kind: str, rule: str, **overrides: Any) -> None:
    """Every feature of every image and video, those of DeepStack too, against the reference."""
    model = tiny_model(NAME, dtype=torch.float64, **overrides)
    expected = []
    for sample in PROMPTS[kind]:
        settings = ref.ReferenceSettings(
            ENCODER["vit_layers"], ENCODER["vit_r"], method=ref.ReferenceMethod(rule, "received_attention")
        )
        expected += ref.vision_stage(model, inputs_for(model, [sample]), settings)
    patch(model, **ENCODER, method=library_method(rule))
    inputs = inputs_for(model, PROMPTS[kind])
    for modality, output in feature_outputs(model, inputs, return_dict=True).items():
        theirs = [visual for visual in expected if visual.kind == modality]
        assert len(theirs) == len(output.pooler_output) and theirs
        for index, visual in enumerate(theirs):
            assert not all(visual.kept)
            assert_close(output.pooler_output[index], visual.values, TOLERANCE, "features")
        for ours, *features in zip(output.deepstack_features, *(visual.added for visual in theirs), strict=True):
            whole = ours if isinstance(ours, torch.Tensor) else torch.cat(ours)  # old releases do not split them
            assert_close(whole, torch.cat(features), TOLERANCE, "DeepStack")


@pytest.mark.parametrize("rule", ("recycle", "cluster", "nearest", "diverse", "bipartite", "drop"))
@pytest.mark.parametrize("kind", ["images", "video", "image and video"])
def test_stacked_features_follow_the_merges_of_the_encoder(kind: str, rule: str) -> None:
    check_features(kind, rule)


@pytest.mark.parametrize("indexes", [[2, 0], [3], [1, 2, 3, 9]], ids=str)
def test_any_blocks_may_give_features(indexes: list[int]) -> None:
    """In any order, and some may not exist: stock never reaches those."""
    check_forward(
        NAME, RAGGED["images"], "recycle", ENCODER, vision={"deepstack_visual_indexes": indexes}, tolerance=2e-6
    )


@pytest.mark.parametrize("kind", ["images", "video"])
def test_taking_features_in_the_encoder_is_noticed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qwen3_vl, "apply_merge", taken)
    with pytest.raises(AssertionError, match="DeepStack"):
        check_features(kind, "recycle")


def test_merging_features_of_survivors_again_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that merges gives features of its survivors: off by one, and they would merge once more."""
    merges_before = EncoderRun.merges_before
    monkeypatch.setattr(EncoderRun, "merges_before", lambda run, layer: merges_before(run, max(0, layer - 1)))
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        check_features("images", "recycle")


# ------------------------------------------------------------------------------------------- features


@pytest.mark.parametrize("return_dict", [None, False, True])
def test_videos_merge_though_their_method_calls_the_one_of_images(return_dict: bool | None) -> None:
    model = tiny_model(NAME)
    inputs = inputs_for(model, [SAMPLES["video, image"]])
    whole = model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"], return_dict=True)
    session = patch(model, **ENCODER, track=True)
    given = {} if return_dict is None else {"return_dict": return_dict}
    found = model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"], **given)
    values = found[1] if return_dict is False else found.pooler_output
    assert [len(value) for value in values] == [len(value) for value in whole.pooler_output]
    assert len(values[0].unique(dim=0)) < len(whole.pooler_output[0])
    assert set(session.provenance.merges) == {("vision", 1), ("vision", 2)}


def test_records_land_on_their_modality() -> None:
    model = tiny_model(NAME)
    inputs = inputs_for(model, [SAMPLES["video, image"]])
    session = patch(model, **ENCODER)
    with torch.no_grad():
        model(**inputs)
    (image,), (video,) = session.report.images, session.report.videos
    assert image.prompt_tokens == int(inputs["image_grid_thw"].prod()) // 4
    assert video.prompt_tokens == int(inputs["video_grid_thw"].prod()) // 4
    assert image.kept_fraction < 1 and video.kept_fraction < 1


def test_videos_merge_where_the_configuration_asks_for_tuples() -> None:
    """Stock's inner method then returns a tuple whatever it is asked for, which its forward cannot read."""
    model, other = tiny_model(NAME).model, tiny_model(NAME).model
    inputs = inputs_for(model, PROMPTS["video"])
    model.config.return_dict = False
    with pytest.raises(AttributeError, match="'tuple' object"):
        model(**inputs, return_dict=True)
    patch(model, **ENCODER)
    patch(other, **ENCODER)
    with torch.no_grad():
        ours, expected = (m(**inputs, return_dict=True).last_hidden_state for m in (model, other))
    torch.testing.assert_close(ours, expected, atol=0, rtol=0)
    assert session_of(model).report.kept_fraction < 1


# ------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", [name for name in METHODS if name != "illava-reference"])
def test_a_batch_is_its_samples_to_the_last_digits(method: str, side: Any) -> None:
    """In float64, images and videos, every method."""
    model = tiny_model(NAME, dtype=torch.float64)
    patch(model, **ENCODER | {"llm_layers": [1, 2, 3], "llm_ratio": 0.7}, method=method)
    samples = [*RAGGED["image and video"], *RAGGED["images"]]
    inputs = inputs_for(model, samples, side)
    with torch.no_grad():
        logits = model(**inputs).logits
        for row, sample in enumerate(samples):
            alone = model(**inputs_for(model, [sample])).logits[0]
            assert_close(logits[row, real_positions(inputs, row)], alone, 1e-9)


@pytest.mark.parametrize("more", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("method", ["illava", "diverse", "fastv"])
def test_a_batch_generates_what_its_samples_do(method: str, more: dict[str, Any]) -> None:
    model = tiny_model(NAME, dtype=torch.float64)
    patch(model, **ENCODER | {"llm_layers": [1, 2], "llm_ratio": 0.6}, method=method)
    samples = RAGGED["image and video"]
    given = {"max_new_tokens": 5, "return_dict_in_generate": True, "output_logits": True, **more}
    whole = model.generate(**inputs_for(model, samples), **given)
    for row, sample in enumerate(samples):
        alone = model.generate(**inputs_for(model, [sample]), **given)
        assert whole.sequences[row, -5:].tolist() == alone.sequences[0, -5:].tolist()
        beams = more.get("num_beams", 1)
        assert_close(whole.logits[0][row * beams], alone.logits[0][0], 1e-9)


# ---------------------------------------------------------------------------------------------- others


def test_prompts_without_token_types_are_refused_by_stock() -> None:
    """Merging or not: positions cannot be counted."""
    model = tiny_model(NAME)
    inputs = inputs_for(model, PROMPTS["image"])
    del inputs["mm_token_type_ids"]
    for _ in range(2):
        with pytest.raises(ValueError, match="mm_token_type_ids"):
            model(**inputs)
        patch(model, **ENCODER)


def test_foreign_blocks() -> None:
    model = tiny_model(NAME)
    model.model.visual.blocks = nn.ModuleList([nn.Linear(32, 32) for _ in range(4)])
    with pytest.raises(UnsupportedModelError) as caught:
        patch(model, [1], 4, [1], 0.5)
    assert_says(caught.value, "^visual has Linear blocks", "use a stock Qwen3-VL model")
    assert session_of(model) is None


def test_pictures_are_what_the_stock_processors_made() -> None:
    """Patches at their places, with their numbers, of an image and of the first frame of each slice of a video."""
    size = {"shortest_edge": 32 * 32, "longest_edge": 4 * 96 * 64}
    shown = torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(1))
    clip = torch.rand(4, 3, 32, 64, generator=torch.Generator().manual_seed(2))
    plain = {"do_rescale": False, "do_resize": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": size}
    images = Qwen2VLImageProcessor(patch_size=16, **plain)(shown, return_tensors="pt")
    videos = Qwen3VLVideoProcessor(**plain)([clip], do_sample_frames=False, return_tensors="pt")
    model = tiny_model(NAME, vision={"patch_size": 16})
    first, second = qwen3_vl.FAMILY.pictures(model, {**images, **videos})
    (((picture,),),) = (first.frames,)
    torch.testing.assert_close(picture[:3].float(), shown * 2 - 1)
    assert picture[3, ::16, ::16].int().tolist()[:2] == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]]
    assert [len(frame) for frame in second.frames] == [1, 1]
    for (frame,), original in zip(second.frames, clip[::2], strict=True):
        torch.testing.assert_close(frame[:3].float(), original * 2 - 1)


@needs_ready_features
def test_time_is_a_text_between_slices() -> None:
    """The workload of a benchmark has every slice in brackets of its own behind its time, as the processor does."""
    model = tiny_model(NAME, text={"vocab_size": 1024})
    inputs = build_workload(model, Workload(frames=4, patches=16, text=4))
    ids = inputs["input_ids"][0].tolist()
    token = model.config.video_token_id
    assert ids.count(token) == 2 * 4
    # Six words, "<", "0", ".", "3", " seconds", ">", then placeholders in brackets.
    assert [each == token for each in ids] == [False] * 2 + 2 * ([False] * 7 + [True] * 4 + [False]) + [False] * 2
    with torch.no_grad():
        model(**inputs)


@pytest.mark.parametrize("name", [name for name in SHAPES if name.startswith("qwen3-vl")])
def test_published_shapes_have_their_tower(name: str) -> None:
    vision = build_shape(name, device="meta").config.vision_config
    large = name in ("qwen3-vl-8b", "qwen3-vl-30b-a3b")
    assert vision.deepstack_visual_indexes == ([8, 16, 24] if large else [5, 11, 17])
    assert (vision.depth, vision.hidden_size) == ((27, 1152) if large else (24, 1024))
