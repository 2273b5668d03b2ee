"""How many patches survive each merging encoder layer: a pure function of shapes.

The run of the encoder plans by it before anything is computed, and so can others who must know a prompt's length
before they see a picture, such as a serving engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from illava_hooks.config import MergeConfig, MergeSchedule, Modality
from illava_hooks.engine.traits import EncoderTraits
from illava_hooks.methods import Method

__all__ = ["SegmentCounts", "encoder_counts", "keeps_quota", "shown_units"]


@dataclass(frozen=True, slots=True)
class SegmentCounts:
    """One tile, image or temporal slice on its way through the encoder.

    Attributes:
        units: units before, between and after the merges.
        short_of: how many patches were asked for in vain in some layer, since the segment had no more to give.
    """

    units: tuple[int, ...]
    short_of: int = 0


def encoder_counts(
    config: MergeConfig,
    modality: Modality,
    traits: EncoderTraits,
    num_patches: int,
    limit: Callable[[int], int] | None = None,
) -> SegmentCounts:
    """What a segment of ``num_patches`` patches becomes.

    Args:
        config: the settings.
        modality: whose schedule applies.
        traits: how patches belong together.
        num_patches: patches of the segment, without what stands in front of them.
        limit: how many of so many units can be removed at once, beside what the method can; asked before each merge.
    """
    schedule: MergeSchedule = config.schedule(modality)
    unit, granularity = traits.patches_per_unit, traits.granularity

    def most(num: int) -> int:
        own = num if limit is None else limit(num // unit) * unit
        return min(own, config.method.max_removed(num // unit) * unit, num - granularity)

    removed = schedule.encoder_removed(num_patches, granularity, most) if schedule.merges_in_encoder else []
    units = [num_patches // unit]
    for patches in removed:
        units.append(units[-1] - patches // unit)
    wish = schedule.vit_r // granularity * granularity if isinstance(schedule.vit_r, int) else 0
    return SegmentCounts(tuple(units), max((wish - patches for patches in removed), default=0))


def keeps_quota(method: Method, units: Sequence[int]) -> bool:
    """Whether what a layout shows of a tile and what it crops away merge apart.

    Matching in pairs cannot promise numbers, and one survivor is not enough for two parts.

    Args:
        method: the method in use.
        units: of the tile before, between and after the merges.
    """
    return method.quota and method.layout == "aligned" and method.merge != "bipartite" and units[-1] > 1


def shown_units(units: Sequence[int], shown: int) -> tuple[int, ...]:
    """How many units of a tile are shown, before, between and after the merges, where its parts merge apart.

    What the layout shows keeps its share of the survivors, rounded up, and what it crops away keeps one at least: so
    the length of the prompt follows from shapes.

    Args:
        units: of the whole tile before, between and after the merges; at least 2 everywhere.
        shown: units that are shown before any merge.

    Returns:
        The counts of the shown units; those of the cropped ones are what is left of ``units``.
    """
    if shown in (0, units[0]):
        return tuple(n if shown else 0 for n in units)
    # Integers all the way: a float would round some quotients up to the next whole number.
    return tuple(min(-(-shown * n // units[0]), n - 1) for n in units)
