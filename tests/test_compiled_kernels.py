"""What Triton makes of the kernels for a GPU, without one: tables are read in words, tensor cores multiply."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton")

#: In a process of its own: here kernels may have been imported for the interpreter.
COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from illava_hooks.merge.kernels import attention_triton, search_triton
from illava_hooks.merge.kernels.tuning import width_parts

def compiled(kernel, constants, how, aligned):
    names, constants = kernel.arg_names, {"WIDEN": False, **constants}
    types = {"query": "*bf16", "key": "*bf16", "bias": "*bf16", "features": "*bf16", "scale": "fp32"}
    types |= {name: "*i64" for name in ("query_borders", "key_borders", "rows", "order", "lengths", "given", "match")}
    types |= {name: "*fp32" for name in ("out", "lse", "best")}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    pointers = [name for name in names if signature[name].startswith("*")]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, *aligned)}
    at = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=at, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=how).asm["ptx"]

found = {}
for width in (72, 80):
    strides = ("query_row", "key_row", *(("query_head", "key_head") if width % 16 == 0 else ()))
    for kernel in (attention_triton._row_lse, attention_triton._column_means):
        sizes, how = attention_triton._CONFIGS[0]
        flags = {"GROUP": 1, "WORD": 8, "HAS_BIAS": False, "CAUSAL": False, **width_parts(width), **sizes}
        found[f"{kernel.__name__} {width}"] = compiled(kernel, flags, how, strides)
sizes, how = search_triton._CONFIGS[0]
flags = {"HAS_SPLIT": False, **sizes}
found["_search"] = compiled(search_triton._search, flags, how, ("feature_row", "width"))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def code() -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_tables_are_read_in_words(code: dict[str, str]) -> None:
    """A head of 72, whose stride is no multiple of 16, was once read number by number."""
    assert len(code) == 5
    for name, text in code.items():
        assert "ld.global.b16" not in text and "cp.async.cg.shared.global" in text, name


def test_products_are_those_of_tensor_cores(code: dict[str, str]) -> None:
    for name, text in code.items():
        assert "wgmma.mma_async" in text, name
