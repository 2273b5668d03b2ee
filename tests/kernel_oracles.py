"""Scores and searches of packed segments in float64, one segment and head after the other."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def borders_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def logits_of(
    query: Tensor, key: Tensor, lengths: list[int], scale: float, bias: Tensor | None, keys: list[int], causal: bool
) -> list[Tensor]:
    """``(H, n, m)`` float64 of each segment."""
    found = []
    group = query.shape[1] // key.shape[1]
    starts = zip(pairwise(borders_of(lengths).tolist()), pairwise(borders_of(keys).tolist()), strict=True)
    for (first, last), (key_first, key_last) in starts:
        q = query[first:last].double().transpose(0, 1)
        k = key[key_first:key_last].double().transpose(0, 1).repeat_interleave(group, dim=0)
        logits = q @ k.transpose(1, 2) * scale
        if bias is not None:
            logits = logits + bias[key_first:key_last].double()
        if causal:
            hidden = torch.ones(logits.shape[1:], dtype=torch.bool).triu(logits.shape[2] - logits.shape[1] + 1)
            logits = logits.masked_fill(hidden, -torch.inf)
        found.append(logits)
    return found


def received(
    query: Tensor,
    key: Tensor,
    lengths: list[int],
    scale: float,
    bias: Tensor | None = None,
    keys: list[int] | None = None,
    causal: bool = False,
) -> Tensor:
    """``(P,)`` float64."""
    maps = logits_of(query, key, lengths, scale, bias, keys or lengths, causal)
    return torch.cat([logits.softmax(-1).mean((0, 1)) for logits in maps])


def lse(
    query: Tensor,
    key: Tensor,
    lengths: list[int],
    scale: float,
    bias: Tensor | None = None,
    keys: list[int] | None = None,
    causal: bool = False,
) -> Tensor:
    """``(H, P)`` float64."""
    maps = logits_of(query, key, lengths, scale, bias, keys or lengths, causal)
    return torch.cat([logits.logsumexp(-1) for logits in maps], 1)


def closest(features: Tensor, order: Tensor, lengths: list[int], splits: list[int] | None) -> tuple[Tensor, Tensor]:
    """Largest cosine and, with splits, whose it is: plain loops; NaN where something compared is NaN."""
    best, match = torch.full(order.shape, -torch.inf, dtype=torch.float64), order.clone()
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    for index, (first, last) in enumerate(pairwise(borders_of(lengths).tolist())):
        stop = last if splits is None else first + splits[index]
        for place in range(first, stop):
            rows = order[place + 1 if splits is None else stop : last].sort().values
            if len(rows):
                cosine = unit[first + rows] @ unit[first + order[place]]
                best[place], match[place] = cosine.max(), rows[cosine.argmax()]
    return best, match
