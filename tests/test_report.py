"""The report: counts by hand, FLOPs against torch's own counter, KV bytes against the cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from decode_helpers import SETTINGS, skip_where_stock_mixes_images
from families import families, families_and, family_of
from helpers import OLD_TORCH, key_lengths, keyed, needs_ready_features, query_width
from illava_hooks import MergeReport, merging, patch, session_of
from tiny_models import FAMILIES, Inputs, Sample, inputs_for, tiny_model

RAGGED = [
    Sample(text_seed=1, images=((48, 30), (64, 64))),
    Sample(text_seed=2),
    Sample(text_seed=3, images=((32, 90),), videos=(4,)),
]
SAMPLES = {"one": RAGGED[:1], "ragged": RAGGED, "image and video": RAGGED[2:]}


def run(family: str, samples: list[Sample], **other: Any) -> tuple[Any, Inputs, Any, MergeReport]:
    """A patched forward: model, inputs, output, report."""
    model = tiny_model(family)
    inputs = inputs_for(model, samples)
    session = patch(model, **{**SETTINGS[family], **other})
    with torch.no_grad():
        output = model(**inputs)
    return model, inputs, output, session.report


@pytest.mark.parametrize("family", families(with_videos=True))
def test_counts_follow_from_the_settings(family: str) -> None:
    model, inputs, output, report = run(family, RAGGED)
    assert [v.sample for v in report.visuals] == [0, 0, 2, 2]
    assert [v.modality for v in report.visuals] == ["image", "image", "image", "video"]
    assert report.images == report.visuals[:3] and report.videos == report.visuals[3:]
    assert report.prompt_tokens == tuple(inputs["attention_mask"].sum(1).tolist())
    for visual in report.visuals:
        entry, *_ = visual.language_tokens
        second = entry - round(entry * (1 - 0.6))
        third = second - round(second * (1 - 0.6))
        assert visual.language_tokens == (entry, second, second, third)
        assert visual.kept_fraction == third / visual.prompt_tokens
    whole, left = sum(v.prompt_tokens for v in report.visuals), sum(v.language_tokens[-1] for v in report.visuals)
    assert report.kept_fraction == left / whole
    attending = family_of(family).attending(model)
    assert key_lengths(output.past_key_values) == [max(report.sequence_tokens[layer]) for layer in attending]
    for layer, lengths in enumerate(report.sequence_tokens):
        for sample, length in enumerate(lengths):
            mine = [v for v in report.visuals if v.sample == sample]
            merged = sum(v.prompt_tokens - v.language_tokens[layer] for v in mine)
            assert length == report.prompt_tokens[sample] - merged


@pytest.mark.parametrize("family", FAMILIES)
def test_kv_bytes_are_those_of_the_cache(family: str) -> None:
    model, inputs, output, report = run(family, RAGGED[:1])
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in keyed(output.past_key_values))
    with torch.no_grad(), merging(model, False):
        whole = model(**inputs).past_key_values
    assert report.kv_bytes == (held, sum(layer.keys.nbytes + layer.values.nbytes for layer in keyed(whole)))


def attention_flops(query: tuple[int, ...], key: tuple[int, ...], *_: Any, **__: Any) -> int:
    """What torch's counter does not know on the CPU: two matrix products of a full attention map."""
    batch, heads, rows, width = query
    return 2 * 2 * batch * heads * rows * key[2] * width


def added_product_flops(total: tuple[int, ...], left: tuple[int, ...], right: tuple[int, ...], **_: Any) -> int:
    """A matrix product that is added in place, which torch's counter does not know either."""
    return 2 * left[0] * left[1] * right[1]


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_those_that_run(family: str, merged: bool) -> None:
    """Against torch's counter, by kind of operation; the causal half is the formula's own convention."""
    model = tiny_model(family)
    inputs = inputs_for(model, RAGGED[:1])
    # Random scores need no products in the encoder; what scoring costs there has a test of its own.
    session = patch(model, **SETTINGS[family], method="random")
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={flash: attention_flops})
    with torch.no_grad():
        model(**inputs)
        report = session.report
        with merging(model, merged), counter:
            model(**inputs)
    index = 0 if merged else 1
    lengths = [n if merged else report.prompt_tokens[0] for (n,) in report.sequence_tokens]
    counts = counter.get_flop_counts()
    text = family_of(family).language_name
    language = counts[next(k for k in counts if k.endswith(text))]
    rotary = sum(sum(found.values()) for name, found in counts.items() if name.endswith(f"{text}.rotary_emb"))
    language_flops = sum(language.values()) - rotary  # a product in old releases
    width, known = query_width(model), family_of(family)
    causal = sum(2 * lengths[layer] ** 2 * width for layer in known.attending(model))
    assert language_flops == report.llm_flops[index] + causal, "attention runs over the whole square"
    attention = sum(n for op, n in language.items() if "attention" in str(op))
    assert attention == (0 if OLD_TORCH else 2 * causal), "old releases count grouped attention as products"
    blocks = [v for k, v in counts.items() if k in _counted(model, known.encoder_layers(model))]
    assert sum(sum(block.values()) for block in blocks) == report.encoder_flops[index]
    projectors = [v for k, v in counts.items() if k in _counted(model, known.projectors(model))]
    assert len(projectors) == len(known.projectors(model))
    assert sum(sum(found.values()) for found in projectors) == report.projector_flops[index]


def _counted(model: nn.Module, modules: Sequence[nn.Module]) -> set[str]:
    """The names under which torch's counter has some of a model's modules."""
    return {f"{type(model).__name__}.{n}" for n, m in model.named_modules() if any(m is one for one in modules)}


@pytest.mark.parametrize("back_end", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scoring_costs_what_it_should(family: str, back_end: str) -> None:
    """A row of sums (N x N x H) per score map, and the logits again where attention does not tell on the way."""
    model, known = tiny_model(family, attn_implementation=back_end), family_of(family)
    samples = [Sample(text_seed=1, images=((32, 32),))]
    inputs = inputs_for(model, samples)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    unknown = {flash: attention_flops, torch.ops.aten.addmm_: added_product_flops}
    counts = {}
    for method in ("random", "fastv"):
        patch(model, vit_layers=[1], vit_r=0.25, llm_layers=[], llm_ratio=1.0, method=method)
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=unknown) as counter:
            model(**inputs)
        # The merging layer alone: behind it, who shares a window depends on who was chosen.
        layer = _counted(model, [known.encoder_layers(model)[1]])
        counts[method] = sum(sum(found.values()) for name, found in counter.get_flop_counts().items() if name in layer)
    heads, width = known.encoder_sizes(model)
    (patches,) = known.segments(model, samples)
    segments = [n + known.prefix for n in patches]
    logits = sum(2 * n * n * width for n in segments) if back_end == "eager" else 0
    assert counts["fastv"] - counts["random"] == logits + sum(2 * n * n * heads for n in segments)


@pytest.mark.parametrize("family", families(with_videos=True))
def test_text_of_the_report(family: str) -> None:
    *_, report = run(family, RAGGED)
    text = str(report)
    assert text.splitlines()[0] == report.summary
    for name in ("image 1 (row 0): ", "image 2 (row 0): ", "image 3 (row 2): ", "video 1 (row 2): "):
        assert sum(line.startswith(name) for line in text.splitlines()) == 1
    assert f"kept fraction of visual tokens: {report.kept_fraction:.3f}" in text
    for stage in ("encoder", "projector", "language model", "prefill in all", "KV cache"):
        assert stage in text
    assert report.flops[0] < report.flops[1]


class RowCounter:
    """Counts the patches that enter a vision encoder."""

    def __init__(self, model: Any) -> None:
        self.rows = 0
        family_of(model).encoder_layers(model)[0].register_forward_pre_hook(self)

    def __call__(self, module: Any, args: tuple[Any, ...]) -> None:
        self.rows += args[0].numel() // args[0].shape[-1]


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_return_sequences": 3, "do_sample": True}], ids=str)
@pytest.mark.parametrize(("family", "kind"), families_and(SAMPLES))
def test_sequences_of_one_prompt_share_the_encoder(family: str, kind: str, settings: Any) -> None:
    skip_where_stock_mixes_images(family, SAMPLES[kind])
    model, inputs, _, alone = run(family, SAMPLES[kind])
    counter = RowCounter(model)
    with torch.no_grad():
        model(**inputs)
    once = counter.rows
    model.generate(**inputs, max_new_tokens=2, **settings)
    times = (counter.rows - once) // once
    assert times == 1 or not hasattr(model, "_expand_multimodal_outputs")  # older releases repeat the pixels
    report = session_of(model).report
    assert report.encoder_flops == tuple(times * flops for flops in alone.encoder_flops)
    assert report.projector_flops == tuple(times * flops for flops in alone.projector_flops)
    assert report.llm_flops == tuple(3 * flops for flops in alone.llm_flops)
    assert report.kv_bytes == tuple(3 * size for size in alone.kv_bytes)
    assert report.flops == tuple(
        times * (alone.encoder_flops[i] + alone.projector_flops[i]) + 3 * alone.llm_flops[i] for i in (0, 1)
    )
    assert report.kept_fraction == alone.kept_fraction


@needs_ready_features
@pytest.mark.parametrize("family", FAMILIES)
def test_features_that_came_ready_made_have_no_encoder_cost(family: str) -> None:
    model, known = tiny_model(family), family_of(family)
    inputs = inputs_for(model, RAGGED[:1])
    with torch.no_grad():
        features = model.get_image_features(**known.feature_arguments(inputs)["image"], return_dict=True)
        session = patch(model, **SETTINGS[family])
        model(**known.beside_features(inputs), mm_encoder_outputs={"image": features})
    assert session.report.encoder_flops == session.report.projector_flops == (0, 0)
    assert session.report.images[0].vision_tokens == ()
    assert session.report.llm_flops[0] < session.report.llm_flops[1]
