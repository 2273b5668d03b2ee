"""What the encoder stage learned about each image and video, and how it travels on feature outputs.

``generate`` runs the encoder before the prefill and moves its output between devices, and beams repeat it: only an
entry of the output itself survives that. Where outputs are handed to the user they carry the records as an
attribute instead, since a key that no class declares is in the way of pytrees and DDP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers.utils.generic import ModelOutput

from illava_hooks.config import Modality
from illava_hooks.engine.provenance import Provenance

__all__ = [
    "RECORDS",
    "VisualRecord",
    "attach",
    "records_of",
    "vision_provenance",
    "with_stock_keys",
    "without_records",
]

#: The extra entry of feature outputs.
RECORDS = "illava_records"


@dataclass(slots=True)
class VisualRecord:
    """What the encoder stage learned about one image or video.

    Attributes:
        modality: ``"image"`` or ``"video"``.
        num_tokens: ``n``, visual tokens that the unpatched language model would get.
        keep: ``(n,)`` bool over the visual tokens that the language model would get; None: all.
        survivor_of: ``(n,)`` int64, the kept token that stands for each; None: itself.
        segments: for each encoder segment its number of patches before, between and after the merges.
        sources: sparse ``(n, patches)`` weights of the source patches in each visual token, if tracked.
        layers: the merging layers between which ``segments`` counts.
        projected: tokens that go through the projector, merging or not, where they are pooled in front of it; None:
            those of ``segments``.
        vision: by encoder layer, origins and weights after its merge, if tracked.
        window_pairs: ``(merges + 1,)`` int64, pairs of patches that share a window before, between and after the
            merges; None where attention has no windows.
    """

    modality: Modality = field(compare=False)  # torch.testing can compare all but strings
    num_tokens: int
    keep: Tensor | None = None
    survivor_of: Tensor | None = None
    segments: tuple[tuple[int, ...], ...] = ()
    layers: tuple[int, ...] = ()
    sources: Tensor | None = None
    projected: int | None = None
    vision: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    window_pairs: Tensor | None = None


def vision_provenance(records: Sequence[VisualRecord]) -> Provenance:
    """What the encoder stage did to some images and videos, in their order."""
    num_patches = [sum(segment[0] for segment in record.segments) for record in records]
    return Provenance.of_vision([record.vision for record in records], num_patches)


def attach(output: Any, records: list[VisualRecord]) -> None:
    """Puts records on a feature output."""
    output[RECORDS] = records


def records_of(output: Any) -> list[VisualRecord] | None:
    """The records of a feature output, or None."""
    found: list[VisualRecord] | None = getattr(output, RECORDS, None)
    return found


def without_records(output: Any) -> Any:
    """What a user gets: feature outputs, also those inside of ``output``, keep records as an attribute only.

    Tuples have no attributes: from them the records are gone.
    """
    if isinstance(output, tuple):
        return tuple(with_stock_keys(part) for part in output if not _is_records(part))
    if isinstance(output, ModelOutput):
        for name, part in list(output.items()):
            if (plain := with_stock_keys(part)) is not part:
                output[name] = plain
    return output


def _is_records(part: Any) -> bool:
    return isinstance(part, list) and any(isinstance(item, VisualRecord) for item in part)


def with_stock_keys(part: Any) -> Any:
    """A feature output with its records as an attribute; anything else as it is."""
    if not (isinstance(part, ModelOutput) and RECORDS in part):
        return part
    plain = type(part)()
    for name, value in part.items():
        if name != RECORDS:
            plain[name] = value  # in the order of stock: tuples have no names
    for name, value in vars(part).items():
        if name not in part and name not in vars(plain):
            setattr(plain, name, value)  # Gemma 4's features in older releases are no entry, but an attribute
    setattr(plain, RECORDS, part[RECORDS])
    return plain
