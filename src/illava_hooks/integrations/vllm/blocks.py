"""Merging inside vLLM's own vision towers with a packed row of patches: the blocks' class, and two hooks around.

Stock code stays in charge: it embeds, normalizes, splits, and shares items out among ranks. Behind the tower each item
has its stock length again: survivors first, with digits of their places behind their embeddings, then nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)

from illava_hooks.config import MergeConfig, Modality
from illava_hooks.engine.attention_tap import EncoderTap
from illava_hooks.engine.encoder import EncoderRun
from illava_hooks.engine.session import MergeSession
from illava_hooks.engine.traits import EncoderTraits
from illava_hooks.integrations.vllm.positions import grid_table, with_table
from illava_hooks.merge.segments import borders

__all__ = ["MergingBlock", "TowerMerging"]


class ShardedRun(EncoderRun):
    """A run on a rank that holds some of the heads: all ranks decide the same."""

    def scores(self, merges: int, tap: EncoderTap | None) -> Tensor:
        """The mean over the heads of all ranks."""
        own = super().scores(merges, tap)
        total: Tensor = tensor_model_parallel_all_reduce(own.clone())
        mean: Tensor = total / get_tensor_model_parallel_world_size()
        return mean


class ShardedTap(EncoderTap):
    """Listens on such a rank."""

    def keys(self) -> Tensor:
        """``(P, G, D)`` of all ranks."""
        gathered: Tensor = tensor_model_parallel_all_gather(super().keys().contiguous(), dim=1)
        return gathered


class TowerMerging:
    """Makes one tower merge while it is told to.

    Attributes:
        run: the run of the call that is going on; None: the tower is stock.
        tap: what listens to the attention of a merging block.
        counts: how many tokens of each item the last run left, of the items that this rank had.
    """

    def __init__(self, tower: Any, block: type[MergingBlock], traits: EncoderTraits, sharded: bool) -> None:
        """Swaps the blocks' class and puts the hooks in.

        Args:
            tower: the vision tower.
            block: the merging class of its blocks.
            traits: how patches lie in its row.
            sharded: whether each rank holds some of the heads only.
        """
        self.tower, self.traits, self.sharded = tower, traits, sharded
        self.run: EncoderRun | None = None
        self.tap: EncoderTap | None = None
        self.counts: list[int] = []
        self._asked: tuple[Modality, MergeSession] | None = None
        for index, layer in enumerate(tower.blocks):
            layer.__class__, layer.index, layer.merging = block, index, self
            layer.attn.attn.register_forward_pre_hook(self._hear, with_kwargs=True)
        tower.register_forward_pre_hook(self._start, with_kwargs=True)
        tower.register_forward_hook(self._finish, with_kwargs=True)

    @contextmanager
    def calling(self, modality: Modality, config: MergeConfig) -> Iterator[None]:
        """While the context is open, a call of the tower merges."""
        self._asked = modality, MergeSession(config, None)
        try:
            yield
        finally:
            self._asked = self.run = self.tap = None

    def _start(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._asked is None:
            return
        modality, session = self._asked
        lengths = [height * width for time, height, width in _grids(args, kwargs) for _ in range(time)]
        kind = ShardedRun if self.sharded else EncoderRun
        self.run = kind(session, modality, self.traits, lengths, 1, module.device, shrink=survivors)

    def _finish(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Tensor | None:
        run, self.run = self.run, None
        if run is None:
            return None
        run.check_finished()
        grids = _grids(args, kwargs)
        self.counts = counts_of(run, grids)
        return laid_out(run, out, grids, module.spatial_merge_size)

    def _hear(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.tap is not None:
            query, key = (kwargs["query"], kwargs["key"]) if "query" in kwargs else args[:2]
            self.tap.hear(query.transpose(1, 2), key.transpose(1, 2), module.scale)

    @contextmanager
    def listening(self, run: EncoderRun, layer_idx: int) -> Iterator[EncoderTap | None]:
        """While the context is open, queries and keys of a layer are heard, if the method asks for them."""
        if run.tap(layer_idx) is not None:
            self.tap = (ShardedTap if self.sharded else EncoderTap)([], ranks=True)
        try:
            yield self.tap
        finally:
            self.tap = None


class MergingBlock(nn.Module):
    """In front of a vision block of vLLM: merges between attention and MLP."""

    index: int
    merging: TowerMerging

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """The stock forward where no run is going on."""
        block: Any = self
        run = self.merging.run
        if run is None:
            return super().forward(x, **kwargs)  # type: ignore[no-any-return]  # of the class behind
        kwargs = run.enter(self.index, kwargs)
        if not run.merges_in(self.index):
            return super().forward(x, **kwargs)  # type: ignore[no-any-return]
        with self.merging.listening(run, self.index) as tap:
            x = x + block.attn(block.norm1(x), **kwargs)
        x = run.merge(self.index, x.squeeze(1), tap).unsqueeze(1)
        out: Tensor = x + block.mlp(block.norm2(x))
        return out


def survivors(kwargs: dict[str, Any], run: EncoderRun, merges: int) -> dict[str, Any]:
    """The keyword arguments of a block, cut down to the survivors: RoPE tables and borders."""
    cos, sin = (kwargs[name] for name in ("rotary_pos_emb_cos", "rotary_pos_emb_sin"))
    state = run.states[merges]
    if state.rope is None or state.rope[0] is not cos:  # all blocks between two merges are given the same
        origins = run.patch_origins(merges)[0].to(cos.device)
        state.rope = cos, (cos[origins], sin[origins])
    lengths = [units * run.traits.patches_per_unit for units in run.segments[merges].lengths]
    longest = kwargs.get("max_seqlen")
    return {
        **kwargs,
        "rotary_pos_emb_cos": state.rope[1][0],
        "rotary_pos_emb_sin": state.rope[1][1],
        "cu_seqlens": borders(lengths, cos.device, torch.int32),
        "max_seqlen": None if longest is None else torch.tensor(max(lengths), dtype=longest.dtype),
    }


def laid_out(run: EncoderRun, out: Tensor, grids: Sequence[Sequence[int]], group: int) -> Tensor:
    """The tower's output ``(K, C)`` at its stock length, ``(M, C + COLUMNS)``: of each item its survivors first.

    Args:
        run: the finished run.
        out: what the tower put out, one row for each survivor.
        grids: (t, h, w) in patches of each item.
        group: patches of a token along each side.
    """
    parts, seats = list[Tensor](), run.final.origins[0].to(out.device)
    start = place = 0
    for (time, height, width), count in zip(grids, counts_of(run, grids), strict=True):
        rows, columns = height // group, width // group
        mine = slice(start, start + count)
        table = grid_table(seats[mine] - place, rows, columns, max(time, rows, columns))
        whole = time * rows * columns
        parts.append(nn.functional.pad(with_table(out[mine], table), (0, 0, 0, whole - count)))
        start, place = start + count, place + whole
    return torch.cat(parts)


def counts_of(run: EncoderRun, grids: Sequence[Sequence[int]]) -> list[int]:
    """How many tokens of each item, whose temporal slices are segments of the run, are left."""
    left = iter(run.lengths)
    return [sum(units[-1] for units in itertools.islice(left, time)) for time, _, _ in grids]


def _grids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[list[int]]:
    grids = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
    found: list[list[int]] = grids if isinstance(grids, list) else grids.tolist()
    return found
