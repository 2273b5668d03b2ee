"""Merging inside vLLM's own vision towers with a packed row of patches: the blocks' class, and two hooks around.

Stock code stays in charge: it embeds, normalizes, splits, and shares items out among ranks. Behind the tower each item
has its stock length again: survivors first, with digits of their places behind their embeddings, then nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
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
from illava_hooks.errors import UnsupportedModelError
from illava_hooks.integrations.vllm.positions import COLUMNS, grid_table, with_table
from illava_hooks.merge.segments import borders as packed_borders
from illava_hooks.merge.segments import scatter_back

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
        apart: whether slices of a video stand apart in the prompt, each as a picture of its own.
    """

    apart = False

    def __init__(self, tower: Any, block: type[MergingBlock], traits: EncoderTraits, sharded: bool) -> None:
        """Swaps the blocks' class and puts the hooks in.

        Args:
            tower: the vision tower.
            block: the merging class of its blocks.
            traits: how patches lie in its row.
            sharded: whether each rank holds some of the heads only.

        Raises:
            UnsupportedModelError: its attention wants lengths in a form that survivors have no way to.
        """
        if getattr(getattr(tower, "attn_backend", None), "name", None) == "FLASHINFER":
            raise UnsupportedModelError(
                "the vision encoder's attention is FLASHINFER, whose tables of lengths cannot follow merges yet; use "
                "--mm-encoder-attn-backend FLASH_ATTN"
            )
        self.tower, self.traits, self.sharded = tower, traits, sharded
        self.run: EncoderRun | None = None
        self.tap: EncoderTap | None = None
        self.counts: list[int] = []
        self._asked: tuple[Modality, MergeSession] | None = None
        for index, layer in enumerate(tower.blocks):
            layer.__class__, layer.index, layer.merging = block, index, self
            layer.attn.attn.register_forward_pre_hook(self._hear, with_kwargs=True)
        for merger in self.mergers():
            merger.forward = self._spread(merger.forward)  # some are called past their hooks
        tower.register_forward_pre_hook(self._start, with_kwargs=True)
        tower.register_forward_hook(self._finish, with_kwargs=True)
        tower.out_hidden_size += COLUMNS  # what a rank that has no item hands to the others is as wide

    def mergers(self) -> Iterator[Any]:
        """What makes tokens of patches, in the tower."""
        yield self.tower.merger

    def lay_out(self, grids: Sequence[Sequence[int]]) -> EncoderTraits:
        """How patches lie in the row of these items; (t, h, w) of each in patches."""
        return self.traits

    def borders(self, index: int, given: Tensor, run: EncoderRun, merges: int) -> Tensor:
        """Who attends to whom in a block after so many merges, ``(S + 1,)``; ``given`` said it before any."""
        lengths = [units * run.traits.patches_per_unit for units in run.segments[merges].lengths]
        return packed_borders(lengths, given.device, given.dtype)

    def survivors_of(self, run: EncoderRun, out: Tensor) -> Tensor:
        """``(K, C)`` of the tower's output ``(M, C)``, in which each token shows who stands for it."""
        return out[self._seats(run).to(out.device)]

    def _seats(self, run: EncoderRun) -> Tensor:
        """``(K,)`` int64: the place of each survivor among all tokens, as pictures have them."""
        seats = run.final.origins[0]
        if run.traits.order is not None:
            unit = run.traits.patches_per_unit
            seats = (run.traits.order[::unit].to(seats.device) // unit)[seats].sort().values
        return seats

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
        grids = _grids(args, kwargs)
        lengths = [height * width for time, height, width in grids for _ in range(time)]
        kind = ShardedRun if self.sharded else EncoderRun
        self.run = kind(session, modality, self.lay_out(grids), lengths, 1, module.device)

    def _spread(self, stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Each token shows who stands for it: stock un-permutes them, and stacks those of several blocks."""

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            out = stock(*args, **kwargs)
            return out if self.run is None else scatter_back(out[None], self.run.final.kept_at.to(out.device))[0]

        return forward

    def _finish(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Tensor | None:
        run, self.run = self.run, None
        if run is None:
            return None
        run.check_finished()
        grids = _grids(args, kwargs)
        self.counts = counts_of(run, grids)
        sides = [self.sides(grid) for grid in grids]
        return laid_out(self.survivors_of(run, out), self._seats(run), self.counts, sides, self.apart)

    def sides(self, grid: Sequence[int]) -> tuple[int, int, int]:
        """(t, h, w) in tokens of a grid in patches."""
        group = self.tower.spatial_merge_size
        return grid[0], grid[1] // group, grid[2] // group

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

    def enter(self, index: int, run: EncoderRun, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments of a block, cut down to the survivors: RoPE tables and borders."""
        kwargs, merges = run.enter(index, kwargs), run.merges_before(index)
        if not merges:
            return kwargs
        cos, sin = (kwargs[name] for name in ("rotary_pos_emb_cos", "rotary_pos_emb_sin"))
        state = run.states[merges]
        if state.rope is None or state.rope[0] is not cos:  # all blocks between two merges are given the same
            origins = run.patch_origins(merges)[0].to(cos.device)
            state.rope = cos, (cos[origins], sin[origins])
        cos, sin = state.rope[1]
        borders = self.borders(index, kwargs["cu_seqlens"], run, merges)  # max_seqlen stays: it is a bound
        return {**kwargs, "rotary_pos_emb_cos": cos, "rotary_pos_emb_sin": sin, "cu_seqlens": borders}


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
        kwargs = self.merging.enter(self.index, run, kwargs)
        if not run.merges_in(self.index):
            return super().forward(x, **kwargs)  # type: ignore[no-any-return]
        with self.merging.listening(run, self.index) as tap:
            x = x + block.attn(block.norm1(x), **kwargs)
        x = run.merge(self.index, x.squeeze(1), tap).unsqueeze(1)
        out: Tensor = x + block.mlp(block.norm2(x))
        return out


def laid_out(
    tokens: Tensor, seats: Tensor, counts: Sequence[int], sides: Sequence[Sequence[int]], apart: bool = False
) -> Tensor:
    """Survivors ``(K, C)`` at the stock length ``(M, C + COLUMNS)``: of each item its survivors first, then nothing.

    Args:
        tokens: the survivors.
        seats: ``(K,)`` int64, their places among all tokens.
        counts: how many each item has.
        sides: (t, h, w) of each in tokens.
        apart: whether the prompt has slices apart, each as a picture of its own.
    """
    parts = list[Tensor]()
    start = place = 0
    for (time, rows, columns), count in zip(sides, counts, strict=True):
        mine = slice(start, start + count)
        own = seats[mine] - place
        own, depth = (own % (rows * columns), 1) if apart else (own, time)
        table = grid_table(own, rows, columns, max(depth, rows, columns))
        whole = time * rows * columns
        parts.append(nn.functional.pad(with_table(tokens[mine], table.to(tokens.device)), (0, 0, 0, whole - count)))
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
