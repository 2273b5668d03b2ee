"""From records and placeholder masks to the compact sequence that enters the language model.

Shapes: ``B`` samples of ``N`` logical tokens, ``K`` compact columns, ``V`` images and videos (images first),
``n`` visual tokens of all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from illava_hooks.errors import PatchStateError
from illava_hooks.merge.spans import compact, host_table
from illava_hooks.patchers.language.run import CompactState, Layout
from illava_hooks.runtime.session import ForwardState, VisualRecord
from illava_hooks.schedules import Modality

__all__ = ["Placement", "place"]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where everything is.

    Attributes:
        records: all images, then all videos.
        sample_of: the sample of each.
        columns: ``(B, K)`` int64, the logical column of each compact column.
        layout: counts of the first segment of layers.
        prompt_lengths: real logical tokens per sample.
        tail: real text tokens behind the last visual one, the least over the samples.
        state: the compact sequence, without RoPE tables.
    """

    records: list[VisualRecord]
    sample_of: tuple[int, ...]
    columns: Tensor
    layout: Layout
    prompt_lengths: tuple[int, ...]
    tail: int
    state: CompactState


def place(forward: ForwardState, real: Tensor, text_positions: Tensor | None) -> Placement:
    """Drops what the encoder merged away and all padding; one transfer to the host.

    Args:
        forward: placeholders, records and query of this forward.
        real: ``(B, N)`` bool, False on padding.
        text_positions: ``(B, N)`` positions to be checked for packed sequences, or None.

    Raises:
        PatchStateError: the positions restart, as in packed training sequences; or nothing is real.
    """
    batch, width = real.shape
    device = real.device
    span = torch.full((batch, width), -1, device=device)
    seat = torch.zeros_like(span)
    holder = torch.arange(batch * width, device=device).view(batch, width)
    keep = real
    records: list[VisualRecord] = []
    for modality in get_args(Modality):
        if modality not in forward.placeholders:
            continue
        mask = forward.placeholders[modality].to(device)
        span, seat, holder, keep = _fill(forward.records[modality], mask, len(records), span, seat, holder, keep)
        records += forward.records[modality]
    kept_of = torch.zeros(len(records) + 1, dtype=torch.int64, device=device)
    kept_of = kept_of.index_add(0, (span + 1).flatten(), keep.flatten().to(torch.int64))[1:]
    column = torch.arange(width, device=device).expand(batch, width)
    first = torch.full((len(records) + 1,), batch * width, device=device)
    first = first.scatter_reduce(
        0, (span + 1).flatten(), (column + width * torch.arange(batch, device=device)[:, None]).flatten(), "amin"
    )[1:]
    last_visual = torch.where(span >= 0, column, -1).amax(1)
    tail = (real & (column > last_visual[:, None])).sum(1)
    packed = _restarts(text_positions, real, device)
    host = torch.cat([keep.sum(1), real.sum(1), tail, kept_of, first, packed[None]]).tolist()
    lengths, prompt, tails = host[:batch], host[batch : 2 * batch], host[2 * batch : 3 * batch]
    kept_counts, firsts = host[3 * batch : 3 * batch + len(records)], host[3 * batch + len(records) : -1]
    if host[-1]:
        raise PatchStateError(
            "position_ids restart inside a row, as in packed sequences; merging works on one sequence per row; pad "
            "instead of packing, or use merging(model, False)"
        )
    if not any(lengths):
        raise PatchStateError(
            "attention_mask marks every token of every row as padding; give 1 to real tokens, or use "
            "merging(model, False)"
        )
    layout = Layout(tuple(lengths), tuple(kept_counts))
    columns = compact(keep, layout.width)
    rank = keep.cumsum(1)
    place_of = (rank - rank[:, -1:] - 1 + layout.width).clamp_min(0)
    # Padding shows the token before it, leading padding the first one.
    first_real = layout.width - rank[:, -1:]
    previous = torch.maximum(place_of, first_real.clamp_max(layout.width - 1))
    owner = torch.where(span >= 0, place_of.flatten()[holder.flatten()].view(batch, width), previous)
    valid = layout.valid(device)
    spans = span.gather(1, columns)
    state = CompactState(
        owner=owner,
        span=spans if valid is None else spans.masked_fill(~valid, -1),
        seats=seat.gather(1, columns),
        token_size=torch.ones(columns.shape, dtype=torch.float32, device=device),
        query=_query(forward.query, owner, layout.width, last_visual),
    )
    sample_of = tuple(min(f // width, batch - 1) for f in firsts)
    return Placement(records, sample_of, columns, layout, tuple(prompt), min(tails), state)


def _fill(
    records: list[VisualRecord],
    mask: Tensor,
    offset: int,
    span: Tensor,
    seat: Tensor,
    holder: Tensor,
    keep: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Writes one modality's spans, seats, holders and survivors to the places of its placeholders."""
    device = mask.device
    lengths = host_table([record.num_tokens for record in records], device)
    starts = lengths.cumsum(0) - lengths
    index = (mask.flatten().cumsum(0) - 1).clamp_min(0).view_as(mask)
    number = torch.repeat_interleave(
        torch.arange(len(records), device=device), lengths, output_size=sum(r.num_tokens for r in records)
    )
    kept, holders = [], []
    for record in records:
        place = torch.arange(record.num_tokens, device=device)
        kept.append(torch.ones_like(place, dtype=torch.bool) if record.keep is None else record.keep.to(device))
        holders.append(place if record.holder is None else record.holder.to(device))
    start = starts[number]
    at = torch.argsort((~mask.flatten()).to(torch.uint8), stable=True)  # flat places of the placeholders
    return (
        torch.where(mask, number[index] + offset, span),
        torch.where(mask, index - start[index], seat),
        torch.where(mask, at[(torch.cat(holders) + start)[index]], holder),
        keep & torch.where(mask, torch.cat(kept)[index], True),
    )


def _restarts(positions: Tensor | None, real: Tensor, device: torch.device) -> Tensor:
    """1 if positions fall inside a row, else 0, without asking the device."""
    if positions is None:
        return torch.zeros((), dtype=torch.int64, device=device)
    falls = (positions[:, 1:] <= positions[:, :-1]) & real[:, 1:] & real[:, :-1]
    return falls.any().to(torch.int64)


def _query(query: Tensor | int | None, owner: Tensor, width: int, last_visual: Tensor) -> Tensor:
    """``(B,)`` compact column of the scoring query; without a wish the last real token.

    Of labels, the token before the first one behind the last visual token: a query in front of an image pays no
    attention to it and cannot rank its tokens.
    """
    batch, num_tokens = owner.shape
    if query is None:
        return torch.full((batch,), width - 1, device=owner.device)
    if isinstance(query, int):
        return owner[:, max(0, min(query, num_tokens - 1))]
    if query.dtype == torch.bool:
        columns = torch.arange(num_tokens, device=owner.device)
        behind = query.to(owner.device) & (columns > last_visual[:, None])
        first = behind.to(torch.int64).argmax(1) - 1
        query = torch.where(behind.any(1), first, num_tokens - 1)
    return owner.gather(1, query.to(owner.device).clamp(0, num_tokens - 1)[:, None])[:, 0]
