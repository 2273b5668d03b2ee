"""What merging itself costs: scores, plans, gathering and scattering, and what hooks add to a decode step."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from illava_hooks.api import patch, unpatch
from illava_hooks.engine.compat import CACHE
from illava_hooks.engine.regions import ATTENTION, listening
from illava_hooks.engine.report import MergeReport
from illava_hooks.tools.bench.measure import stage_inputs
from illava_hooks.tools.bench.meters import Moment, Stopwatch

__all__ = ["MergeCost", "merge_cost"]


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
    watch = Stopwatch(model.device)
    regions = _RegionClock(watch)
    clock = 1 if model.device.type == "cpu" else 0
    cache = DynamicCache(config=model.config.get_text_config())
    held = {CACHE: cache}
    session = patch(model, **settings)
    try:
        calls, text = stage_inputs(model, inputs)  # behind the patch, which replaces these methods
        with listening(regions):
            began = watch.mark()
            features = {kind: method(**arguments) for kind, method, arguments in calls}
            model(**text, mm_encoder_outputs=features, **held, use_cache=True, logits_to_keep=1)
            whole = watch.between(began, watch.mark())[clock]
        extra = sum(watch.between(*moments)[clock] for moments in regions.plain)
        merging_s = sum(watch.between(*moments)[clock] for moments in regions.spent) - extra
        token = text["input_ids"][:, -1:]
        # Where the language model is left alone its cache is an unpatched one's, whatever kinds of layers it has.
        other = _as_many_keys(cache, model) if session.report.kv_bytes[1] else deepcopy(cache)
        decoding = _decode_ratio(model, cache, twin, other, token, steps)
        return MergeCost(session.report, merging_s / (whole - extra), decoding)
    finally:
        unpatch(model)


def _as_many_keys(cache: Any, model: Any) -> Any:
    """An unpatched model's cache: as many keys as a merged one has, equally many in all layers that have some."""
    from transformers import DynamicCache

    layers: list[Any] = list(cache.layers)
    length = round(statistics.mean(layer.keys.shape[-2] for layer in layers if hasattr(layer, "keys")))
    found = DynamicCache(config=model.config.get_text_config())
    for index, layer in enumerate(layers):
        if not hasattr(layer, "keys"):  # it carries a state along, whose size does not depend on the prompt
            found.layers[index] = deepcopy(layer)
            continue
        zeros = layer.keys.new_zeros(*layer.keys.shape[:2], length, layer.keys.shape[-1])
        found.update(zeros, zeros.clone(), index)
    return found


def _decode_ratio(model: Any, cache: Any, twin: Any, other: Any, token: Tensor, steps: int) -> float:
    """Decode steps of two models in turn: the median seconds of the first over those of the second."""
    watch, clock = Stopwatch(model.device), 1 if model.device.type == "cpu" else 0
    if model.device.type != "cpu":  # the first step at a length is dearer: attentions are planned, kernels loaded
        for network, held in ((model, deepcopy(cache)), (twin, deepcopy(other))):
            for _ in range(steps):
                network(input_ids=token, **{CACHE: held}, use_cache=True)
    spent: tuple[list[float], list[float]] = [], []
    for _ in range(steps):
        for network, held, seconds in ((model, cache, spent[0]), (twin, other, spent[1])):
            began = watch.look()
            network(input_ids=token, **{CACHE: held}, use_cache=True)
            seconds.append(watch.look()[clock] - began[clock])
    return statistics.median(spent[0]) / statistics.median(spent[1]) if steps else 0.0


class _RegionClock:
    """Times the outermost regions; beside an attention that scores as well, what plain SDPA would take."""

    def __init__(self, watch: Stopwatch) -> None:
        self.watch, self.depth = watch, 0
        self.spent: list[tuple[Moment, Moment]] = []
        self.plain: list[tuple[Moment, Moment]] = []

    @contextlib.contextmanager
    def __call__(self, name: str, *what: Any) -> Iterator[None]:
        if self.depth:
            yield
            return
        if name == ATTENTION:
            query, key, value, scale = what
            began = self.watch.mark()
            scaled_dot_product_attention(query, key, value, scale=scale)
            self.plain.append((began, self.watch.mark()))
        began, self.depth = self.watch.mark(), 1
        try:
            yield
        finally:
            self.depth = 0
            self.spent.append((began, self.watch.mark()))
