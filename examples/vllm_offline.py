"""Asks a model in vLLM about pictures, with and without merging, and prints what is left of the prompts.

Needs vLLM (``pip install vllm illava-hooks``; docs/distributed.md has the versions)::

    python examples/vllm_offline.py --model Qwen/Qwen2-VL-2B-Instruct --question "What is this?" photo1.jpg photo2.jpg
"""

from __future__ import annotations

import argparse

from PIL import Image
from transformers import AutoProcessor

from illava_hooks.integrations.vllm import overrides


def main() -> None:
    """Every picture twice in one batch: as the server merges, and with a strength of 0 for this request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+")
    parser.add_argument("--model", default="Qwen/Qwen2-VL-2B-Instruct")
    parser.add_argument("--question", default="What is in this picture?")
    parser.add_argument("--keep-encoder", type=float, default=0.5, help="fraction of patches left behind the encoder")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--enforce-eager", action="store_true", help="start sooner, answer slower: compile nothing")
    given = parser.parse_args()

    from vllm import LLM, SamplingParams

    llm = LLM(
        given.model,
        max_model_len=given.max_model_len,
        enforce_eager=given.enforce_eager,
        hf_overrides=overrides(keep_encoder=given.keep_encoder),
    )
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": given.question}]}
    processor = AutoProcessor.from_pretrained(given.model)
    prompt = processor.apply_chat_template([message], add_generation_prompt=True)
    requests = []
    for path in given.images:
        request = {"prompt": prompt, "multi_modal_data": {"image": Image.open(path).convert("RGB")}}
        requests += [request, {**request, "mm_processor_kwargs": {"illava_vit_r": 0}}]
    found = llm.generate(requests, SamplingParams(temperature=0, max_tokens=given.max_new_tokens))
    for path, merged, whole in zip(given.images, found[::2], found[1::2], strict=True):
        print(f"{path}: {len(whole.prompt_token_ids)} tokens, merged {len(merged.prompt_token_ids)}")
        print(f"  without merging: {whole.outputs[0].text.strip()}")
        print(f"  merged:          {merged.outputs[0].text.strip()}")


if __name__ == "__main__":
    main()
