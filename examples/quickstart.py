"""Patch a stock model, look inside, switch merging off again: `python examples/quickstart.py`.

Runs offline on a real photo and a real video through the real processors; the models are small and their
weights random (see `offline.py`), so the answers mean nothing and the token counts are those of a real model.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from transformers import BatchFeature, PreTrainedModel

import offline
from illava_hooks import merging, patch, unpatch


def generate(model: PreTrainedModel, inputs: BatchFeature) -> torch.Tensor:
    """Generate eight tokens and return them without the prompt."""
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return ids[:, inputs["input_ids"].shape[1] :]


def prefill_times(model: PreTrainedModel, inputs: BatchFeature, rounds: int = 3) -> tuple[float, float]:
    """Time the prefill without and with merging, alternately; return the two medians in seconds."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for enabled in [False, True] * (rounds + 1):
        with merging(model, enabled):
            start = time.perf_counter()
            model(**inputs, logits_to_keep=1)
            seconds[enabled].append(time.perf_counter() - start)
    unpatched, patched = (statistics.median(seconds[key][1:]) for key in (False, True))  # first: warm-up
    return unpatched, patched


@torch.inference_mode()
def main() -> None:
    """Show every family on a photo and on a video."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="narrower models, fewer tiles and frames")
    tiny = parser.parse_args().tiny

    for family in offline.FAMILIES:
        model, processor = offline.build(family, tiny=tiny)
        visuals: dict[str, Any] = {"photo": offline.photo(), "video": offline.video(4 if tiny else 8)}
        for kind, visual in visuals.items():
            inputs = offline.ask(processor, "What is happening here?", visual)
            stock_ids, stock_logits = generate(model, inputs), model(**inputs).logits

            session = patch(model)  # the paper's settings for this family; this line is all there is to it
            merged_logits = model(**inputs).logits
            print(f"\n=== {family}, {kind}: {inputs['input_ids'].shape[1]} tokens in the prompt")
            print(session.report)
            print(f"shape of the logits: {list(stock_logits.shape)}, patched {list(merged_logits.shape)}")
            seconds = "{:.3f} s without merging, {:.3f} s with".format(*prefill_times(model, inputs))
            print(f"prefill, median of 3: {seconds}")
            print(f"generated ids: {stock_ids[0].tolist()}")
            print(f"        patched: {generate(model, inputs)[0].tolist()}")

            with merging(model, False):
                same = torch.equal(generate(model, inputs), stock_ids)
                same = same and torch.equal(model(**inputs).logits, stock_logits)
            if not same:
                raise SystemExit(f"merging off: {family} differs from the stock model on the {kind}")
            print(f"merging off: equal to the stock model: {same}")
            unpatch(model)


if __name__ == "__main__":
    main()
