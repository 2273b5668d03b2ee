"""From records and placeholder masks to the compact sequence that enters the language model.

Shapes: ``B`` samples of ``N`` logical tokens (what the caller sees), ``K`` compact columns (right-aligned, padded on
the left), ``V`` images and videos (all images, then all videos), ``n`` visual tokens of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, islice

import torch
from torch import Tensor

from illava_hooks.config import Modality
from illava_hooks.engine.decoder import PromptState, TokenCounts
from illava_hooks.engine.records import VisualRecord
from illava_hooks.engine.scoring_query import ScoringQuery
from illava_hooks.errors import PatchStateError
from illava_hooks.merge.segments import counting, everybody, host_table, numbered, right_align

__all__ = ["CompactPrompt", "Visuals", "compact_prompt"]


@dataclass(frozen=True, slots=True)
class Visuals:
    """The images and videos of a forward, and where their tokens stand.

    Attributes:
        records: by modality, in prompt order.
        placeholders: ``(B, N)`` bool by modality.
    """

    records: dict[Modality, list[VisualRecord]]
    placeholders: dict[Modality, Tensor]


@dataclass(frozen=True, slots=True)
class CompactPrompt:
    """A prompt without what the encoder merged away, and without its padding.

    Attributes:
        records: all images, then all videos.
        sample_of: the sample of each.
        columns: ``(B, K)`` int64, the logical column that each compact column is read from.
        counts: of the first stage of layers.
        prompt_lengths: real logical tokens per sample.
        trailing_text: real text tokens behind the last visual one, the least over the samples.
        moves: whether some token stands elsewhere than in the logical sequence, seen from the right.
        state: the compact sequence, without RoPE tables.
        mixed: the modality of which something begins in one row and ends in another; None: nothing does.
    """

    records: list[VisualRecord]
    sample_of: tuple[int, ...]
    columns: Tensor
    counts: TokenCounts
    prompt_lengths: tuple[int, ...]
    trailing_text: int
    moves: bool
    state: PromptState
    mixed: Modality | None = None


@dataclass(slots=True)
class _Marks:
    """What each logical token is, ``(B, N)`` each.

    Attributes:
        visual: int64, number of the image or video that it belongs to, -1 for text.
        origin: int64, its place in that image or video.
        survivor_of: int64, flat token that stands for it.
        keep: bool, whether it enters the language model.
    """

    visual: Tensor
    origin: Tensor
    survivor_of: Tensor
    keep: Tensor


def compact_prompt(
    visuals: Visuals,
    query: ScoringQuery,
    real: Tensor,
    text_positions: Tensor | None,
    *,
    allows_holes: bool = True,
    keeps_ends: bool = False,
) -> CompactPrompt:
    """Drops what the encoder merged away and all padding; one transfer to the host.

    Args:
        visuals: the images and videos.
        query: which token scores.
        real: ``(B, N)`` bool, False on padding.
        text_positions: ``(B, N)`` positions to be checked for packed sequences, or None.
        allows_holes: whether padding between real tokens may be dropped; not in front of recurrent layers, whose
            state stock fades there.
        keeps_ends: whether the last token of every image and video is to stay.

    Raises:
        PatchStateError: the positions restart, as in packed training sequences; there are holes; or nothing is real.
    """
    records, marks = _mark(visuals, real)
    counted = _count(visuals, marks, real, text_positions, allows_holes)
    if counted["holes"][0]:
        raise PatchStateError(
            "attention_mask has padding between real tokens, which fades the state of recurrent layers (linear "
            "attention) in the stock model and would not where tokens merge; pad in front of or behind a row, or use "
            "merging(model, False)"
        )
    _check(counted)
    counts = TokenCounts(tuple(counted["kept"]), tuple(counted["kept_of_visual"]))
    width = real.shape[1]
    return CompactPrompt(
        records=records,
        sample_of=tuple(min(first // width, len(real) - 1) for first in counted["first_of_visual"]),
        columns=right_align(marks.keep, counts.width),
        counts=counts,
        prompt_lengths=tuple(counted["real"]),
        trailing_text=min(counted["trailing_text"]),
        moves=bool(counted["moves"][0]),
        state=_state(marks, query, real, counts, records if keeps_ends else []),
        mixed=_mixed(visuals, counted["placeholders"]),
    )


# ---------------------------------------------------------------------- what each token is


def _mark(visuals: Visuals, real: Tensor) -> tuple[list[VisualRecord], _Marks]:
    """All records, images first, and what each token is."""
    everywhere = counting(real.numel(), real.device).view_as(real)
    text = torch.full_like(everywhere, -1)
    marks = _Marks(text, torch.zeros_like(text), everywhere, real)
    records: list[VisualRecord] = []
    # In the order in which reports list them, whatever the order of the calls was.
    for modality in sorted(visuals.placeholders):
        _mark_modality(marks, visuals.records[modality], visuals.placeholders[modality].to(real.device), len(records))
        records += visuals.records[modality]
    return records, marks


def _mark_modality(marks: _Marks, records: Sequence[VisualRecord], mask: Tensor, first_number: int) -> None:
    """Writes the images, or the videos, to the places of their placeholders."""
    device = mask.device
    lengths = tuple(record.num_tokens for record in records)
    if not any(lengths):
        return  # pixels that are nothing but padding
    # Placeholders stand in the order of the features: the i-th of them is the i-th visual token.
    token = (mask.flatten().cumsum(0) - 1).clamp_min(0).view_as(mask)
    number, start = numbered(lengths, device).unbind()
    kept, survivors = [], []
    for record in records:
        place = counting(record.num_tokens, device)
        kept.append(everybody(place.shape, device) if record.keep is None else record.keep.to(device))
        survivors.append(place if record.survivor_of is None else record.survivor_of.to(device))
    flat_places = torch.argsort(mask.flatten().view(torch.uint8), stable=True, descending=True)
    survivor = flat_places[(torch.cat(survivors) + start)[token]]
    marks.visual = torch.where(mask, number[token] + first_number, marks.visual)
    marks.origin = torch.where(mask, token - start[token], marks.origin)
    marks.survivor_of = torch.where(mask, survivor, marks.survivor_of)
    marks.keep = marks.keep & torch.where(mask, torch.cat(kept)[token], True)


# ---------------------------------------------------------------------- what the host must know


def _count(
    visuals: Visuals, marks: _Marks, real: Tensor, text_positions: Tensor | None, allows_holes: bool
) -> dict[str, list[int]]:
    """Everything that the host must know, by name, in one transfer."""
    device, (batch, width) = real.device, real.shape
    num_visuals = sum(map(len, visuals.records.values()))
    visual = (marks.visual + 1).flatten()  # 0 collects the text, and is left out
    kept_of = torch.zeros(num_visuals + 1, dtype=torch.int64, device=device)
    first = torch.full((num_visuals + 1,), batch * width, device=device)
    places = counting(batch * width, device)
    tables = {
        "kept": marks.keep.sum(1),
        "real": real.sum(1),
        "trailing_text": (real & (counting(width, device) > _last_visual(marks)[:, None])).sum(1),
        "kept_of_visual": kept_of.index_add(0, visual, marks.keep.flatten().to(torch.int64))[1:],
        "first_of_visual": first.scatter_reduce(0, visual, places, "amin")[1:],
        "placeholders": torch.cat([mask.sum(1).to(device) for _, mask in sorted(visuals.placeholders.items())]),
        "restarts": _restarts(text_positions, real)[None],
        "holes": counting(1, device) if allows_holes else _holes(real)[None],
        "moves": (marks.keep[:, :-1] & ~marks.keep[:, 1:]).any()[None].to(torch.int64),
    }
    # Side by side in one tensor: every transfer makes the host wait for all that the device still has to do.
    numbers = iter(torch.cat(list(tables.values())).tolist())
    return {name: [next(numbers) for _ in range(len(table))] for name, table in tables.items()}


def _check(counted: dict[str, list[int]]) -> None:
    if counted["restarts"][0]:
        raise PatchStateError(
            "position_ids restart inside a row, as in packed sequences; merging works on one sequence per row; pad "
            "instead of packing, or use merging(model, False)"
        )
    if not any(counted["kept"]):
        raise PatchStateError(
            "attention_mask marks every token of every row as padding; give 1 to real tokens, or use "
            "merging(model, False)"
        )


def _mixed(visuals: Visuals, placeholders: Sequence[int]) -> Modality | None:
    """What begins in one row and ends in another, since features are not in the order of the rows; None: nothing."""
    rows = iter(placeholders)
    for modality in sorted(visuals.placeholders):
        ends = {0, *accumulate(record.num_tokens for record in visuals.records[modality])}
        if not ends.issuperset(accumulate(islice(rows, len(visuals.placeholders[modality])))):
            return modality
    return None


def _last_visual(marks: _Marks) -> Tensor:
    """``(B,)`` int64, the column of the last visual token; -1 where there is none."""
    columns = counting(marks.visual.shape[1], marks.visual.device)
    return columns.expand_as(marks.visual).masked_fill(marks.visual < 0, -1).amax(1)


def _holes(real: Tensor) -> Tensor:
    """1 if there is padding between real tokens, else 0, without asking the device."""
    begins = real & ~torch.nn.functional.pad(real[:, :-1], (1, 0))
    return (begins.sum(1) > 1).any().to(torch.int64)


def _restarts(positions: Tensor | None, real: Tensor) -> Tensor:
    """1 if positions fall inside a row, else 0, without asking the device."""
    if positions is None:
        return torch.zeros((), dtype=torch.int64, device=real.device)
    # Both neighbours real: the positions of padding are whatever the caller's arithmetic left there.
    falls = (positions[:, 1:] <= positions[:, :-1]) & real[:, 1:] & real[:, :-1]
    return falls.any().to(torch.int64)


# ---------------------------------------------------------------------- the compact sequence


def _state(
    marks: _Marks, query: ScoringQuery, real: Tensor, counts: TokenCounts, kept_to_the_end: Sequence[VisualRecord]
) -> PromptState:
    rank, width = marks.keep.cumsum(1), counts.width
    column = (rank - rank[:, -1:] - 1 + width).clamp_min(0)
    # Padding shows the token before it, leading padding the first one: outputs there mean nothing, as in stock.
    first_real = width - rank[:, -1:]
    shown = torch.maximum(column, first_real.clamp_max(width - 1))
    kept_at = torch.where(marks.visual >= 0, column.flatten()[marks.survivor_of.flatten()].view_as(column), shown)
    columns, padding = right_align(marks.keep, width), counts.padding(real.device)
    tables = [marks.visual.gather(1, columns), columns, marks.origin.gather(1, columns)]
    ends = [_ends(marks, kept_at, width, kept_to_the_end)] if kept_to_the_end else []
    about = torch.stack(tables + ends, -1)
    if padding is not None:
        about[..., :2].masked_fill_(padding[..., None], -1)
    return PromptState(
        places=torch.cat([kept_at, kept_at.gather(1, query.place(real, _last_visual(marks))[:, None])], 1),
        tables=about,
        token_size=torch.ones(columns.shape, dtype=torch.float32, device=real.device),
    )


def _ends(marks: _Marks, kept_at: Tensor, width: int, records: Sequence[VisualRecord]) -> Tensor:
    """``(B, K)`` int64, 1 in the columns that stand for the last tokens of images and videos."""
    last = host_table([record.num_tokens - 1 for record in records], kept_at.device)
    is_last = (marks.visual >= 0) & (marks.origin == last[marks.visual.clamp_min(0)])
    found = torch.zeros(len(kept_at), width, dtype=torch.int64, device=kept_at.device)
    return found.scatter_reduce(1, kept_at, is_last.to(torch.int64), "amax")
