"""Scores and the search for alike tokens in a fixed number of launches: kernels where Triton is, else large blocks."""

from __future__ import annotations

from illava_hooks.merge.kernels.ops import (
    most_similar,
    received_attention_varlen,
    row_lse_varlen,
    takes,
    uses_triton,
)

__all__ = ["most_similar", "received_attention_varlen", "row_lse_varlen", "takes", "uses_triton"]
