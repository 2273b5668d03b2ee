"""What can be chosen: method, layers, and how the stages share the cut. How much is cut follows from the cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

__all__ = ["SHARES", "Candidate", "Space", "settings_of"]

#: The encoder leaves ``keep ** share``: 0 is the language model alone, 1/2 the square root, 1 the encoder alone.
SHARES = (0.0, 0.15, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0)
#: Layers that merge in one stage, at most.
MOST_LAYERS = 4


@dataclass(frozen=True, slots=True)
class Candidate:
    """Everything but the amounts.

    Attributes:
        method: its name.
        vit_layers: 0-based encoder layers.
        llm_layers: 0-based decoder layers.
        share: of ``SHARES``; 0 where the encoder has no layers, 1 where the decoder has none.
    """

    method: str
    vit_layers: tuple[int, ...]
    llm_layers: tuple[int, ...]
    share: float

    def __post_init__(self) -> None:
        """A stage that does nothing has no layers, and one without layers does nothing."""
        object.__setattr__(self, "vit_layers", () if self.share == 0 else self.vit_layers)
        object.__setattr__(self, "llm_layers", () if self.share == 1 else self.llm_layers)
        if not self.vit_layers:
            object.__setattr__(self, "share", 0.0)
        elif not self.llm_layers:
            object.__setattr__(self, "share", 1.0)


def settings_of(candidate: Candidate, keep: float) -> dict[str, Any]:
    """Arguments of ``patch``, but for the method.

    Args:
        candidate: where, and how it is shared.
        keep: fraction of visual tokens left behind both stages, in (0, 1); each layer of a stage removes an equal
            fraction of what reaches it.
    """
    vit, llm = candidate.vit_layers, candidate.llm_layers
    return {
        "vit_layers": list(vit),
        "vit_r": round(1 - keep ** (candidate.share / len(vit)), 6) if vit else 0,
        "llm_layers": list(llm),
        "llm_ratio": round(keep ** ((1 - candidate.share) / len(llm)), 6) if llm else 1.0,
    }


class Space:
    """All candidates of one model."""

    def __init__(self, methods: Sequence[str], vit_layers: Sequence[int], llm_layers: Sequence[int]) -> None:
        """Knows what may be combined.

        Args:
            methods: their names.
            vit_layers: the encoder layers that can merge, ascending; none: its stage cannot.
            llm_layers: the decoder layers that can, likewise.
        """
        self.methods, self.vit_layers, self.llm_layers = list(methods), list(vit_layers), list(llm_layers)
        self.shares = [share for share in SHARES if (share or llm_layers) and (share < 1 or vit_layers)]
        self.shares = self.shares if vit_layers and llm_layers else [0.0] if llm_layers else [1.0]

    def draw(self, rng: np.random.Generator) -> Candidate:
        """Any candidate."""
        method, share = self.methods[rng.integers(len(self.methods))], self.shares[rng.integers(len(self.shares))]
        return Candidate(method, _window(rng, self.vit_layers), _window(rng, self.llm_layers), share)

    def change(self, candidate: Candidate, rng: np.random.Generator) -> Candidate:
        """A neighbour: one or two of its choices are others, layers and share by a step."""
        for choice in rng.choice(4, size=rng.integers(1, 3), replace=False):
            if choice == 0:
                candidate = replace(candidate, method=self.methods[rng.integers(len(self.methods))])
            elif choice == 1:
                candidate = self._share(candidate, rng)
            elif choice == 2 and candidate.vit_layers:
                candidate = replace(candidate, vit_layers=_step(rng, candidate.vit_layers, self.vit_layers))
            elif choice == 3 and candidate.llm_layers:
                candidate = replace(candidate, llm_layers=_step(rng, candidate.llm_layers, self.llm_layers))
        return candidate

    def _share(self, candidate: Candidate, rng: np.random.Generator) -> Candidate:
        place = min(range(len(self.shares)), key=lambda index: abs(self.shares[index] - candidate.share))
        share = self.shares[int(np.clip(place + rng.choice((-1, 1)), 0, len(self.shares) - 1))]
        # A stage that comes back has no layers to remember.
        vit = candidate.vit_layers or _window(rng, self.vit_layers)
        llm = candidate.llm_layers or _window(rng, self.llm_layers)
        return Candidate(candidate.method, vit, llm, share)


def _window(rng: np.random.Generator, layers: Sequence[int]) -> tuple[int, ...]:
    """Some layers, one behind the other or every second one."""
    if not layers:
        return ()
    count = int(rng.integers(1, min(MOST_LAYERS, len(layers)) + 1))
    stride = int(rng.integers(1, 3)) if (count - 1) * 2 < len(layers) else 1
    start = int(rng.integers(len(layers) - (count - 1) * stride))
    return tuple(layers[start : start + (count - 1) * stride + 1 : stride])


def _step(rng: np.random.Generator, chosen: tuple[int, ...], layers: Sequence[int]) -> tuple[int, ...]:
    """The chosen layers moved by one or two places, or one more or one fewer of them."""
    places = [layers.index(layer) for layer in chosen]
    kind = int(rng.integers(4))
    if kind < 2:
        by = int(rng.choice((-2, -1, 1, 2)))
        by = max(-places[0], min(by, len(layers) - 1 - places[-1]))
        return tuple(layers[place + by] for place in places)
    if kind == 2 and len(places) > 1:
        del places[int(rng.integers(len(places)))]
    elif kind == 3 and len(places) < MOST_LAYERS:
        free = [place for place in range(len(layers)) if place not in places]
        near = [place for place in free if any(abs(place - other) <= 2 for other in places)]
        if near:
            places = sorted([*places, near[int(rng.integers(len(near)))]])
    return tuple(layers[place] for place in places)
