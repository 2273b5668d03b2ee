"""Write a method of your own: `python examples/custom_method.py`.

A method is a score for the vision encoder, a score for the language model, a rule that merges, and a layout.
Each is a name from the library or a function of yours. Here the encoder keeps every second token, like the
black fields of a chess board, and folds each white field into the black one most similar to it.
"""

from __future__ import annotations

import argparse

import torch

import offline
from illava_hooks import Method, patch
from illava_hooks.merge.scoring import ScoreInputs

WHITE_FIELDS = 27 * 27 // 2  # of a tile of 27 x 27 tokens


def black_fields(inputs: ScoreInputs) -> torch.Tensor:
    """Score 1 on black fields, 0 on white ones: higher means keep.

    A row has 27 tokens, an odd number, so the parity of a token's place in the tile is its colour.
    """
    return (inputs.positions % 2 == 0).float()


CHECKERBOARD = Method("checkerboard", black_fields, llm_score="last_query_attention", merge="nearest")


@torch.inference_mode()
def main() -> None:
    """Run the checkerboard on a photo and print the tokens per stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a narrower model and a single tile")
    model, processor = offline.build("llava_onevision", tiny=parser.parse_args().tiny)
    inputs = offline.ask(processor, "What is happening here?", offline.photo())

    session = patch(model, [5], WHITE_FIELDS, llm_layers=[8], llm_ratio=0.5, method=CHECKERBOARD)
    logits = model(**inputs).logits
    print(f"method: {session.config.method.name}")
    print(session.report)
    print(f"logits: {list(logits.shape)}, finite: {bool(logits.isfinite().all())}")


if __name__ == "__main__":
    main()
