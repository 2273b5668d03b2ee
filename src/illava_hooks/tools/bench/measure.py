"""One prefill and some decode steps, timed stage by stage; alternately unpatched and merging."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from illava_hooks.api import patch, session_of, unpatch
from illava_hooks.engine.compat import CACHE
from illava_hooks.engine.finding import find_family
from illava_hooks.engine.tooling import PIXELS
from illava_hooks.engine.transport import Generation, generating
from illava_hooks.tools.bench.meters import Memory, Stopwatch, timed
from illava_hooks.tools.progress import SILENT, Progress

__all__ = ["Measurement", "Stage", "measure", "measure_alternating", "stage_inputs"]


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a prefill.

    Attributes:
        wall_s: seconds.
        cpu_s: CPU seconds over all threads.
        peak_bytes: highest memory in use above the weights and what earlier stages left.
    """

    wall_s: float
    cpu_s: float
    peak_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Measurement:
    """One run.

    Attributes:
        merged: whether the model was patched.
        encoder: the vision encoder, without the projector; its peak is that of both.
        projector: the projector or patch merger.
        language: prefill of the language model, from embeddings to the logits of the last position.
        decode_s: seconds per further token.
        kv_bytes: keys and values after the prefill.
    """

    merged: bool
    encoder: Stage
    projector: Stage
    language: Stage
    decode_s: float
    kv_bytes: int

    @property
    def prefill_s(self) -> float:
        """Seconds until the first token."""
        return self.encoder.wall_s + self.projector.wall_s + self.language.wall_s

    @property
    def cpu_s(self) -> float:
        """CPU seconds of the prefill."""
        return self.encoder.cpu_s + self.projector.cpu_s + self.language.cpu_s


def stage_inputs(model: Any, inputs: Mapping[str, Tensor]) -> tuple[list[tuple[str, Any, Any]], dict[str, Tensor]]:
    """The calls that encode, as (kind, method, arguments), and the arguments of the language model."""
    family = find_family(model)
    base, calls, text = family.base(model), list[tuple[str, Any, Any]](), dict(inputs)
    for modality in family.modalities:
        if text.pop(PIXELS[modality], None) is not None:
            name = f"get_{modality}_features"
            # Of the class: what stands around the method of a patched model need not tell.
            taken = inspect.signature(getattr(type(base), name)).parameters
            arguments = {key: inputs[key] for key in taken if key in inputs}
            calls.append((modality, _handed_on(model, getattr(base, name)), arguments))
    return calls, text


def _handed_on(model: Any, method: Callable[..., Any]) -> Callable[..., Any]:
    """A feature method whose output a forward will get: as inside ``generate``, nothing need be said of it."""

    @functools.wraps(method)
    def call(**arguments: Any) -> Any:
        session = session_of(model)
        if session is None:
            return method(**arguments)
        with generating(Generation(session, None)):
            return method(**arguments)

    return call


@torch.inference_mode()
def measure(model: Any, inputs: Mapping[str, Tensor], new_tokens: int = 8) -> Measurement:
    """Runs a model once, as it is: stock or patched.

    Args:
        model: a model.
        inputs: one batch.
        new_tokens: how many tokens are decoded, the first one included.
    """
    from transformers import DynamicCache

    watch, family = Stopwatch(model.device), find_family(model)
    projector = family.projector(family.base(model))
    project: list[tuple[float, float]] = []
    calls, text = stage_inputs(model, inputs)
    cache = DynamicCache(config=model.config.get_text_config())
    held = {CACHE: cache}
    with timed(watch, [(projector, "forward")], project):
        memory, began = Memory(model.device), watch.look()
        features = {kind: method(**arguments) for kind, method, arguments in calls}
        encoded, encoder_peak = watch.look(), memory.peak()
        memory = Memory(model.device)
        output = model(**text, mm_encoder_outputs=features, **held, use_cache=True, logits_to_keep=1)
        done, language_peak = watch.look(), memory.peak()
        # Layers that carry a state along, or share the keys of another, hold none.
        layers: list[Any] = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
        kv_bytes = sum(2 * layer.keys.numel() * layer.keys.element_size() for layer in layers)
        for _ in range(new_tokens - 1):
            output = model(input_ids=output.logits[:, -1:].argmax(-1), **held, use_cache=True)
        end = watch.look()
    wall, cpu = sum(p[0] for p in project), sum(p[1] for p in project)
    return Measurement(
        merged=session_of(model) is not None,
        encoder=Stage(encoded[0] - began[0] - wall, encoded[1] - began[1] - cpu, encoder_peak),
        projector=Stage(wall, cpu),
        language=Stage(done[0] - encoded[0], done[1] - encoded[1], language_peak),
        decode_s=(end[0] - done[0]) / (new_tokens - 1) if new_tokens > 1 else 0.0,
        kv_bytes=kv_bytes,
    )


def measure_alternating(
    model: Any,
    inputs: Mapping[str, Tensor],
    settings: dict[str, Any],
    rounds: int,
    new_tokens: int,
    warm_up: bool = True,
    progress: Progress = SILENT,
) -> tuple[list[Measurement], list[Measurement]]:
    """Runs a model as it is and patched in turn, after one warm-up each unless the process is warm already.

    Args:
        model: an unpatched model; unpatched afterwards.
        inputs: one batch.
        settings: arguments of ``patch``.
        rounds: runs of each kind.
        new_tokens: how many tokens are decoded, the first one included.
        warm_up: whether a run of each kind comes first that does not count.
        progress: hears of every run.

    Returns:
        Measurements unpatched, and with merging.
    """
    plain: list[Measurement] = []
    merged: list[Measurement] = []
    for _ in range(rounds + warm_up):
        plain.append(measure(model, inputs, new_tokens))
        progress.advance(1)
        patch(model, **settings)
        try:
            merged.append(measure(model, inputs, new_tokens))
            progress.advance(1)
        finally:
            unpatch(model)
    return plain[warm_up:], merged[warm_up:]
