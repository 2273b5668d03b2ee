"""Engines in this process, one after the other."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: How many questions are asked: "all" of them, at night; a "sample"; few in a "short" form, which also leaves out what
#: needs further engines and processes.
FORM = os.environ.get("ILLAVA_VLLM", "sample")
SHORT = FORM == "short"


def counted(of_all: int) -> int:
    """So many of them."""
    return {"all": of_all, "sample": of_all // 4}.get(FORM, of_all // 10)


SMALL: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 1024,
    "enforce_eager": True,
    "max_num_seqs": 16,
    "limit_mm_per_prompt": {"image": 3, "video": 1},
    "disable_log_stats": False,
    "kv_cache_memory_bytes": 2**26,
    "block_size": 32,  # prompts are short, and only whole blocks are found again
}


@contextlib.contextmanager
def running(folder: Path, **options: Any) -> Iterator[Any]:
    """An ``LLM``, gone afterwards."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    engine = LLM(str(folder), **{**SMALL, **options})
    try:
        yield engine
    finally:
        engine.llm_engine.engine_core.shutdown()
        del engine
        cleanup_dist_env_and_memory()


def model_of(engine: Any) -> Any:
    """The model inside, where it runs in this process."""
    return engine.llm_engine.model_executor.driver_worker.worker.model_runner.model
