"""How much does merging change the answer? `python examples/compare_outputs.py --method fastv`.

Without `--model` it compares small models with random weights, which shows how to compare and nothing more.
With the name or the folder of a checkpoint it compares the real thing.
"""

from __future__ import annotations

import argparse

import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchFeature,
    PreTrainedModel,
    ProcessorMixin,
)

import offline
from illava_hooks import METHODS, patch, unpatch


def answer(model: PreTrainedModel, processor: ProcessorMixin, inputs: BatchFeature, length: int) -> str:
    """Generate greedily and decode what was generated."""
    ids = model.generate(**inputs, max_new_tokens=length, do_sample=False)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@torch.inference_mode()
def compare(model: PreTrainedModel, processor: ProcessorMixin, inputs: BatchFeature, method: str, length: int) -> None:
    """Print the text of both and the largest difference of their logits, over the prompt and at its end."""
    stock_text, stock_logits = answer(model, processor, inputs, length), model(**inputs).logits
    patch(model, method=method)
    merged_text, merged_logits = answer(model, processor, inputs, length), model(**inputs).logits
    unpatch(model)

    difference = (merged_logits - stock_logits).abs()
    print(f"unpatched: {stock_text!r}")
    print(f"patched:   {merged_text!r}")
    print(f"max logit difference: {difference.max():.4f}, at the next token {difference[:, -1].max():.4f}")
    print(f"same next token: {torch.equal(stock_logits[:, -1].argmax(-1), merged_logits[:, -1].argmax(-1))}")


def main() -> None:
    """Compare on a photo: the given model, or a small one of each family."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a checkpoint; default: small models, random weights")
    parser.add_argument("--image", help="an image file; default: a photo of scikit-learn")
    parser.add_argument("--question", default="What is happening here?")
    parser.add_argument("--method", default="illava", choices=sorted(METHODS))
    parser.add_argument("--tokens", type=int, default=16, help="number of tokens to generate")
    parser.add_argument("--tiny", action="store_true", help="narrower models and fewer tiles")
    args = parser.parse_args()

    visual = Image.open(args.image).convert("RGB") if args.image else offline.photo()
    for name in [args.model] if args.model else offline.FAMILIES:
        if args.model:
            model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", device_map="auto").eval()
            processor = AutoProcessor.from_pretrained(name)
        else:
            model, processor = offline.build(name, tiny=args.tiny)
        print(f"\n=== {name}, method {args.method}")
        inputs = offline.ask(processor, args.question, visual).to(model.device, model.dtype)
        compare(model, processor, inputs, args.method, args.tokens)


if __name__ == "__main__":
    main()
