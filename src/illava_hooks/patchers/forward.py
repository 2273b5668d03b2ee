"""What stands around a whole call: ``generate``, the model with its head, and the base model inside."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar, Token
from typing import Any, get_args

import torch
from torch import Tensor

from illava_hooks.errors import PatchStateError
from illava_hooks.runtime.session import KEY, ForwardState, MergeSession, VisualRecord
from illava_hooks.schedules import Modality

__all__ = ["BaseModelHooks", "TopModelHooks"]

QUERY = "illava_query"

_forward: ContextVar[ForwardState | None] = ContextVar("illava_forward", default=None)
_prompt_end: ContextVar[int | None] = ContextVar("illava_prompt_end", default=None)

_PIXELS: dict[Modality, str] = {"image": "pixel_values", "video": "pixel_values_videos"}


def _carried(kwargs: dict[str, Any]) -> list[Modality]:
    """The modalities that a call brings."""
    ready = kwargs.get("mm_encoder_outputs") or {}
    return [m for m, pixels in _PIXELS.items() if kwargs.get(pixels) is not None or ready.get(m) is not None]


def _merges(session: MergeSession, kwargs: dict[str, Any]) -> bool:
    """Whether a call merges anything."""
    modalities = _carried(kwargs)
    return bool(modalities) and session.active and any(not session.config.schedule(m).is_identity for m in modalities)


def _named(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Positional arguments by name."""
    if not args:
        return kwargs
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


class TopModelHooks:
    """Around the model with its head: which query scores."""

    def __init__(self, session: MergeSession) -> None:
        """Belongs to one session."""
        self.session = session

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hands the scoring query down: the last token before the first label or before the first kept logit."""
        named = _named(module, args, kwargs)
        if not _merges(self.session, named):
            return None
        end = _without_cache(named)
        query = _first_asked(named) if end is None else end
        return None if query is None else ((), {**named, QUERY: query})

    def generate(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around ``generate``: without a cache every step sees the whole sequence, but the prompt's end scores."""
        if not self.session.active:
            return method(*args, **kwargs)
        _refuse_chunks(method, kwargs)
        prompt = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        prompt = kwargs.get("inputs_embeds") if prompt is None else prompt
        token = _prompt_end.set(prompt.shape[1] if isinstance(prompt, Tensor) else None)
        try:
            return method(*args, **kwargs)
        finally:
            _prompt_end.reset(token)

    def features(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around ``get_*_features``: a tuple holds what stock puts into it, without our records."""
        output = method(*args, **kwargs)
        if not isinstance(output, tuple):
            return output
        return tuple(part for part in output if not (isinstance(part, list) and _is_records(part)))

    def expand(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around ``_expand_multimodal_outputs``: records follow their features to beams and return sequences."""
        call = inspect.signature(method).bind(*args, **kwargs)
        outputs = call.arguments["mm_encoder_output"]
        known = {m: out[KEY] for m, out in outputs.items() if out is not None and KEY in out}
        shadow = {m: _Shadow(outputs[m].pooler_output) for m in known}
        result = method(*args, **kwargs)
        call.arguments["mm_encoder_output"] = shadow
        method(*call.args, **call.kwargs)
        for modality, records in known.items():
            order = [int(row.flatten()[0]) for row in shadow[modality].pooler_output]
            result[modality][KEY] = [records[index] for index in order]
        return result


def _is_records(part: list[Any]) -> bool:
    return any(isinstance(item, VisualRecord) for item in part)


class _Shadow:
    """Stands in for a feature output: each image's features are its own number."""

    def __init__(self, features: Any) -> None:
        numbers = [torch.full((len(feature), 1), index) for index, feature in enumerate(features)]
        self.pooler_output: Any = torch.stack(numbers) if isinstance(features, Tensor) else numbers


def _refuse_chunks(generate: Any, kwargs: dict[str, Any]) -> None:
    own = getattr(generate.__self__, "generation_config", None)
    config = kwargs.get("generation_config") or own
    size = kwargs.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
    if size is not None and _carried(kwargs):
        raise PatchStateError(
            f"prefill_chunk_size is {size}; the end of a chunk is not the end of the prompt, whose query decides what "
            "merges; use prefill_chunk_size=None or merging(model, False)"
        )


def _first_asked(named: dict[str, Any]) -> Tensor | int | None:
    """The first position whose logits matter, by labels or ``logits_to_keep``; None: not told."""
    labels, keep = named.get("labels"), named.get("logits_to_keep", 0)
    if labels is not None:
        asked = labels != -100
        first: Tensor = asked.to(torch.int64).argmax(1) - 1
        # A row without labels is scored by its end.
        return torch.where(asked.any(1), first.clamp_min(0), labels.shape[1] - 1)
    if isinstance(keep, Tensor):
        return keep[:1].expand(_batch(named))
    if keep:
        return int(_length(named) - keep)
    return None


def _length(named: dict[str, Any]) -> int:
    ids = named.get("input_ids")
    return int((named["inputs_embeds"] if ids is None else ids).shape[1])


def _batch(named: dict[str, Any]) -> int:
    ids = named.get("input_ids")
    return int((named["inputs_embeds"] if ids is None else ids).shape[0])


class BaseModelHooks:
    """Around the base model: collects what the text model must know about visual tokens."""

    def __init__(self, session: MergeSession) -> None:
        """Belongs to one session."""
        self.session = session

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Opens the state of a forward that merges; leaves other calls alone."""
        query = kwargs.pop(QUERY, None)
        named = _named(module, args, kwargs)
        if not _merges(self.session, named):
            return None
        forward = ForwardState(self.session, query)
        for modality, output in (named.get("mm_encoder_outputs") or {}).items():
            if output is not None:
                forward.records[modality] = _records(modality, output)
        forward.token = _forward.set(forward)
        return (), {**named, KEY: forward}

    def after(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Closes the state, also after an exception."""
        forward: ForwardState | None = kwargs.get(KEY)
        if forward is not None and isinstance(forward.token, Token):
            _forward.reset(forward.token)
            forward.token = None

    def features(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around ``get_*_features``: remembers the records for the forward that asked."""
        output = method(*args, **kwargs)
        forward = _forward.get()
        if forward is not None and forward.session is self.session:
            modality: Modality = "video" if "video" in method.__name__ else "image"
            forward.records[modality] = _records(modality, output)
        return output

    def placeholders(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around ``get_placeholder_mask``: a modality's mask is right in the call that carries its features."""
        masks = method(*args, **kwargs)
        forward = _forward.get()
        if forward is not None and forward.session is self.session:
            call = inspect.signature(method).bind(*args, **kwargs).arguments
            for modality, mask in zip(get_args(Modality), masks, strict=True):
                if call.get(f"{modality}_features") is not None:
                    forward.placeholders[modality] = mask[..., 0]
        return masks


def _without_cache(named: dict[str, Any]) -> int | None:
    """The prompt's last token when ``generate`` runs without a cache and the sequence has grown."""
    end = _prompt_end.get()
    if end is None or named.get("past_key_values") is not None or _length(named) <= end:
        return None
    return end - 1


def _records(modality: Modality, output: Any) -> list[VisualRecord]:
    """Records of a feature output; of one that carries none, every token counts as kept."""
    known: list[VisualRecord] | None = output.get(KEY)
    features = output.pooler_output
    if known is not None and [r.num_tokens for r in known] == [len(f) for f in features]:
        return known
    return [VisualRecord(modality, len(feature)) for feature in features]
