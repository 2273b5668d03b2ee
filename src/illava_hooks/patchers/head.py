"""What stands around the model with its head: ``generate``, labels, beams."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from illava_hooks.errors import PatchStateError
from illava_hooks.patchers.forward import QUERY, carried, merges, named_arguments
from illava_hooks.runtime.releases import cache_of
from illava_hooks.runtime.session import KEY, MergeSession, VisualRecord

__all__ = ["TopModelHooks"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What ``generate`` of a model was given: ids ``(B, N)``."""

    session: MergeSession
    ids: Tensor

    def began(self, session: MergeSession, ids: Tensor | None) -> bool:
        """Whether a longer sequence of the same model goes on from this prompt, and is not another call's."""
        length = self.ids.shape[1]
        if self.session is not session or ids is None or ids.shape[1] <= length:
            return False
        first_beams = ids[:: max(1, len(ids) // len(self.ids)), :length]
        return torch.equal(first_beams, self.ids)


_prompt: ContextVar[Prompt | None] = ContextVar("illava_prompt", default=None)


class TopModelHooks:
    """Around the model with its head: which query scores."""

    def __init__(self, session: MergeSession) -> None:
        """Belongs to one session."""
        self.session = session

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hands the scoring query down: the last token before the first label or before the first kept logit."""
        named = named_arguments(module, args, kwargs)
        if not merges(self.session, named):
            return None
        end = _without_cache(self.session, named)
        query = _first_asked(named) if end is None else end
        return None if query is None else ((), {**named, QUERY: query})

    def generate(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around ``generate``: without a cache every step sees the whole sequence, but the prompt's end scores."""
        if not self.session.active:
            return method(*args, **kwargs)
        _refuse_chunks(method, kwargs)
        prompt = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        token = _prompt.set(Prompt(self.session, prompt) if isinstance(prompt, Tensor) else None)
        try:
            return method(*args, **kwargs)
        finally:
            _prompt.reset(token)

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
        known = {m: records for m, out in outputs.items() if (records := getattr(out, KEY, None)) is not None}
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
    if size is not None and carried(kwargs):
        raise PatchStateError(
            f"prefill_chunk_size is {size}; the end of a chunk is not the end of the prompt, whose query decides what "
            "merges; use prefill_chunk_size=None or merging(model, False)"
        )


def _first_asked(named: dict[str, Any]) -> Tensor | int | None:
    """The first position whose logits matter by ``logits_to_keep``, or which have labels; None: not told."""
    labels, keep = named.get("labels"), named.get("logits_to_keep", 0)
    if labels is not None:
        labelled: Tensor = labels != -100
        return labelled
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


def _without_cache(session: MergeSession, named: dict[str, Any]) -> int | None:
    """The prompt's last token when ``generate`` runs without a cache and the sequence has grown."""
    prompt = _prompt.get()
    if prompt is None or cache_of(named) is not None:
        return None
    return prompt.ids.shape[1] - 1 if prompt.began(session, named.get("input_ids")) else None
