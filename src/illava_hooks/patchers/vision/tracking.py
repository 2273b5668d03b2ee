"""Provenance of the vision stage: from survivors back to the source patches of each image.

Only runs with ``track=True``; matrices are sparse and live on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from illava_hooks.patchers.vision.run import EncoderPass
from illava_hooks.runtime.provenance import product, sparse, take_rows

__all__ = ["selection", "token_sources", "vision_tracks"]


def vision_tracks(run: EncoderPass, first: int, last: int) -> dict[int, tuple[Tensor, Tensor]]:
    """Seats and patch weights of the survivors of segments ``first .. last - 1`` after each merge, by layer."""
    unit = run.traits.unit
    tracks = {}
    start, stop = _columns(run, 0, first, last)
    for ordinal, layer_idx in enumerate(run.layers[: len(run.plans)], start=1):
        low, high = _columns(run, ordinal, first, last)
        weights = _units(run, ordinal, first, last)
        row, column = weights.indices()
        lane = torch.arange(unit).repeat(row.numel())
        seats = run.states[ordinal].seats + _row_offset(run, 0)
        patches = (seats.flatten()[low:high, None].cpu() - start) * unit + torch.arange(unit)
        table = sparse(
            row.repeat_interleave(unit) * unit + lane,
            column.repeat_interleave(unit) * unit + lane,
            weights.values().repeat_interleave(unit),
            ((high - low) * unit, (stop - start) * unit),
        )
        tracks[layer_idx] = (patches.flatten(), table)
    return tracks


def token_sources(run: EncoderPass, first: int, last: int, tokens: Tensor) -> Tensor:
    """Source patches of the visual tokens that one image gives to the language model.

    Args:
        run: the finished run of the encoder.
        first: the image's first segment.
        last: one past its last.
        tokens: sparse ``(n, K')`` weights of the image's surviving units in each token.

    Returns:
        Sparse ``(n, patches)``.
    """
    unit = run.traits.unit
    weights = product(tokens, _units(run, len(run.plans), first, last))
    row, column = weights.indices()
    lane = torch.arange(unit).repeat(row.numel())
    return sparse(
        row.repeat_interleave(unit),
        column.repeat_interleave(unit) * unit + lane,
        weights.values().repeat_interleave(unit) / unit,
        (weights.shape[0], weights.shape[1] * unit),
    )


def selection(rows: Tensor, num_columns: int) -> Tensor:
    """A sparse matrix that selects ``rows`` ``(n,)``; -1 selects nothing."""
    rows = rows.cpu()
    return sparse(torch.arange(len(rows)), rows.clamp_min(0), (rows >= 0).float(), (len(rows), num_columns))


def _columns(run: EncoderPass, ordinal: int, first: int, last: int) -> tuple[int, int]:
    lengths = run.segments[ordinal].lengths
    return sum(lengths[:first]), sum(lengths[:last])


def _row_offset(run: EncoderPass, ordinal: int) -> Tensor:
    seats = run.states[ordinal].seats
    return torch.arange(seats.shape[0], device=seats.device)[:, None] * seats.shape[1]


def _units(run: EncoderPass, ordinal: int, first: int, last: int) -> Tensor:
    """Sparse weights of an image's original units in its survivors."""
    low, high = _columns(run, ordinal, first, last)
    start, stop = _columns(run, 0, first, last)
    sources = run.states[ordinal].sources
    if sources is None:
        return selection(torch.arange(stop - start), stop - start)
    rows = take_rows(sources, torch.arange(low, high))
    index = rows.indices()
    return sparse(index[0], index[1] - start, rows.values(), (high - low, stop - start))
