"""What merging itself costs: scores, plans, gathering and scattering, and what hooks add to a decode step."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from illava_hooks.api import patch, unpatch
from illava_hooks.engine import decoder_hooks, encoder_layers
from illava_hooks.engine.compat import CACHE
from illava_hooks.engine.decoder import DecoderRun
from illava_hooks.engine.encoder import EncoderRun
from illava_hooks.engine.report import MergeReport
from illava_hooks.tools.bench.measure import stage_inputs
from illava_hooks.tools.bench.meters import Stopwatch, timed

__all__ = ["MergeCost", "merge_cost"]

#: Everything that an unpatched prefill does not do.
_CALLS: list[tuple[Any, str]] = [
    (EncoderRun, "__init__"),
    (EncoderRun, "enter"),
    (EncoderRun, "merge"),
    (encoder_layers, "expand_output"),
    (decoder_hooks.TextModelHook, "_prefill"),
    (decoder_hooks._Ranking, "_score"),
    (DecoderRun, "merge"),
    (DecoderRun, "expand"),
]


@dataclass(frozen=True, slots=True)
class MergeCost:
    """What a merged run does, and what the library itself takes of it.

    Attributes:
        report: what was merged.
        share: of merging in the prefill: CPU seconds on a CPU, else device seconds. Where scores fall out of the
            attention itself, what counts is the attention's time above plain SDPA's.
        decoding: seconds of a decode step over those of an unpatched one that reads as many keys; 0 without steps.
    """

    report: MergeReport
    share: float
    decoding: float


@torch.inference_mode()
def merge_cost(model: Any, inputs: Mapping[str, Tensor], settings: dict[str, Any], steps: int) -> MergeCost:
    """Looks for it in a run of its own.

    Args:
        model: an unpatched model; unpatched afterwards.
        inputs: one batch.
        settings: arguments of ``patch``.
        steps: decode steps of each kind, in turn.
    """
    from transformers import DynamicCache

    # A second model around the same weights, so that steps can take turns without patching in between.
    twin = deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    watch, spent = Stopwatch(model.device), list[tuple[float, float]]()
    plain, blocks = list[tuple[float, float]](), list[tuple[float, float]]()
    clock = 1 if model.device.type == "cpu" else 0
    cache = DynamicCache(config=model.config.get_text_config())
    held = {CACHE: cache}
    session = patch(model, **settings)
    try:
        calls, text = stage_inputs(model, inputs)  # behind the patch, which replaces these methods
        with timed(watch, _CALLS, spent), _beside_plain(watch, plain, blocks):
            began = watch.look()
            features = {kind: method(**arguments) for kind, method, arguments in calls}
            model(**text, mm_encoder_outputs=features, **held, use_cache=True, logits_to_keep=1)
            whole = watch.look()[clock] - began[clock]
        extra = sum(table[clock] for table in plain)
        merging_s = sum(pair[clock] for pair in spent) + sum(pair[clock] for pair in blocks) - extra
        token = text["input_ids"][:, -1:]
        decoding = _decode_ratio(model, cache, twin, _as_many_keys(cache, model), token, steps)
        return MergeCost(session.report, merging_s / (whole - extra), decoding)
    finally:
        unpatch(model)


def _as_many_keys(cache: Any, model: Any) -> Any:
    """An unpatched model's cache: equal in all layers, and in all with as many keys as a merged one."""
    from transformers import DynamicCache

    layers: list[Any] = list(cache.layers)
    length = round(statistics.mean(layer.keys.shape[-2] for layer in layers))
    found = DynamicCache(config=model.config.get_text_config())
    for index, layer in enumerate(layers):
        zeros = layer.keys.new_zeros(*layer.keys.shape[:2], length, layer.keys.shape[-1])
        found.update(zeros, zeros.clone(), index)
    return found


def _decode_ratio(model: Any, cache: Any, twin: Any, other: Any, token: Tensor, steps: int) -> float:
    """Decode steps of two models in turn: the median seconds of the first over those of the second."""
    watch, clock = Stopwatch(model.device), 1 if model.device.type == "cpu" else 0
    spent: tuple[list[float], list[float]] = [], []
    for _ in range(steps):
        for network, held, seconds in ((model, cache, spent[0]), (twin, other, spent[1])):
            began = watch.look()
            network(input_ids=token, **{CACHE: held}, use_cache=True)
            seconds.append(watch.look()[clock] - began[clock])
    return statistics.median(spent[0]) / statistics.median(spent[1]) if steps else 0.0


@contextlib.contextmanager
def _beside_plain(
    watch: Stopwatch, plain: list[tuple[float, float]], blocks: list[tuple[float, float]]
) -> Iterator[None]:
    """Runs plain SDPA beside every attention in blocks, and times both."""
    tap: Any = import_module("illava_hooks.engine.attention_tap")
    stock: Any = tap.attend_and_receive

    def both(
        query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        began = watch.look()
        scaled_dot_product_attention(query, key, value, scale=scale)
        between = watch.look()
        found: tuple[Tensor, Tensor] = stock(query, key, value, scale, bias)
        end = watch.look()
        plain.append((between[0] - began[0], between[1] - began[1]))
        blocks.append((end[0] - between[0], end[1] - between[1]))
        return found

    tap.attend_and_receive = both
    try:
        yield
    finally:
        tap.attend_and_receive = stock
