"""GLM-4V: the tower again, group by group; videos, whose placeholders are those of images; its mixture of experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import Glm4vMoeForConditionalGeneration

from families import family
from families.glm4v import EXPERTS
from families.qwen2_vl import patches_of
from helpers import assert_says
from illava_hooks import Method, PatchStateError, UnsupportedModelError, merging, patch, unpatch
from illava_hooks.engine.encoder import EncoderRun
from illava_hooks.engine.records import records_of
from illava_hooks.patchers.glm4v import Glm4V
from kind_helpers import assert_balancing_loss_is_stocks
from tiny_models import IMAGE_ID, Sample, build, inputs_for, padded, tiny_model
from unit_oracle import merged

SETTINGS: dict[str, Any] = {"vit_layers": [1, 2], "vit_r": 0.3, "llm_layers": [1, 3], "llm_ratio": 0.6}
GRIDS = [[1, 6, 8], [1, 4, 4]]
UNIT = 4


def pixels_of(grids: list[list[int]]) -> Tensor:
    return torch.cat([patches_of(Sample(3), "i", index, grid) for index, grid in enumerate(grids)]).double()


def rotated(table: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = table.chunk(2, -1)
    return table * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


@torch.no_grad()
def tower_again(model: Any, pixels: Tensor, grids: list[list[int]], rule: str) -> list[dict[int, Tensor]]:
    """Features of the surviving groups of every slice, each slice by itself."""
    visual = model.model.visual
    seen: dict[str, Any] = {}

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(kwargs, hidden=args[0])

    handle = visual.blocks[0].register_forward_pre_hook(note, with_kwargs=True)
    visual(pixels, grid_thw=torch.tensor([[1, *sides] for time, *sides in grids for _ in range(time)]))
    handle.remove()
    cos, sin = seen["position_embeddings"]
    found, first = [], 0
    for length in [height * width for time, height, width in grids for _ in range(time)]:
        rows = seen["hidden"][first : first + length]
        places = {n: torch.arange(first + n * UNIT, first + (n + 1) * UNIT) for n in range(length // UNIT)}
        units = dict(enumerate(rows.split(UNIT)))
        first += length
        for index, block in enumerate(visual.blocks):
            rows, at = torch.cat(list(units.values())), torch.cat([places[unit] for unit in units])
            attention = block.attn
            q, k, v = attention.qkv(block.norm1(rows)).view(len(rows), 3, attention.num_heads, -1).unbind(1)
            q, k = rotated(q, cos[at], sin[at]), rotated(k, cos[at], sin[at])
            weights = (torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5).softmax(-1)
            rows = rows + attention.proj(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
            units = dict(zip(units, rows.split(UNIT), strict=True))
            if index in SETTINGS["vit_layers"]:
                received = weights.mean((0, 1)).split(UNIT)
                scores = {unit: float(part.mean()) for unit, part in zip(units, received, strict=True)}
                removed = int(len(rows) * SETTINGS["vit_r"]) // UNIT
                units = merged(rule, units, scores, removed)
            rows = torch.cat(list(units.values()))
            rows = rows + block.mlp(block.norm2(rows))
            units = dict(zip(units, rows.split(UNIT), strict=True))
        groups = torch.stack([visual.post_layernorm(rows).view(2, 2, -1).permute(2, 0, 1) for rows in units.values()])
        joined = visual.merger(visual.downsample(groups).flatten(1))
        found.append(dict(zip(units, joined, strict=True)))
    return found


def check_oracle(rule: str, modality: str = "image") -> None:
    model = tiny_model("glm4v", dtype=torch.float64)
    grids = GRIDS if modality == "image" else [[2, 4, 6], [1, 4, 4]]
    pixels = pixels_of(grids)
    expected = tower_again(model, pixels, grids, rule)
    patch(model, **SETTINGS, method=Method("mine", encoder_score="received_attention", merge=rule))
    method = getattr(model.model, f"get_{modality}_features")
    with torch.no_grad():
        output = method(pixels, torch.tensor(grids))
    slices = iter(expected)
    for features, record, (time, height, width) in zip(
        output.pooler_output, records_of(output) or [], grids, strict=True
    ):
        assert record.keep is not None and record.survivor_of is not None
        size = height * width // UNIT
        for slice_idx in range(time):
            alone, start = next(slices), slice_idx * size
            kept = record.keep[start : start + size].nonzero().flatten().tolist()
            assert kept == sorted(alone) and len(kept) < size
            for unit, survivor in enumerate((record.survivor_of[start : start + size] - start).tolist()):
                torch.testing.assert_close(features[start + unit], alone[survivor], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("modality", ["image", "video"])
@pytest.mark.parametrize("rule", ["drop", "recycle"])
def test_the_tower_is_that_of_the_surviving_groups(rule: str, modality: str) -> None:
    check_oracle(rule, modality)


@pytest.mark.parametrize("modality", ["image", "video"])
def test_the_oracle_sees_survivors_that_rotate_elsewhere(modality: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = Glm4V.shrink

    def shrink(self: Glm4V, kwargs: dict[str, Any], run: EncoderRun, merges: int) -> dict[str, Any]:
        found = stock(self, kwargs, run, merges)
        length = len(found["position_embeddings"][0])
        return {**found, "position_embeddings": tuple(table[:length] for table in kwargs["position_embeddings"])}

    monkeypatch.setattr(Glm4V, "shrink", shrink)
    with pytest.raises(AssertionError):
        check_oracle("drop", modality)


def test_hidden_states_have_their_lengths() -> None:
    """Those of patches by patch; the last, which stock joins, by group: in stock and with merging."""
    model, grid = tiny_model("glm4v", dtype=torch.float64), torch.tensor(GRIDS)
    pixels = pixels_of(GRIDS)
    with torch.no_grad():
        stock = model.get_image_features(pixels, grid, output_hidden_states=True)
    patch(model, **SETTINGS)
    with torch.no_grad():
        found = model.get_image_features(pixels, grid, output_hidden_states=True)
    assert found.last_hidden_state.shape == stock.last_hidden_state.shape
    assert [h.shape for h in found.hidden_states] == [h.shape for h in stock.hidden_states]
    for ours, theirs in zip(found.hidden_states[:2], stock.hidden_states[:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert not torch.allclose(found.hidden_states[-1], stock.hidden_states[-1])


# ---------------------------------------------------------------------- videos


def video_inputs(slices: list[int], model: Any) -> dict[str, Tensor]:
    """Rows with one video each: brackets and a time for every slice, as stock's processor writes them."""
    rows = [
        [10, *(token for time in range(n) for token in (3, *[IMAGE_ID] * 6, 4, 20 + time)), 11, 12] for n in slices
    ]
    inputs = padded(rows, "left")
    grids = [[n, 4, 6] for n in slices]
    patches = [patches_of(Sample(n), "v", 0, grid) for n, grid in zip(slices, grids, strict=True)]
    types = (inputs["input_ids"] == IMAGE_ID).int() * 2
    pixels = torch.cat(patches).to(model.dtype)
    grid = torch.tensor(grids)
    return {**inputs, "mm_token_type_ids": types, "pixel_values_videos": pixels, "video_grid_thw": grid}


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(**inputs).logits
    return found


@pytest.mark.parametrize("method", ["illava", "diverse", "fastv"])
def test_a_batch_of_videos_is_its_samples(method: str) -> None:
    model = tiny_model("glm4v", dtype=torch.float64)
    stock = logits(model, video_inputs([3, 1, 2], model))
    session = patch(model, **SETTINGS, method=method)
    together = logits(model, video_inputs([3, 1, 2], model))
    assert [visual.modality for visual in session.report.visuals] == ["video"] * 3
    assert not torch.allclose(stock, together)
    for row, slices in enumerate([3, 1, 2]):
        alone = logits(model, video_inputs([slices], model))
        torch.testing.assert_close(together[row, -alone.shape[1] :], alone[0], rtol=1e-4, atol=1e-5)
    inputs = video_inputs([3, 1], model)
    for options in ({}, {"do_sample": True}, {"cache_implementation": "static"}):  # with beams stock loses its videos
        assert model.generate(**inputs, max_new_tokens=4, **options).shape[1] == inputs["input_ids"].shape[1] + 4


def test_videos_that_lose_nothing_are_stock() -> None:
    model = tiny_model("glm4v")
    inputs = video_inputs([3, 1], model)
    expected = logits(model, inputs)
    patch(model, vit_layers=[1, 2], vit_r=0.01, llm_layers=[1], llm_ratio=1.0)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits(model, inputs)[real], expected[real], rtol=1e-6, atol=1e-6)
    patch(model, **SETTINGS)
    with merging(model, False):
        assert torch.equal(logits(model, inputs), expected)
    unpatch(model)
    assert torch.equal(logits(model, inputs), expected)


# ---------------------------------------------------------------------- experts, and the report


def mixture(back_end: str = "sdpa") -> Any:
    config = family("glm4v").config(text=EXPERTS, model_class=Glm4vMoeForConditionalGeneration)
    return build(Glm4vMoeForConditionalGeneration, config, back_end, 0, torch.float32)


def test_the_mixture_of_experts_merges_and_is_stock_when_idle() -> None:
    model = mixture()
    inputs = inputs_for(model, [Sample(1, images=((24, 32),)), Sample(2, images=((16, 16), (24, 24)))])
    expected = logits(model, inputs)
    patch(model, vit_layers=[1], vit_r=0.01, llm_layers=[1], llm_ratio=1.0)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits(model, inputs)[real], expected[real], rtol=1e-5, atol=1e-5)
    session = patch(model, **SETTINGS)
    with merging(model, False):
        assert torch.equal(logits(model, inputs), expected)
    assert not torch.allclose(logits(model, inputs), expected)
    assert session.report.kept_fraction < 0.5
    unpatch(model)
    assert torch.equal(logits(model, inputs), expected)


@pytest.mark.parametrize("layers", [{"vit_layers": [1]}, {"llm_layers": [1]}], ids=str)
def test_a_balancing_loss_is_refused_in_a_call_that_merges(layers: dict[str, Any]) -> None:
    model = mixture()
    inputs = inputs_for(model, [Sample(1, images=((24, 32),))])
    asked = {**inputs, "output_router_logits": True, "labels": inputs["input_ids"]}
    stock = model(**asked)
    patch(model, **{"vit_layers": [], "llm_layers": [], "vit_r": 0.5, "llm_ratio": 0.5, **layers})
    with pytest.raises(PatchStateError) as caught:
        model(**asked)
    assert_says(caught.value, "^output_router_logits is True", r"use output_router_logits=False, or merging\(")
    with merging(model, False):
        assert torch.equal(stock.aux_loss, model(**asked).aux_loss)


@torch.no_grad()
def test_a_balancing_loss_is_stocks_where_nothing_is_removed() -> None:
    """Routers see what they see in stock, though every layer that could merge is in place."""
    assert_balancing_loss_is_stocks(mixture(), Sample(1, images=((24, 32),)), SETTINGS)


def test_a_balancing_loss_by_default_is_refused_by_patch() -> None:
    model = mixture()
    model.config.text_config.output_router_logits = True
    with pytest.raises(UnsupportedModelError) as caught:
        patch(model, **SETTINGS)
    assert_says(caught.value, "^text_config.output_router_logits is True", "set output_router_logits=False")
    patch(model, [], 0, [], 1.0)


@pytest.mark.parametrize("experts", [False, True])
def test_the_report_counts_what_runs(experts: bool) -> None:
    model = mixture("eager") if experts else tiny_model("glm4v", attn_implementation="eager")
    if experts:
        model.set_experts_implementation("eager")  # torch's counter does not know grouped products
    inputs = inputs_for(model, [Sample(1, images=((48, 48),))])
    method = Method("mine", encoder_score="uniform", llm_score="uniform", merge="drop")
    session = patch(model, **SETTINGS, method=method)
    for index, enabled in enumerate((True, False)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter, merging(model, enabled):
            model(**inputs)
        counts = {name: sum(kinds.values()) for name, kinds in counter.get_flop_counts().items()}
        encoder = sum(n for name, n in counts.items() if ".visual.blocks." in name and name.count(".") == 4)
        joined = next(n for name, n in counts.items() if name.endswith("visual.merger"))
        joined += next(n for name, n in counts.items() if name.endswith("visual.downsample"))
        assert session.report.encoder_flops[index] == pytest.approx(encoder, rel=0.01)
        assert session.report.projector_flops[index] == pytest.approx(joined, rel=0.01)
        decoder = sum(n for name, n in counts.items() if ".language_model.layers." in name and name.count(".") == 4)
        # Eager attention computes the whole square, of which the report counts the half that is not masked.
        text = model.config.text_config
        tokens = [layer[0] for layer in session.report.sequence_tokens]
        tokens = tokens if enabled else [session.report.prompt_tokens[0]] * len(tokens)
        masked = sum(2 * n * n * text.hidden_size for n in tokens)
        assert session.report.llm_flops[index] == pytest.approx(decoder - masked, rel=0.01)
