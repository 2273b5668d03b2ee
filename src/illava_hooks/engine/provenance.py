"""Which source patches of which image each surviving token stands for, and with what weight.

Shapes: ``K`` survivors, ``P`` source patches of one image (tiles and frames one after the other).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from illava_hooks.errors import PatchStateError
from illava_hooks.merge.plan import MergePlan

__all__ = ["Provenance", "StageProvenance", "TokenProvenance", "merge_matrix"]

Stage = Literal["vision", "language"]


@dataclass(frozen=True, slots=True)
class TokenProvenance:
    """One image or video after one merge.

    Attributes:
        seats: ``(K,)`` int64, the place of each survivor among the image's tokens before any merge of that
            stage: source patches for ``"vision"``, positions in the visual span for ``"language"``.
        weights: sparse ``(K, P)`` float32, the share of each source patch in each survivor; rows sum to 1 for
            merging rules. Text that a layout adds (newlines) has an empty row.
    """

    seats: Tensor
    weights: Tensor


@dataclass(frozen=True, slots=True)
class StageProvenance:
    """All images and videos after one layer, in prompt order: images first, then videos.

    One that does not merge in that layer is listed as it left the last layer in which it did.
    """

    images: list[TokenProvenance]


@dataclass(slots=True)
class Provenance:
    """Provenance of one forward, by stage and layer."""

    merges: dict[tuple[Stage, int], StageProvenance] = field(default_factory=dict)

    @classmethod
    def of_vision(
        cls, tracks: Sequence[Mapping[int, tuple[Tensor, Tensor]]], num_patches: Sequence[int]
    ) -> Provenance:
        """Collects the vision stage.

        Args:
            tracks: per image, seats and weights by layer.
            num_patches: ``P`` of each image.
        """
        found = cls()
        now = [TokenProvenance(torch.arange(n), _identity(n)) for n in num_patches]
        for layer_idx in sorted({layer for track in tracks for layer in track}):
            now = [
                TokenProvenance(*t[layer_idx]) if layer_idx in t else old for t, old in zip(tracks, now, strict=True)
            ]
            found.merges["vision", layer_idx] = StageProvenance(now)
        return found

    def at(self, stage: Stage, layer_idx: int) -> StageProvenance:
        """Provenance after the merge of one layer; ``("language", 0)`` is the entry of the language model.

        Raises:
            PatchStateError: that layer did not merge.
        """
        if (stage, layer_idx) not in self.merges:
            raise PatchStateError(
                f"({stage!r}, {layer_idx}) did not merge; the last forward has {sorted(self.merges)}"
            )
        return self.merges[stage, layer_idx]


def merge_matrix(plan: MergePlan) -> Tensor:
    """A plan as a sparse ``(B * K, B * N)`` matrix on the CPU: survivors from tokens."""
    batch, width = plan.keep_mask.shape
    num_kept = plan.keep_indices.shape[1]
    kept = plan.keep_rows
    real = plan.keep_mask.flatten()[kept.flatten()]
    edge_rows = plan.slots.flatten()[plan.anchors]
    rows = torch.cat([torch.arange(batch * num_kept, device=kept.device), edge_rows])
    columns = torch.cat([kept.flatten(), plan.absorbed])
    values = torch.cat([plan.self_weights.flatten()[kept.flatten()] * real, plan.weights])
    return sparse(rows, columns, values, (batch * num_kept, batch * width))


def _identity(size: int) -> Tensor:
    return sparse(torch.arange(size), torch.arange(size), torch.ones(size, dtype=torch.float32), (size, size))


def sparse(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """A coalesced float32 COO matrix on the CPU without explicit zeros."""
    used = values != 0
    index = torch.stack([rows[used], columns[used]]).cpu()
    return torch.sparse_coo_tensor(index, values[used].float().cpu(), shape, check_invariants=False).coalesce()


def product(left: Tensor, right: Tensor) -> Tensor:
    """Product of two sparse matrices."""
    with warnings.catch_warnings():
        # torch multiplies by way of CSR, of which it warns that it is young.
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
        out: Tensor = torch.sparse.mm(left, right).coalesce()
        return out


def selection(rows: Tensor, num_columns: int) -> Tensor:
    """A sparse matrix that selects ``rows`` ``(n,)``; -1 selects nothing."""
    rows = rows.cpu()
    return sparse(torch.arange(len(rows)), rows.clamp_min(0), (rows >= 0).float(), (len(rows), num_columns))


def block_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    """Sparse matrices beside and below each other, zero elsewhere."""
    rows, columns, values, height, width = [], [], [], 0, 0
    for block in blocks:
        index = block.indices()
        rows.append(index[0] + height)
        columns.append(index[1] + width)
        values.append(block.values())
        height, width = height + block.shape[0], width + block.shape[1]
    return sparse(torch.cat(rows), torch.cat(columns), torch.cat(values), (height, width))


def take_rows(matrix: Tensor, rows: Tensor) -> Tensor:
    """Selects rows of a sparse matrix."""
    return torch.index_select(matrix, 0, rows.cpu()).coalesce()
