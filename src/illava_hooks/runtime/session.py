"""The session of a patched model, and what one forward carries with it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from illava_hooks.config import MergeConfig
from illava_hooks.errors import PatchStateError
from illava_hooks.runtime.hooks import HookSet
from illava_hooks.runtime.provenance import Provenance
from illava_hooks.runtime.report import MergeReport
from illava_hooks.schedules import Modality

__all__ = ["KEY", "ForwardState", "MergeSession", "VisualRecord", "vision_provenance"]

#: Keyword under which per-forward objects travel through stock ``**kwargs``, and the extra key of feature outputs.
KEY = "illava_state"

logger = logging.getLogger("illava_hooks")


@dataclass(frozen=True, slots=True, eq=False)
class _Switch:
    """One open ``merging`` context."""

    enabled: bool


#: By session, the open switches in the order in which they were opened.
_switched: ContextVar[Mapping[int, tuple[_Switch, ...]]] = ContextVar("illava_switched", default={})  # noqa: B039  # never written to


@dataclass(slots=True)
class VisualRecord:
    """What the encoder stage learned about one image or video; travels on the feature output.

    Attributes:
        modality: ``"image"`` or ``"video"``.
        num_tokens: ``n``, visual tokens that the unpatched language model would get.
        keep: ``(n,)`` bool over the visual tokens that the language model would get; None: all.
        holder: ``(n,)`` int64, the kept token that stands for each; None: itself.
        segments: for each encoder segment its number of patches before, between and after the merges.
        sources: sparse ``(n, patches)`` weights of the source patches in each visual token, if tracked.
        layers: the merging layers between which ``segments`` counts.
        vision: by encoder layer, seats and weights after its merge, if tracked.
    """

    modality: Modality = field(compare=False)  # torch.testing can compare all but strings
    num_tokens: int
    keep: Tensor | None = None
    holder: Tensor | None = None
    segments: tuple[tuple[int, ...], ...] = ()
    layers: tuple[int, ...] = ()
    sources: Tensor | None = None
    vision: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


def vision_provenance(records: Sequence[VisualRecord]) -> Provenance:
    """What the encoder stage did to some images and videos, in their order."""
    num_patches = [sum(segment[0] for segment in record.segments) for record in records]
    return Provenance.of_vision([record.vision for record in records], num_patches)


@dataclass(slots=True, weakref_slot=True)
class ForwardState:
    """One forward of the base model that introduces visual tokens.

    Attributes:
        session: the session of the model.
        query: logical column of the scoring query, per sample ``(B,)`` or for all; or ``(B, N)`` bool, which
            tokens have labels; None: the last real token.
        placeholders: ``(B, N)`` bool masks by modality.
        records: the images and videos in prompt order, by modality.
    """

    session: MergeSession
    query: Tensor | int | None = None
    placeholders: dict[Modality, Tensor] = field(default_factory=dict)
    records: dict[Modality, list[VisualRecord]] = field(default_factory=dict)
    token: Any = None


class MergeSession:
    """The state of one patched model; ``patch`` returns it, ``session_of`` finds it.

    Attributes:
        config: the settings in use.
        root: the model that was patched, with or without its head.
        enabled: the switch for everybody; ``merging`` switches for one thread or task only.
    """

    def __init__(self, config: MergeConfig, root: Any) -> None:
        """Starts enabled."""
        self.config, self.root = config, root
        self.enabled = True
        self.hooks = HookSet()
        self._told: set[str] = set()
        self._report: MergeReport | None = None
        self._provenance: Provenance | None = None

    @property
    def active(self) -> bool:
        """Whether merging is on, here and now."""
        switches = _switched.get().get(id(self), ())
        return switches[-1].enabled if switches else self.enabled

    @contextlib.contextmanager
    def switched(self, enabled: bool) -> Iterator[None]:
        """Switches merging for this thread or task while the context is open."""
        switch = _Switch(bool(enabled))
        _switched.set({**_switched.get(), id(self): (*_switched.get().get(id(self), ()), switch)})
        try:
            yield
        finally:  # perhaps in another order, or in a context that never had the switch
            left = tuple(other for other in _switched.get().get(id(self), ()) if other is not switch)
            others = {key: open_ for key, open_ in _switched.get().items() if key != id(self)}
            _switched.set({**others, id(self): left} if left else others)

    @property
    def report(self) -> MergeReport:
        """Tokens, FLOPs and KV bytes of the last forward that brought visual tokens.

        Raises:
            PatchStateError: no such forward has run.
        """
        if self._report is None:
            raise PatchStateError(
                "no report yet: run the model on an image or a video first, with merging enabled and settings that "
                "remove something"
            )
        return self._report

    @property
    def provenance(self) -> Provenance:
        """Which source patches each surviving token of the last forward stands for.

        Raises:
            PatchStateError: not tracked, or no forward has run.
        """
        if not self.config.track:
            raise PatchStateError("track is False; call patch(model, ..., track=True) to keep provenance")
        if self._provenance is None:
            raise PatchStateError("no provenance yet: run the model on an image or a video with merging enabled first")
        return self._provenance

    def tell_once(self, message: str) -> None:
        """Logs a warning the first time that it is said in this session."""
        if message not in self._told:
            self._told.add(message)
            logger.warning(message)

    def note_vision(self, records: list[VisualRecord]) -> None:
        """Stores the provenance of an encoder run, should it be the whole call."""
        if self.config.track:
            self._provenance = vision_provenance(records)

    def finish(self, report: MergeReport, provenance: Provenance | None) -> None:
        """Stores what the last forward did."""
        self._report, self._provenance = report, provenance

    def __repr__(self) -> str:
        """The switch and the settings."""
        return f"MergeSession(enabled={self.enabled}, config={self.config})"

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry the settings and the hooks, not what the last forward left behind."""
        return {**self.__dict__, "_report": None, "_provenance": None}
