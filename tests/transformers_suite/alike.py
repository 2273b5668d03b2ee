"""Scores of two attention back-ends, as one where they agree up to the rounding of half precision.

transformers compares back-ends in half precision too. There the scores of its untrained models nearly tie, and what
one back-end keeps another may merge. So the scores are the true ones, and those of the second model have to be those
of the first up to a share of their spread; then the first decide for both. Where they are further apart, each model
keeps its own, and the comparison fails.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from illava_hooks import METHODS, Method
from illava_hooks.merge.scores import SCORES, Score, ScoreInputs

__all__ = ["CLOSE", "AlikeScores"]

#: Of the spread (highest minus lowest score of a row, in the median row). In 2,976 pairs of calls back-ends were at
#: most 0.02 apart in bfloat16 and 0.01 in float16; scores of other inputs more than 0.5.
CLOSE = 0.05


class AlikeScores:
    """The scores of one test, which compares models on the same inputs."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, int, tuple[int, ...]], list[Tensor]] = {}

    def method(self) -> Method:
        """The method "illava" by these scores."""
        encoder, llm = self.score("received_attention"), self.score("last_query_attention")
        return replace(METHODS["illava"], name="illava, scores alike", encoder_score=encoder, llm_score=llm)

    def score(self, name: str) -> Score:
        """The score of a name, or an earlier one that it agrees with."""

        def alike(inputs: ScoreInputs) -> Tensor:
            found = SCORES[name](inputs)
            seen = self._seen.setdefault((name, inputs.layer_idx, tuple(found.shape)), [])
            for earlier in seen:
                if agree(found, earlier):
                    return earlier
            seen.append(found)
            return found

        return alike


def agree(scores: Tensor, others: Tensor) -> bool:
    """Whether scores ``(S, N)`` differ by no more than ``CLOSE``."""
    spread = (others.amax(-1) - others.amin(-1)).median()
    return bool((scores - others).abs().max() <= CLOSE * spread)
