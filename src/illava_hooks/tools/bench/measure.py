"""One prefill and some decode steps, timed stage by stage; alternately without and with merging."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from illava_hooks.api import merging
from illava_hooks.patchers.language.run import DecoderPass
from illava_hooks.patchers.vision.run import EncoderPass

__all__ = ["Measurement", "measure", "measure_alternating"]

_FEATURES = {"pixel_values": ("image", "get_image_features"), "pixel_values_videos": ("video", "get_video_features")}
_PIXEL_KEYS = ("pixel_values", "image_sizes", "batch_num_images", "image_grid_thw")
_VIDEO_KEYS = ("pixel_values_videos", "video_grid_thw")


@dataclass(frozen=True, slots=True)
class Measurement:
    """One run. Times are seconds, sizes bytes.

    Attributes:
        merged: whether merging was on.
        encoder_s: vision encoder.
        projector_s: projector or patch merger.
        language_s: prefill of the language model, from embeddings to the logits of the last position.
        merge_s: of these, deciding and applying merges; its products and copies are asynchronous on a GPU, where it
            is measured with synchronisation in a run of its own.
        decode_s: per further token.
        cpu_s: CPU seconds of the prefill over all threads; 0 on a GPU.
        peak_bytes: highest memory in use above the weights, over the prefill and the decode steps.
        kv_bytes: keys and values after the prefill.
    """

    merged: bool
    encoder_s: float
    projector_s: float
    language_s: float
    merge_s: float
    decode_s: float
    cpu_s: float
    peak_bytes: int
    kv_bytes: int

    @property
    def prefill_s(self) -> float:
        """Seconds until the first token."""
        return self.encoder_s + self.projector_s + self.language_s


class Stopwatch:
    """Wall-clock time of a device."""

    def __init__(self, device: torch.device) -> None:
        """Waits for the device at every look, if it is asynchronous."""
        self.device = device

    def now(self) -> float:
        """Seconds."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@contextlib.contextmanager
def _timed(watch: Stopwatch, calls: list[tuple[Any, str]], total: dict[str, float]) -> Iterator[None]:
    """Adds up the time that methods take; they are put back at the end."""

    def wrap(function: Any) -> Any:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = watch.now()
            try:
                return function(*args, **kwargs)
            finally:
                total["s"] = total.get("s", 0.0) + watch.now() - began

        return timed

    stock = [(owner, name, getattr(owner, name)) for owner, name in calls]
    try:
        for owner, name, function in stock:
            setattr(owner, name, wrap(function))
        yield
    finally:
        for owner, name, function in stock:
            if isinstance(owner, type):
                setattr(owner, name, function)
            else:
                delattr(owner, name)


class _Memory:
    """Highest memory in use since the start, above what was in use then."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.start = torch.cuda.memory_allocated(device)
        else:
            with contextlib.suppress(OSError):  # only Linux has it
                Path("/proc/self/clear_refs").write_text("5")
            self.start = self._status("VmRSS")

    def peak(self) -> int:
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device)) - self.start
        return max(0, self._status("VmHWM") - self.start)

    def _status(self, field: str) -> int:
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return 0
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), 0)


@torch.inference_mode()
def measure(model: Any, inputs: Mapping[str, Tensor], merged: bool, new_tokens: int = 8) -> Measurement:
    """Runs a patched model once.

    Args:
        model: a patched model.
        inputs: one batch.
        merged: whether merging is on.
        new_tokens: how many tokens are decoded, the first one included.
    """
    from transformers import DynamicCache

    watch, base = Stopwatch(model.device), model.model
    projector = base.multi_modal_projector if hasattr(base, "multi_modal_projector") else base.visual.merger
    merge_calls = [(EncoderPass, "merge"), (DecoderPass, "rank"), (DecoderPass, "merge")]
    projector_time: dict[str, float] = {}
    merge_time: dict[str, float] = {}
    memory = _Memory(model.device)
    text = {k: v for k, v in inputs.items() if k not in _PIXEL_KEYS + _VIDEO_KEYS or k.endswith("_grid_thw")}
    cache = DynamicCache(config=model.config.get_text_config())
    with (
        merging(model, merged),
        _timed(watch, [(projector, "forward")], projector_time),
        _timed(watch, merge_calls, merge_time),
    ):
        cpu, began = time.process_time(), watch.now()
        features = {
            kind: getattr(base, method)(**{k: v for k, v in inputs.items() if k in keys})
            for (pixels, (kind, method)), keys in zip(_FEATURES.items(), (_PIXEL_KEYS, _VIDEO_KEYS), strict=True)
            if pixels in inputs
        }
        encoded = watch.now()
        output = model(**text, mm_encoder_outputs=features, past_key_values=cache, use_cache=True, logits_to_keep=1)
        done, cpu = watch.now(), time.process_time() - cpu
        layers: list[Any] = list(cache.layers)
        kv_bytes = sum(2 * layer.keys.numel() * layer.keys.element_size() for layer in layers)
        for _ in range(new_tokens - 1):
            output = model(input_ids=output.logits[:, -1:].argmax(-1), past_key_values=cache, use_cache=True)
        end = watch.now()
    project = projector_time.get("s", 0.0)
    return Measurement(
        merged=merged,
        encoder_s=encoded - began - project,
        projector_s=project,
        language_s=done - encoded,
        merge_s=merge_time.get("s", 0.0) if merged else 0.0,
        decode_s=(end - done) / (new_tokens - 1) if new_tokens > 1 else 0.0,
        cpu_s=cpu if model.device.type == "cpu" else 0.0,
        peak_bytes=memory.peak(),
        kv_bytes=kv_bytes,
    )


def measure_alternating(
    model: Any, inputs: Mapping[str, Tensor], rounds: int, new_tokens: int
) -> tuple[list[Measurement], list[Measurement]]:
    """Runs without and with merging in turn, after one warm-up each.

    Returns:
        Measurements without, and with merging.
    """
    runs: dict[bool, list[Measurement]] = {False: [], True: []}
    for number in range(rounds + 1):
        for merged in (False, True):
            found = measure(model, inputs, merged, new_tokens)
            if number:
                runs[merged].append(found)
    return runs[False], runs[True]
