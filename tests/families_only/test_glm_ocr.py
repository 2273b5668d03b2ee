"""GLM-OCR: the tower again, group by group, with norms of queries and keys; what it costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from families.qwen2_vl import patches_of
from illava_hooks import Method, merging, patch
from illava_hooks.engine.encoder import EncoderRun
from illava_hooks.engine.records import records_of
from illava_hooks.patchers.glm_ocr import GlmOcr
from tiny_models import Sample, inputs_for, tiny_model
from unit_oracle import merged

SETTINGS: dict[str, Any] = {"vit_layers": [1, 2], "vit_r": 0.3, "llm_layers": [1, 3], "llm_ratio": 0.6}
GRIDS = [[1, 6, 8], [1, 4, 4]]
UNIT = 4


def rotated(table: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = table.chunk(2, -1)
    return table * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


@torch.no_grad()
def tower_again(model: Any, pixels: Tensor, grid: list[int], rule: str) -> dict[int, Tensor]:
    """Features of the surviving groups of one image."""
    visual = model.model.visual
    seen: dict[str, Any] = {}

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(kwargs, hidden=args[0])

    handle = visual.blocks[0].register_forward_pre_hook(note, with_kwargs=True)
    visual(pixels, grid_thw=torch.tensor([grid]))
    handle.remove()
    cos, sin = (dict(enumerate(table.split(UNIT))) for table in seen["position_embeddings"])
    units = dict(enumerate(seen["hidden"].split(UNIT)))
    for index, block in enumerate(visual.blocks):
        rows, attention = torch.cat(list(units.values())), block.attn
        turned = [torch.cat([table[unit] for unit in units]) for table in (cos, sin)]
        q, k, v = attention.qkv(block.norm1(rows)).view(len(rows), 3, attention.num_heads, -1).unbind(1)
        q, k = rotated(attention.q_norm(q), *turned), rotated(attention.k_norm(k), *turned)
        weights = (torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5).softmax(-1)
        rows = rows + attention.proj(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
        units = dict(zip(units, rows.split(UNIT), strict=True))
        if index in SETTINGS["vit_layers"]:
            received = weights.mean((0, 1)).split(UNIT)
            scores = {unit: float(part.mean()) for unit, part in zip(units, received, strict=True)}
            units = merged(rule, units, scores, int(len(rows) * SETTINGS["vit_r"]) // UNIT)
        rows = torch.cat(list(units.values()))
        rows = rows + block.mlp(block.norm2(rows))
        units = dict(zip(units, rows.split(UNIT), strict=True))
    groups = torch.stack([visual.post_layernorm(rows).view(2, 2, -1).permute(2, 0, 1) for rows in units.values()])
    return dict(zip(units, visual.merger(visual.downsample(groups).flatten(1)), strict=True))


def check_oracle(rule: str) -> None:
    model = tiny_model("glm_ocr", dtype=torch.float64)
    pixels = [patches_of(Sample(3), "i", index, grid).double() for index, grid in enumerate(GRIDS)]
    expected = [tower_again(model, rows, grid, rule) for rows, grid in zip(pixels, GRIDS, strict=True)]
    patch(model, **SETTINGS, method=Method("mine", encoder_score="received_attention", merge=rule))
    with torch.no_grad():
        output = model.model.get_image_features(torch.cat(pixels), torch.tensor(GRIDS))
    for features, record, alone in zip(output.pooler_output, records_of(output) or [], expected, strict=True):
        assert record.keep is not None and record.survivor_of is not None
        assert record.keep.nonzero().flatten().tolist() == sorted(alone) and len(alone) < len(features)
        for unit, survivor in enumerate(record.survivor_of.tolist()):
            # Norms compute in float32, whatever the model is in.
            torch.testing.assert_close(features[unit], alone[survivor], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", ["drop", "recycle"])
def test_the_tower_is_that_of_the_surviving_groups(rule: str) -> None:
    check_oracle(rule)


@pytest.mark.parametrize("rule", ["drop", "recycle"])
def test_the_oracle_sees_survivors_that_rotate_elsewhere(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = GlmOcr.shrink

    def shrink(self: GlmOcr, kwargs: dict[str, Any], run: EncoderRun, merges: int) -> dict[str, Any]:
        found = stock(self, kwargs, run, merges)
        length = len(found["position_embeddings"][0])
        return {**found, "position_embeddings": tuple(table[:length] for table in kwargs["position_embeddings"])}

    monkeypatch.setattr(GlmOcr, "shrink", shrink)
    with pytest.raises(AssertionError):
        check_oracle(rule)


def test_the_report_counts_its_widths() -> None:
    """Of blocks, and of convolution and merger together."""
    model = tiny_model("glm_ocr", attn_implementation="eager")
    prompt = inputs_for(model, [Sample(1, images=((32, 32),))])
    session = patch(model, **SETTINGS, method=Method("mine", encoder_score="uniform", merge="drop"))
    for index, enabled in enumerate((True, False)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter, merging(model, enabled):
            model(**prompt)
        counts = {name: sum(found.values()) for name, found in counter.get_flop_counts().items()}
        blocks = sum(n for name, n in counts.items() if name.rpartition(".")[0].endswith("visual.blocks"))
        joined = sum(n for name, n in counts.items() if name.endswith(("visual.downsample", "visual.merger")))
        assert session.report.encoder_flops[index] == pytest.approx(blocks, rel=0.01)
        assert session.report.projector_flops[index] == pytest.approx(joined, rel=0.01)
