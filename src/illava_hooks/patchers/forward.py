"""What stands around the base model: it collects what the text model must know about visual tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextvars import ContextVar, Token
from typing import Any, get_args
from weakref import ReferenceType, ref

from transformers.utils.generic import ModelOutput

from illava_hooks.errors import PatchStateError
from illava_hooks.runtime.session import KEY, ForwardState, MergeSession, VisualRecord
from illava_hooks.schedules import Modality

__all__ = ["QUERY", "BaseModelHooks", "carried", "merges", "named_arguments", "running_forward"]

QUERY = "illava_query"


#: Weak: only the call itself keeps its state, since PyTorch runs no hook after Ctrl-C that could take it out.
_forward: ContextVar[ReferenceType[ForwardState] | None] = ContextVar("illava_forward", default=None)

_PIXELS: dict[Modality, str] = {"image": "pixel_values", "video": "pixel_values_videos"}


def running_forward() -> ForwardState | None:
    """The innermost forward that is running here and merges."""
    state = _forward.get()
    return None if state is None else state()


def carried(kwargs: dict[str, Any]) -> list[Modality]:
    """The modalities that a call brings."""
    ready = kwargs.get("mm_encoder_outputs") or {}
    return [m for m, pixels in _PIXELS.items() if kwargs.get(pixels) is not None or ready.get(m) is not None]


def merges(session: MergeSession, kwargs: dict[str, Any]) -> bool:
    """Whether a call merges anything."""
    modalities = carried(kwargs)
    return bool(modalities) and session.active and any(not session.config.schedule(m).is_identity for m in modalities)


def named_arguments(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Positional arguments by name."""
    if not args:
        return kwargs
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def with_stock_keys(output: Any) -> Any:
    """An output of a forward whose feature outputs carry their records as an attribute, no longer as a key.

    A key that no class declares is in the way where outputs are taken apart and put together again: pytrees, DDP.
    """
    if isinstance(output, tuple):
        return tuple(map(_with_stock_keys, output))
    if isinstance(output, ModelOutput):
        for name, part in list(output.items()):
            if (plain := _with_stock_keys(part)) is not part:
                output[name] = plain
    return output


def _with_stock_keys(part: Any) -> Any:
    if not (isinstance(part, ModelOutput) and KEY in part):
        return part
    plain = type(part)()
    for name, value in part.items():
        if name != KEY:
            plain[name] = value  # in the order of stock: tuples have no names
    setattr(plain, KEY, part[KEY])
    return plain


class BaseModelHooks:
    """Around the base model: collects what the text model must know about visual tokens."""

    def __init__(self, session: MergeSession, behind: Mapping[Modality, int]) -> None:
        """Belongs to one session; ``behind``: tokens that the model appends to each feature of a modality."""
        self.session, self.behind = session, behind

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Opens the state of a forward that merges; leaves other calls alone."""
        query = kwargs.pop(QUERY, None)
        named = named_arguments(module, args, kwargs)
        if not merges(self.session, named):
            return None
        forward = ForwardState(self.session, query)
        for modality, output in (named.get("mm_encoder_outputs") or {}).items():
            if output is not None:
                forward.records[modality] = self._records(modality, output)
        forward.token = _forward.set(ref(forward))
        return (), {**named, KEY: forward}

    def after(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Closes the state, also after an exception; feature outputs inside the output get their stock keys back."""
        forward: ForwardState | None = kwargs.get(KEY)
        if forward is not None and isinstance(forward.token, Token):
            _forward.reset(forward.token)
            forward.token = None
        return with_stock_keys(output)

    def features(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around ``get_*_features``: remembers the records for the forward that asked."""
        output = method(*args, **kwargs)
        forward = running_forward()
        if forward is not None and forward.session is self.session:
            modality: Modality = "video" if "video" in method.__name__ else "image"
            forward.records[modality] = self._records(modality, output)
        return output

    def placeholders(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around ``get_placeholder_mask``: a modality's mask is right in the call that carries its features."""
        masks = method(*args, **kwargs)
        forward = running_forward()
        if forward is not None and forward.session is self.session:
            call = inspect.signature(method).bind(*args, **kwargs).arguments
            for modality, mask in zip(get_args(Modality), masks, strict=True):
                if call.get(f"{modality}_features") is not None:
                    forward.placeholders[modality] = mask[..., 0]
        return masks

    def _records(self, modality: Modality, output: Any) -> list[VisualRecord]:
        """Records of a feature output; of one that carries none, every token counts as kept.

        Raises:
            PatchStateError: features and records do not fit each other.
        """
        known: list[VisualRecord] | None = getattr(output, KEY, None)
        lengths = [len(feature) + self.behind.get(modality, 0) for feature in output.pooler_output]
        if known is None:
            return [VisualRecord(modality, length) for length in lengths]
        if [record.num_tokens for record in known] != lengths:
            raise PatchStateError(
                f"mm_encoder_outputs[{modality!r}] has {len(lengths)} entries and {len(known)} records of what merged "
                f"in them; where beams or num_return_sequences repeat them, patch the model with its head; else drop "
                f"{KEY!r}"
            )
        return known
