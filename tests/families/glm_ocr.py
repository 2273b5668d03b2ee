"""GLM-OCR: GLM-4V's prompts and kinds of layers; MLPs of the tower have a width of their own, queries and keys norms.

What the stock model wants, learned by running it: what GLM-4V wants.
"""

from __future__ import annotations

from transformers import GlmOcrForConditionalGeneration

from families import Suite
from families.glm4v import WIDE, Glm4V
from families.qwen2_vl import WITHOUT_IDS


class GlmOcr(Glm4V):
    """GLM-OCR."""

    title = "GLM-OCR"
    model_class = GlmOcrForConditionalGeneration
    list_carries_run = True
    suites = {"GlmOcr": Suite(vision=WIDE, image=(24, 24), rows_are_visuals=False, unpatched=WITHOUT_IDS)}
    shapes = {"glm-ocr": 0.92}
    stock_modules = ("glm_ocr.modeling_glm_ocr",)

    @property
    def model_types(self) -> tuple[str, ...]:
        """One class."""
        return ("glm_ocr",)


FAMILY = GlmOcr()
