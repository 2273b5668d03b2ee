"""What merging itself costs: scores, plans, gathering and scattering."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from illava_hooks.api import merging
from illava_hooks.patchers.language.attention import AttentionHook
from illava_hooks.patchers.language.hooks import TextModelHook
from illava_hooks.patchers.language.run import DecoderPass
from illava_hooks.patchers.llava_onevision import features as llava
from illava_hooks.patchers.qwen2_vl import features as qwen
from illava_hooks.patchers.vision import hooks as vision
from illava_hooks.patchers.vision.listening import Eavesdropper
from illava_hooks.patchers.vision.run import EncoderPass
from illava_hooks.tools.bench.measure import stage_inputs
from illava_hooks.tools.bench.meters import Stopwatch, timed

__all__ = ["merge_share"]

#: Everything that an unpatched prefill does not do.
_CALLS: list[tuple[Any, str]] = [
    (EncoderPass, "__init__"),
    (EncoderPass, "enter"),
    (EncoderPass, "merge"),
    (vision, "expand_output"),
    (llava, "settle_image"),
    (llava, "settle_video"),
    (qwen, "_shown"),
    (qwen, "_record"),
    (TextModelHook, "_prefill"),
    (AttentionHook, "_score"),
    (DecoderPass, "merge"),
    (DecoderPass, "expand"),
]


@torch.inference_mode()
def merge_share(model: Any, inputs: Mapping[str, Tensor]) -> float:
    """The share of merging in a merged prefill, in a run of its own: CPU seconds on a CPU, else device seconds.

    Where scores fall out of the attention itself, what counts is the attention's time above plain SDPA's.

    Args:
        model: a patched model.
        inputs: one batch.
    """
    watch, spent = Stopwatch(model.device), list[tuple[float, float]]()
    plain, blocks = list[tuple[float, float]](), list[tuple[float, float]]()
    calls, text = stage_inputs(model, inputs)
    clock = 1 if model.device.type == "cpu" else 0
    with merging(model, True), timed(watch, _CALLS, spent), _beside_plain(watch, plain, blocks):
        began = watch.look()
        features = {kind: method(**arguments) for kind, method, arguments in calls}
        model(**text, mm_encoder_outputs=features, use_cache=True, logits_to_keep=1)
        whole = watch.look()[clock] - began[clock]
    extra = sum(table[clock] for table in plain)
    merging_s = sum(pair[clock] for pair in spent) + sum(pair[clock] for pair in blocks) - extra
    return merging_s / (whole - extra)


@contextlib.contextmanager
def _beside_plain(
    watch: Stopwatch, plain: list[tuple[float, float]], blocks: list[tuple[float, float]]
) -> Iterator[None]:
    """Runs plain SDPA beside every attention in blocks, and times both."""
    stock = Eavesdropper.attend

    def both(
        query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        began = watch.look()
        scaled_dot_product_attention(query, key, value, scale=scale)
        between = watch.look()
        found = stock(query, key, value, scale, bias)
        end = watch.look()
        plain.append((between[0] - began[0], between[1] - began[1]))
        blocks.append((end[0] - between[0], end[1] - between[1]))
        return found

    Eavesdropper.attend = staticmethod(both)
    try:
        yield
    finally:
        Eavesdropper.attend = staticmethod(stock)
