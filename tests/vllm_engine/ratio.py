"""How fast vLLM answers with and without merging, in turn, in one run.

A ratio of CPU time, since a small model on a CPU shows what merging costs there, not what it gains on a large one::

    ILLAVA_VLLM=all build/vllm/bin/python tests/vllm_engine/ratio.py
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from asking import ask_engine, request_of
from checkpoints import padded
from engines import running
from transformers import AutoProcessor

from illava_hooks.integrations.vllm import overrides
from illava_hooks.tools.datasets import scene_items

ROUNDS = 2


def main() -> None:
    """Engines alternate, each is asked twice, and no prompt is found in a cache."""
    with tempfile.TemporaryDirectory() as folder:
        path = padded("qwen2_vl", Path(folder))
        requests = [request_of(AutoProcessor.from_pretrained(path), item) for item in scene_items(100)]
        options = {"enable_prefix_caching": False, "mm_processor_cache_gb": 0}
        seconds: dict[str, list[float]] = {"stock": [], "merged": []}
        tokens: dict[str, int] = {}
        for _ in range(ROUNDS):
            for name, settings in (("stock", {}), ("merged", overrides(vit_layers=[3, 4], vit_r=0.29))):
                with running(path, hf_overrides=settings, **options) as engine:
                    ask_engine(engine, requests[:4])
                    for _ in range(2):
                        start = time.process_time()
                        tokens[name] = sum(answer.prompt for answer in ask_engine(engine, requests))
                        seconds[name].append(time.process_time() - start)
    for name, times in seconds.items():
        took = ", ".join(f"{one:.2f}" for one in times)
        print(f"{name}: {tokens[name]} prompt tokens; CPU seconds for {len(requests)} questions: {took}")
    ratio = statistics.median(seconds["stock"]) / statistics.median(seconds["merged"])
    print(f"merged answers {ratio:.2f} times as many questions per CPU second as stock")


if __name__ == "__main__":
    main()
