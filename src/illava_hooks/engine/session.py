"""The session of a patched model: its settings, its switch, and what its last forward left."""

from __future__ import annotations

import contextlib
import copy
import importlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast, get_args

from illava_hooks.config import MergeConfig, Modality, describe
from illava_hooks.engine.hookset import Hook, HookSet
from illava_hooks.engine.provenance import Provenance
from illava_hooks.engine.report import MergeReport
from illava_hooks.errors import MergeConfigError, NotYet

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["MergeSession", "SessionHook"]

logger = logging.getLogger("illava_hooks")

#: How far from ``keep`` the fraction left of an image or video may be without a word.
KEEP_WITHIN = 0.02

_NOT_TRACKED = "track is False; call patch(model, ..., track=True) to keep provenance"
_NO_PROVENANCE = "no provenance yet: run the model on an image or a video with merging enabled first"
_NO_REPORT = (
    "no report yet: run the model on an image or a video first, with merging enabled and settings that remove "
    "something"
)


@dataclass(frozen=True, slots=True, eq=False)
class _Switch:
    """One open ``merging`` context."""

    enabled: bool


#: By session, the open switches in the order in which they were opened.
_switched: ContextVar[Mapping[int, tuple[_Switch, ...]]] = ContextVar("illava_switched", default={})  # noqa: B039  # never written to


class SessionHook(Hook):
    """A hook that needs its session, on a part of a model that others may copy."""

    def __init__(self, session: MergeSession) -> None:
        """Belongs to one session."""
        self.session = session

    def __deepcopy__(self, memo: dict[int, Any]) -> SessionHook:
        """With the whole model the session is copied; a copy of a part alone, as adapters make it, stays with it."""
        hook = copy.copy(self)
        if id(self.session.root) in memo:
            hook.session = copy.deepcopy(self.session, memo)
        return hook


def _checked_switch(enabled: object) -> bool:
    """True or False, NumPy's too; any text would be true, "off" included."""
    if type(enabled).__name__ not in ("bool", "bool_"):
        raise MergeConfigError(f"enabled is {enabled!r}; give True or False")
    return bool(enabled)


class MergeSession:
    """The state of one patched model; ``patch`` returns it, ``session_of`` finds it.

    Attributes:
        config: the settings in use.
        root: the model that was patched, with or without its head.
    """

    def __init__(self, config: MergeConfig, root: Any) -> None:
        """Starts enabled."""
        self.config, self.root = config, root
        self._enabled = True
        self.hooks = HookSet()
        self._warned: set[str] = set()
        self._report: MergeReport | None = None
        self._provenance: Provenance | None = None
        for told in config.out_of_reach():
            self.warn_once(told)

    @property
    def enabled(self) -> bool:
        """The switch for everybody, beside ``merging`` for one thread or task.

        What is neither True nor False raises ``MergeConfigError``.
        """
        return self._enabled

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        """Sets it."""
        self._enabled = _checked_switch(enabled)

    @property
    def active(self) -> bool:
        """Whether merging is on, here and now."""
        switches = _switched.get().get(id(self), ())
        return switches[-1].enabled if switches else self.enabled

    @contextlib.contextmanager
    def switched(self, enabled: bool) -> Iterator[None]:
        """Switches merging for this thread or task while the context is open."""
        switch = _Switch(_checked_switch(enabled))
        _switched.set({**_switched.get(), id(self): (*_switched.get().get(id(self), ()), switch)})
        try:
            yield
        finally:  # perhaps in another order, or in a context that never had the switch
            left = tuple(other for other in _switched.get().get(id(self), ()) if other is not switch)
            others = {key: open_ for key, open_ in _switched.get().items() if key != id(self)}
            _switched.set({**others, id(self): left} if left else others)

    @property
    def report(self) -> MergeReport:
        """Tokens, FLOPs and KV bytes of the last forward that brought visual tokens while merging was on.

        Forwards with merging off leave it as it is, and so does ``unpatch``: a comparison can print it at its end.
        Before there was one it is false, and its attributes raise ``PatchStateError``.
        """
        return self._report or cast(MergeReport, NotYet(_NO_REPORT))

    @property
    def provenance(self) -> Provenance:
        """Which source patches each surviving token of the last forward stands for.

        Where it is not tracked, or no forward has run, it is false, and its attributes raise ``PatchStateError``.
        """
        if not self.config.track:
            return cast(Provenance, NotYet(_NOT_TRACKED))
        return self._provenance or cast(Provenance, NotYet(_NO_PROVENANCE))

    def show(self, pictures: Any, question: str | None = None, processor: Any = None) -> list[Image]:
        """Draws what merging does to pictures: where tokens are left after each merging layer, and who took up what.

        The model is asked twice, outside of any forward of yours; report, provenance and settings stay as they are.

        Args:
            pictures: a picture (PIL, or an array ``(H, W, 3)``), several PIL pictures in one prompt, the frames
                ``(F, H, W, 3)`` of a video, or the path of an image, a folder or a video.
            question: what is asked: it decides what the language model keeps. None: a general question.
            processor: the model's; None: loaded from where the model was loaded.

        Returns:
            One picture for each image, an animation for a video; notebooks show them all.

        Raises:
            PatchStateError: the model is not patched any more.
            InputError: the pictures cannot be read, there is no processor, or models of this kind cannot be drawn.
            MergeConfigError: nothing merges with these settings, or the method's survivors do not stay where they are.
        """
        # By name: drawing is a tool, floors above, and loaded by nobody who does not ask for pictures.
        shown: list[Image] = importlib.import_module("illava_hooks.tools.show").show(
            self, pictures, question, processor
        )
        return shown

    def warn_once(self, message: str) -> None:
        """Logs a warning the first time that it is said in this session."""
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)

    def tell_missed(self, visuals: Sequence[tuple[Modality, int]], lengths: Sequence[int]) -> None:
        """Says once where what is left of an image or video is not the fraction that ``keep`` asks for.

        Args:
            visuals: the modality of each, and its tokens without merging.
            lengths: what is left of each.
        """
        for (modality, whole), left in zip(visuals, lengths, strict=True):
            keep = self.config.schedule(modality).keep
            if keep is not None and left and abs(left / whole - keep) > KEEP_WITHIN:
                self.warn_once(
                    f"keep is {keep:.4g}, and of some {modality}s another fraction is left, by more than "
                    f"{KEEP_WITHIN}: they have too few tokens, or tokens that these layers cannot remove; see "
                    "session.report"
                )

    def finish(self, report: MergeReport | None, provenance: Provenance | None) -> None:
        """Stores what the last forward did; without a report, what an encoder run alone did."""
        self._report, self._provenance = report or self._report, provenance

    def __repr__(self) -> str:
        """The method, the switch, and the settings of images and, where they differ, of videos."""
        image, video = (describe(self.config.schedule(modality)) for modality in get_args(Modality))
        said = image if image == video else f"images: {image}; videos: {video}"
        return f"<MergeSession {self.config.method.name}, {'on' if self.enabled else 'off'}; {said}>"

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry the settings and the hooks, not what the last forward left behind."""
        return {**self.__dict__, "_report": None, "_provenance": None}
