"""What only Qwen2.5-VL has: blocks that attend within windows, in a row that is permuted for them.

The oracle runs all images or videos of a call through the blocks at once, with dense masks that are made anew in each
block from every survivor's own coordinates: same slice in blocks with full attention, same window in the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.vision_utils import get_vision_window_index

from families import _qwen2_5_vl_reference as slow
from families._qwen2_vl_reference import _patch_places as patch_places
from families.qwen2_5_vl import MERGE, PATCH, WINDOW_GROUPS, row_of_windows
from helpers import assert_differ, assert_says, feature_outputs
from illava_hooks import InputError, Method, UnsupportedModelError, patch, session_of
from illava_hooks.engine import encoder, trace
from illava_hooks.engine.provenance import merge_matrix
from illava_hooks.engine.records import records_of
from illava_hooks.merge.plan import MergePlan
from illava_hooks.patchers import _packed, qwen2_5_vl
from illava_hooks.patchers._packed import PackedFamily
from illava_hooks.patchers.qwen2_5_vl import Qwen25VL
from test_backends import FlashKernel
from test_report import _counted, attention_flops
from tiny_models import Inputs, Sample, inputs_for, real_positions, tiny_model

NAME = "qwen2_5_vl"
#: Windows in front of, between and behind the merges.
TOWER: dict[str, Any] = {"depth": 7, "fullatt_block_indexes": [1, 4]}
MERGING: dict[str, Any] = {"vit_layers": [1, 4], "vit_r": 0.3, "llm_layers": [2], "llm_ratio": 0.6}
LITTLE_LEFT = MERGING | {"vit_r": 0.7}
SAMPLES = {
    "window and a bit": [Sample(1, images=((56, 32),))],  # 7 x 4 groups in windows of 3 x 3
    "narrow": [Sample(2, images=((8, 104),))],
    "less than a window": [Sample(3, images=((16, 16),))],
    "two images": [Sample(4, images=((48, 30), (64, 88)))],
    "video": [Sample(5, videos=(5,), video_size=(40, 56))],
    "batch": [Sample(6, images=((56, 72),)), Sample(7, images=((32, 90),), videos=(4,), order="vi")],
}
METHODS: dict[str, Any] = {
    "illava": "illava",
    "diverse": "diverse",
    "drop": Method("drop both", merge="drop"),
}
CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}


def deep_model(**kwargs: Any) -> Any:
    return tiny_model(NAME, dtype=torch.float64, vision=TOWER, **kwargs)


# ------------------------------------------------------------------------- the tower by coordinates


class Plans:
    """Remembers the plans of all merges of the encoder."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[MergePlan] = []
        inner = encoder.build_plan

        def build_plan(*args: Any, **kwargs: Any) -> MergePlan:
            self.made.append(inner(*args, **kwargs))
            return self.made[-1]

        monkeypatch.setattr(encoder, "build_plan", build_plan)


@dataclass
class Row:
    """What is left of a call's patches.

    Attributes:
        group: Number of each surviving group, counted through all pictures of the call.
        frame: Slice of each surviving patch, counted through the call.
        place: Its row and column, ``(N, 2)``.
        size: Groups that each surviving group stands for.
        shown: For each group of the call the survivor that stands for it, by its group's number.
    """

    group: list[int]
    frame: Tensor
    place: Tensor
    size: list[float]
    shown: dict[int, int]

    def follow(self, plan: MergePlan) -> Tensor:
        """Goes on with the survivors of a plan; returns its matrix."""
        matrix = merge_matrix(plan).to_dense().double()
        (left,) = plan.keep_indices.tolist()
        (holder,) = plan.follow(torch.arange(len(self.group))[None]).tolist()
        stands = {mine: self.group[left[holder[index]]] for index, mine in enumerate(self.group)}
        self.shown = {group: stands[survivor] for group, survivor in self.shown.items()}
        self.size = [
            sum(size for size, to in zip(self.size, holder, strict=True) if to == new) for new in range(len(left))
        ]
        rows = [index * MERGE**2 + lane for index in left for lane in range(MERGE**2)]
        self.group = [self.group[index] for index in left]
        self.frame, self.place = self.frame[rows], self.place[rows]
        return matrix


def tower_by_coordinates(
    visual: Any, pixels: Tensor, grids: list[list[int]], plans: dict[int, MergePlan], proportional: bool
) -> tuple[Tensor, Row]:
    """Features of every group in the order of the pictures, and what is left in the end."""
    unit, side = MERGE**2, visual.window_size // PATCH
    order, frames, places, first = [], [], [], 0
    for slices, height, width in grids:
        of_slice = patch_places([1, height, width], MERGE).view(-1, unit, 2)
        for _ in range(slices):
            mine = row_of_windows(height, width, side // MERGE)
            order += [first + group for group in mine]
            places.append(of_slice[mine].flatten(0, 1))
            frames += [len(places)] * (len(mine) * unit)
            first += len(mine)
    row = Row(order, torch.tensor(frames), torch.cat(places), [1.0] * len(order), {group: group for group in order})
    hidden = visual.patch_embed(pixels).view(len(order), unit, -1)[order].flatten(0, 1)
    for index, layer in enumerate(visual.blocks):
        seen = row.frame[:, None] == row.frame
        if index not in TOWER["fullatt_block_indexes"]:
            seen = seen & slow.same_window(row.place, side)
        bias = torch.tensor(row.size).log().repeat_interleave(unit) if proportional else None
        hidden, _, _ = slow.block(layer, hidden, slow.patch_angles(visual, hidden, row.place), seen, bias)
        if index in plans:
            groups = hidden.view(len(row.group), -1)
            hidden = (row.follow(plans[index]) @ groups).view(-1, hidden.shape[1])
        hidden = hidden + layer.mlp(layer.norm2(hidden))
    merged = dict(zip(row.group, visual.merger(hidden), strict=True))
    return torch.stack([merged[row.shown[group]] for group in sorted(order)]), row


@torch.no_grad()
def check_tower(samples: list[Sample], method: Any, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> int:
    """Features and records of a patched tower are those of the oracle; returns how many windows became empty."""
    model, oracle = deep_model(), deep_model()
    inputs = inputs_for(model, samples)
    session = patch(model, **settings, method=method)
    plans = Plans(monkeypatch)
    empty = 0
    for kind, output in feature_outputs(model, inputs, return_dict=True).items():
        grids = inputs[f"{kind}_grid_thw"].tolist()
        pixels = inputs["pixel_values" if kind == "image" else "pixel_values_videos"]
        made = dict(zip(settings["vit_layers"], [plans.made.pop(0) for _ in settings["vit_layers"]], strict=True))
        values, row = tower_by_coordinates(
            oracle.model.visual, pixels, grids, made, session.config.method.proportional
        )
        assert 0 < len(row.group) < len(row.shown)
        torch.testing.assert_close(torch.cat(tuple(output.pooler_output)), values, **CLOSE)
        first = 0
        for record, feature in zip(records_of(output) or [], output.pooler_output, strict=True):
            mine = range(first, first + len(feature))
            assert record.keep.tolist() == [group in row.group for group in mine]
            assert record.survivor_of.tolist() == [row.shown[group] - first for group in mine]
            first += len(feature)
        windows = torch.cat([row.frame[:, None], row.place // (WINDOW_GROUPS * MERGE)], 1)[:: MERGE**2]
        whole = get_vision_window_index(torch.tensor(grids), MERGE, WINDOW_GROUPS * MERGE * PATCH, PATCH)[1]
        empty += len(whole) - 1 - len(windows.unique(dim=0))
    assert not plans.made
    return empty


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", SAMPLES)
def test_the_tower_by_coordinates(kind: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_tower(SAMPLES[kind], METHODS[method], MERGING, monkeypatch)


@pytest.mark.parametrize("method", METHODS)
def test_windows_may_become_empty(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_tower(SAMPLES["two images"], METHODS[method], LITTLE_LEFT, monkeypatch) > 0


def frame_borders(family: Qwen25VL, kwargs: dict[str, Any], run: Any, merges: int) -> dict[str, Any]:
    """Survivors see their whole slice in every block."""
    return PackedFamily.borders(family, kwargs, run, merges)


def equal_windows(family: Qwen25VL, kwargs: dict[str, Any], run: Any, merges: int) -> dict[str, Any]:
    """Windows are taken to lose as much as slices do."""
    if len(kwargs["cu_seqlens"]) != len(run.traits.windows):
        return PackedFamily.borders(family, kwargs, run, merges)
    left = sum(run.segments[merges].lengths) / sum(run.segments[0].lengths)
    return {"cu_seqlens": (run.traits.windows * left / 4).round().int() * 4}


@pytest.mark.parametrize("wrong", [frame_borders, equal_windows])
def test_the_oracle_sees_wrong_windows(wrong: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Qwen25VL, "borders", wrong)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        check_tower(SAMPLES["two images"], "illava", MERGING, monkeypatch)


def test_the_oracle_sees_records_in_the_order_of_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_packed, "_row_places", lambda run: torch.arange(run.final.kept_at.shape[1]))
    with pytest.raises(AssertionError, match=r"assert \["):
        check_tower(SAMPLES["two images"], "illava", MERGING, monkeypatch)


@pytest.mark.parametrize("kind", ["two images", "video"])
@torch.no_grad()
def test_provenance_is_in_the_order_of_the_picture(kind: str) -> None:
    """Its seats are the survivors of the records, which the oracle knows; they hold what they stand for."""
    model = deep_model()
    inputs = inputs_for(model, SAMPLES[kind])
    session = patch(model, **MERGING, method="diverse", track=True)
    (output,) = feature_outputs(model, inputs, return_dict=True).values()
    images = session.provenance.at("vision", MERGING["vit_layers"][-1]).images
    for record, image in zip(records_of(output) or [], images, strict=True):
        kept = record.keep.nonzero().flatten()
        assert (image.seats.view(-1, MERGE**2)[:, 0] // MERGE**2).sort().values.tolist() == kept.tolist()
        shares = image.weights.to_dense()
        for seat, share in zip(image.seats.tolist(), shares, strict=True):
            group, lane = divmod(seat, MERGE**2)
            mine = (record.survivor_of == group).nonzero().flatten() * MERGE**2 + lane
            assert share.nonzero().flatten().tolist() == mine.tolist()


def test_provenance_in_the_order_of_the_row_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = trace._picture_order
    monkeypatch.setattr(trace, "_picture_order", lambda *given: torch.arange(len(inner(*given))))
    with pytest.raises(AssertionError):
        test_provenance_is_in_the_order_of_the_picture("two images")


# ------------------------------------------------------------------------------------- back-ends


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["two images", "video"])
def test_flash_attention_takes_empty_windows(kind: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row cut by borders that the device counted; merged tokens are weighed within their windows."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", FlashKernel(has_windows=True))
    expected, model = deep_model(), deep_model()
    monkeypatch.setattr(model.config.vision_config, "_attn_implementation_internal", "flash_attention_2")
    found = []
    for each in (expected, model):
        patch(each, **LITTLE_LEFT, method=METHODS[method])
        with torch.no_grad():
            found.append(each(**inputs_for(each, SAMPLES[kind])).logits)
    torch.testing.assert_close(found[1], found[0], **CLOSE)


@pytest.mark.parametrize("method", ["illava", "diverse"])
def test_gradients_are_finite_and_those_of_eager(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", FlashKernel(has_windows=True))
    found = {}
    for back_end in ("eager", "sdpa", "flash_attention_2"):
        model = deep_model(attn_implementation="eager" if back_end == "eager" else "sdpa")
        monkeypatch.setattr(model.config.vision_config, "_attn_implementation_internal", back_end)
        patch(model, **LITTLE_LEFT | {"llm_layers": []}, method=method)
        output = model.get_image_features(**feature_inputs(model, "two images"))
        torch.cat(tuple(output.pooler_output)).square().mean().backward()
        found[back_end] = {name: p.grad for name, p in model.model.visual.named_parameters()}
    for back_end in ("sdpa", "flash_attention_2"):
        assert all(gradient.isfinite().all() for gradient in found[back_end].values())
        torch.testing.assert_close(found[back_end], found["eager"], **CLOSE)


def feature_inputs(model: Any, kind: str) -> Inputs:
    inputs = inputs_for(model, SAMPLES[kind])
    return {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}


# ---------------------------------------------------------------------------- batches and generation


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_batch_is_its_samples(method: str) -> None:
    model = deep_model()
    samples = [*SAMPLES["batch"], *SAMPLES["narrow"]]
    patch(model, **MERGING, method=METHODS[method])
    inputs = inputs_for(model, samples)
    logits = model(**inputs).logits
    ids = model.generate(**inputs, max_new_tokens=4)[:, -4:]
    beams = model.generate(**inputs, max_new_tokens=4, num_beams=2)[:, -4:]
    static = model.generate(**inputs, max_new_tokens=4, cache_implementation="static")[:, -4:]
    assert torch.equal(static, ids)
    for row, sample in enumerate(samples):
        alone = inputs_for(model, [sample])
        torch.testing.assert_close(logits[row, real_positions(inputs, row)], model(**alone).logits[0], **CLOSE)
        assert torch.equal(ids[row], model.generate(**alone, max_new_tokens=4)[0, -4:])
        assert torch.equal(beams[row], model.generate(**alone, max_new_tokens=4, num_beams=2)[0, -4:])


@torch.no_grad()
def test_seconds_between_slices_only_scale_positions() -> None:
    model = deep_model()
    patch(model, **MERGING)
    inputs = inputs_for(model, SAMPLES["video"])
    near, far = (model(**inputs, second_per_grid_ts=torch.tensor([seconds])).logits for seconds in (1.0, 4.0))
    assert_differ(near, far)
    positions, _ = model.model.get_rope_index(
        inputs["input_ids"],
        inputs["mm_token_type_ids"],
        video_grid_thw=inputs["video_grid_thw"],
        second_per_grid_ts=torch.tensor([4.0]),
    )
    torch.testing.assert_close(model(**inputs, position_ids=positions).logits, far, **CLOSE)


# ----------------------------------------------------------------------------------- the tower itself


def calls_the_tower(stock: type) -> Callable[..., Any]:
    """A base model's forward that does not go through its feature methods, as retrievers' do not."""

    def forward(self: Any, input_ids: Any, pixel_values: Any, image_grid_thw: Any, **kwargs: Any) -> Any:
        embeds = self.get_input_embeddings()(input_ids)
        found = self.visual(pixel_values, grid_thw=image_grid_thw, return_dict=True).pooler_output
        mask, _ = self.get_placeholder_mask(input_ids, inputs_embeds=embeds, image_features=found)
        embeds = embeds.masked_scatter(mask, found)
        types = kwargs.pop("mm_token_type_ids")
        given = {"image_grid_thw": image_grid_thw, "attention_mask": kwargs["attention_mask"]}
        kwargs["position_ids"], _ = self.get_rope_index(input_ids, types, **given)
        return self.language_model(inputs_embeds=embeds, **kwargs)

    return forward


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_forward_that_calls_the_tower_itself(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, whole = deep_model(), deep_model()
    inputs = inputs_for(model, SAMPLES["two images"])
    patch(whole, **MERGING, method=METHODS[method])
    expected = whole.model(**inputs).last_hidden_state
    kind = type(model.model)
    monkeypatch.setattr(kind, "forward", calls_the_tower(kind))
    stock = model.model(**inputs).last_hidden_state
    patch(model, **MERGING, method=METHODS[method])
    torch.testing.assert_close(model.model(**inputs).last_hidden_state, expected, **CLOSE)
    assert_differ(expected, stock)
    assert session_of(model).report.visuals == session_of(whole).report.visuals
    assert session_of(model).report.encoder_flops == session_of(whole).report.encoder_flops


def test_a_direct_call_needs_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the patch merger stock asks for every group of the row."""
    monkeypatch.setattr(qwen2_5_vl, "current_run", lambda: None)
    with pytest.raises(IndexError):
        test_a_forward_that_calls_the_tower_itself("illava", monkeypatch)


@torch.no_grad()
def test_outputs_of_the_tower_have_their_length() -> None:
    """In the order of windows, as in stock."""
    model = deep_model()
    given = feature_inputs(model, "two images") | {"return_dict": True, "output_hidden_states": True}
    stock = model.get_image_features(**given)
    patch(model, **MERGING)
    merged = model.get_image_features(**given)
    assert merged.last_hidden_state.shape == stock.last_hidden_state.shape
    assert [h.shape for h in merged.hidden_states] == [h.shape for h in stock.hidden_states]
    for layer in (0, 1):
        assert torch.equal(merged.hidden_states[layer], stock.hidden_states[layer])


# ------------------------------------------------------------------------------- ready-made arguments


def ready_made(model: Any, inputs: Inputs, window: int) -> Inputs:
    """Windows of another size, as a data loader may prepare them."""
    grids = inputs["image_grid_thw"]
    index, borders = get_vision_window_index(grids, MERGE, window * MERGE * PATCH, PATCH)
    return {"image_window_index": index, "image_cu_window_seqlens": borders}


@pytest.mark.parametrize("window", [WINDOW_GROUPS, 2])
@torch.no_grad()
def test_windows_that_the_caller_brings(window: int) -> None:
    """They count, whatever the configuration says."""
    model = deep_model()
    inputs = inputs_for(model, SAMPLES["two images"])
    config = TOWER | {"window_size": window * MERGE * PATCH}
    other = tiny_model(NAME, dtype=torch.float64, vision=config)
    found = []
    for each, more in ((model, ready_made(model, inputs, window) | {"image_max_window_seqlen": 36}), (other, {})):
        patch(each, **LITTLE_LEFT, method="diverse", track=True)
        found.append(each.get_image_features(**feature_inputs(each, "two images"), **more, return_dict=True))
    torch.testing.assert_close(*(torch.cat(tuple(output.pooler_output)) for output in found), atol=0, rtol=0)
    ours, theirs = (records_of(output) or [] for output in found)
    for one, another in zip(ours, theirs, strict=True):
        assert torch.equal(one.survivor_of, another.survivor_of) and torch.equal(
            one.window_pairs, another.window_pairs
        )
        assert torch.equal(one.sources.to_dense(), another.sources.to_dense())


def across_images(given: Inputs) -> Inputs:
    index = given["image_window_index"]
    return given | {"image_window_index": index.flip(0)}


def without_a_border(given: Inputs) -> Inputs:
    borders = given["image_cu_window_seqlens"]
    return given | {"image_cu_window_seqlens": borders[[0, -1]]}


@pytest.mark.parametrize("wrong", [across_images, without_a_border])
def test_windows_across_images_are_refused(wrong: Callable[[Inputs], Inputs]) -> None:
    model = deep_model()
    given = wrong(ready_made(model, inputs_for(model, SAMPLES["two images"]), WINDOW_GROUPS))
    patch(model, **MERGING)
    with pytest.raises(InputError) as caught:
        model.get_image_features(**feature_inputs(model, "two images"), **given)
    assert_says(caught.value, "^window_index or cu_window_seqlens", "across images", "leave both out")


# ----------------------------------------------------------------------------------------- the report


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kind", ["window and a bit", "two images", "video", "batch"])
@torch.no_grad()
def test_flops_of_windows(kind: str, merged: bool) -> None:
    """Exactly what torch counts: pairs within windows, three matrices in each MLP."""
    model = tiny_model(NAME, vision=TOWER)
    inputs = inputs_for(model, SAMPLES[kind])
    settings = {**MERGING} if merged else {**MERGING, "vit_layers": []}
    session = patch(model, **settings, method="random")
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={flash: attention_flops}) as counter:
        model(**inputs)
    blocks = _counted(model, model.model.visual.blocks)
    counts = counter.get_flop_counts()
    counted = sum(sum(found.values()) for name, found in counts.items() if name in blocks)
    (projector,) = (found for name, found in counts.items() if name in _counted(model, [model.model.visual.merger]))
    assert session.report.encoder_flops[0] == counted
    assert session.report.projector_flops[0] == sum(projector.values())
    assert (session.report.encoder_flops[0] < session.report.encoder_flops[1]) == merged


@pytest.mark.parametrize("wrong", [{"windowed": frozenset()}, {"mlp_matrices": 2}], ids=str)
def test_wrong_flops_are_seen(wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    inner = Qwen25VL.encoder_shape
    monkeypatch.setattr(Qwen25VL, "encoder_shape", lambda *given: dataclasses.replace(inner(*given), **wrong))
    with pytest.raises(AssertionError):
        test_flops_of_windows("two images", True)


# ------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("layers", [[0], [1, 3], [0, 1, 4, 5]])
def test_layers_with_windows_are_refused(layers: list[int]) -> None:
    model = deep_model()
    with pytest.raises(UnsupportedModelError) as caught:
        patch(model, layers, 0.25, [2], 0.6)
    wrong = ", ".join(str(layer) for layer in layers if layer not in (1, 4))
    assert_says(caught.value, f"^vit_layers contains {wrong}, where", "within windows", r"choose from \[1, 4\]$")
    assert session_of(model) is None


def test_a_tower_without_full_attention_merges_nothing() -> None:
    model = tiny_model(NAME, vision={"fullatt_block_indexes": []})
    with pytest.raises(UnsupportedModelError) as caught:
        patch(model, [1], 0.25, [2], 0.6)
    assert_says(caught.value, "^vit_layers contains 1, where", r"use vit_layers=\[\]$")
    patch(model, [], 0, [2], 0.6)


def test_foreign_blocks() -> None:
    model = tiny_model(NAME)
    model.model.visual.blocks = nn.ModuleList([nn.Linear(32, 32) for _ in range(4)])
    with pytest.raises(UnsupportedModelError) as caught:
        patch(model, [1], 4, [1], 0.5)
    assert_says(caught.value, "^visual has Linear blocks", "use a stock Qwen2.5-VL model")
    assert session_of(model) is None


def test_published_code_is_not_claimed() -> None:
    with pytest.raises(UnsupportedModelError, match=f"there is none for {NAME}"):
        patch(tiny_model(NAME), [1], 4, [1], 0.5, method="illava-reference")
