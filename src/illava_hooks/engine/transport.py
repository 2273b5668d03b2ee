"""What travels through one forward, and under which keyword.

| keyword | payload | put in by | taken out by |
|---|---|---|---|
| ``QUERY`` | ``Asked`` | hook of the model with its head | hook of the base model |
| ``FORWARD`` | ``ForwardState`` | hook of the base model | hook of the text model; feature methods drop it |
| ``ENCODER_RUN`` | ``EncoderRun`` | wrappers of the feature methods | hook of each encoder layer, of the tower |
| ``MERGE_STEP`` | ``MergeStep`` | hook of an encoder layer | the layer's own forward |
| ``DECODER_CALL`` | ``DecoderCall`` | hook of the text model | hook of each decoder layer |
| ``hookset.CALLED`` | the module | hooks of head and base model | ``CallForward`` in place of their ``forward`` |
| ``records.RECORDS`` | ``VisualRecord`` list | wrappers of the feature methods, on outputs | hook of the base model |

Where stock code hands no keyword arguments on, context variables carry the rest, each for one thread or task:
``running_forward`` (for the wrapped feature methods), ``current_run`` (for what stock calls inside of them),
``current_generation`` (for forwards inside ``generate``) and the open tap of ``attention_tap``. A fifth one
holds the switches of ``session``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import Any
from weakref import ReferenceType, ref

from torch import Tensor

from illava_hooks.config import Modality
from illava_hooks.engine.decoder import DecoderRun
from illava_hooks.engine.encoder import EncoderRun
from illava_hooks.engine.records import VisualRecord
from illava_hooks.engine.scoring_query import ScoringQuery
from illava_hooks.engine.session import MergeSession

__all__ = [
    "DECODER_CALL",
    "ENCODER_RUN",
    "FORWARD",
    "MERGE_STEP",
    "QUERY",
    "Asked",
    "ForwardState",
    "Generation",
    "begin_forward",
    "current_generation",
    "current_run",
    "end_forward",
    "generating",
    "in_features",
    "running",
    "running_forward",
]

QUERY = "illava_query"
FORWARD = "illava_forward"
ENCODER_RUN = "illava_encoder_run"
MERGE_STEP = "illava_merge_step"
DECODER_CALL = "illava_decoder_call"


@dataclass(slots=True)
class Asked:
    """What the model with its head says of a forward that merges.

    Attributes:
        query: which token scores.
        is_heard: whether the base model took it: one that was put in later does not.
    """

    query: ScoringQuery
    is_heard: bool = False


@dataclass(slots=True, weakref_slot=True)
class ForwardState:
    """One forward of the base model that introduces visual tokens.

    Attributes:
        session: the session of the model.
        query: which token scores in the language model.
        placeholders: ``(B, N)`` bool masks by modality.
        records: the images and videos in prompt order, by modality.
        run: what the language stage did, once it began.
        encoder: the run of a vision encoder that the forward calls past the feature methods, while it is called.
    """

    session: MergeSession
    query: ScoringQuery
    placeholders: dict[Modality, Tensor] = field(default_factory=dict)
    records: dict[Modality, list[VisualRecord]] = field(default_factory=dict)
    run: DecoderRun | None = None
    encoder: EncoderRun | None = None
    _token: Token[Any] | None = None


#: Weak: only the call itself keeps its state, since PyTorch runs no hook after Ctrl-C that could take it out.
_forward: ContextVar[ReferenceType[ForwardState] | None] = ContextVar("illava_forward", default=None)


def running_forward() -> ForwardState | None:
    """The innermost forward that is running here and merges."""
    state = _forward.get()
    return None if state is None else state()


def begin_forward(state: ForwardState) -> None:
    """Makes ``state`` the running one of this thread or task."""
    state._token = _forward.set(ref(state))


def end_forward(state: ForwardState) -> None:
    """Brings back what ran around it."""
    if state._token is not None:
        _forward.reset(state._token)
        state._token = None


#: The run of the vision encoder that this thread is in; False in a feature method that does not merge.
_run: ContextVar[EncoderRun | bool | None] = ContextVar("illava_encoder", default=None)


def current_run() -> EncoderRun | None:
    """The run of the vision encoder that is going on here."""
    run = _run.get()
    if run is None:
        forward = running_forward()
        return None if forward is None else forward.encoder
    return None if isinstance(run, bool) else run


def in_features() -> bool:
    """Whether a feature method of a patched model is running here, merging or not."""
    return _run.get() is not None


@contextmanager
def running(run: EncoderRun | None) -> Iterator[None]:
    """A feature method runs, with ``run`` or without merging."""
    token = _run.set(False if run is None else run)
    try:
        yield
    finally:
        _run.reset(token)


@dataclass(frozen=True, slots=True)
class Generation:
    """What ``generate`` of a model was given: ids ``(B, N)``, if any."""

    session: MergeSession
    ids: Tensor | None


_generation: ContextVar[Generation | None] = ContextVar("illava_generation", default=None)


def current_generation() -> Generation | None:
    """The call of ``generate`` of a patched model that this thread is in."""
    return _generation.get()


@contextmanager
def generating(generation: Generation) -> Iterator[None]:
    """Makes ``generation`` the current one of this thread or task."""
    token = _generation.set(generation)
    try:
        yield
    finally:
        _generation.reset(token)
