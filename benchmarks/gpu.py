"""All that only a GPU can show, in one command of ten minutes: `make gpu`, with what `make gpu-pack` put beside it.

Each piece runs in a process of its own, with a limit of its own, and leaves docs/results/gpu-<piece>.json; a second
call goes on with what is missing. Then the page is filled. Nothing is downloaded: models have published
shapes and random weights. ``--device cpu --tiny`` rehearses every piece on a CPU with narrow models.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_tables import fill_gpu

ROOT = Path(__file__).parents[1]
PACK = ROOT / "build" / "gpu-pack"
SITE = ROOT / "build" / "gpu-site"
#: Seconds that a process needs to end by itself once its time is up.
GRACE = 20


@dataclass(frozen=True)
class Speed:
    """One model, and what it is measured on.

    Attributes:
        shape: of ``bench``.
        loads: by label, what differs from the default workload.
        attention: back-end of the stock model and of the patched one.
        settings: of ``patch``.
    """

    shape: str
    loads: dict[str, dict[str, int]]
    attention: str = "sdpa"
    settings: dict[str, Any] = field(default_factory=lambda: {"method": "illava"})


LLAVA = {
    "2 images of 1 tile": {"tiles": 1, "images": 2},
    "5 tiles": {"tiles": 5},
    "10 tiles": {"tiles": 10},
    "32 frames": {"frames": 32},
}
QWEN = {
    **{f"{n:,} patches": {"patches": n} for n in (4096, 1024, 16384, 256)},
    **{f"{n:,} patches, batch 8": {"patches": n, "batch": 8} for n in (4096, 1024, 16384, 256)},
}
#: What the evidence recommends.
KEEP: dict[str, Any] = {"keep": 1 / 3, "method": "novel-agnostic"}
SPEEDS = {
    "llava-onevision-7b": Speed("llava-onevision-7b", LLAVA),
    "qwen2-vl-7b": Speed("qwen2-vl-7b", QWEN),
    "llava-onevision-7b-keep": Speed("llava-onevision-7b", LLAVA, settings=KEEP),
    "qwen2-vl-7b-keep": Speed("qwen2-vl-7b", QWEN, settings=KEEP),
    "qwen3-vl-8b": Speed("qwen3-vl-8b", {"4,096 patches": {"patches": 4096}}),
    "qwen2-vl-7b-flash": Speed("qwen2-vl-7b", QWEN, "flash_attention_2"),
    "llava-onevision-7b-flash": Speed("llava-onevision-7b", LLAVA, "flash_attention_2"),
}


@dataclass(frozen=True)
class Setting:
    """Where a piece runs.

    Attributes:
        device: "cuda", or "cpu" for a rehearsal.
        tiny: whether models are narrow and workloads small.
        until: when to stop, in seconds of the clock.
        file: where to leave what was found so far.
    """

    device: str
    tiny: bool
    until: float
    file: Path

    @property
    def is_over(self) -> bool:
        """Whether the time is up."""
        return time.time() >= self.until

    def leave(self, found: dict[str, Any]) -> None:
        """Writes what was found so far: a piece that is killed loses no more than what it was at."""
        self.file.write_text(json.dumps({**about(self), **found}, indent=1) + "\n", encoding="utf-8")


def about(setting: Setting) -> dict[str, Any]:
    """What figures were measured on."""
    import torch
    import transformers

    name = torch.cuda.get_device_name() if setting.device == "cuda" else "CPU, a rehearsal"
    return {"device": name, "torch": torch.__version__, "transformers": transformers.__version__, "tiny": setting.tiny}


# ---------------------------------------------------------------------- the pieces


def check(setting: Setting) -> None:
    """Tests that are marked ``gpu``: kernels against float64, no synchronisation, models on the device."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default"]
    command += ["tests/test_gpu.py", "-m", "gpu", "-rfEs", "--tb=short", "-W", "ignore"]
    if setting.device == "cuda" and importlib.util.find_spec("xdist"):  # most of the time kernels are compiled
        command += ["-p", "xdist.plugin", "-n", str(min(12, os.cpu_count() or 2))]
    environment = {**os.environ, "ILLAVA_GPU_DEVICE": setting.device, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    setting.leave({"complete": done.returncode == 0, "output": done.stdout.splitlines()[-60:]})


def kernels(setting: Setting) -> None:
    """Time of each kernel beside the attention whose scores it gives, by tokens and head width."""
    import torch

    sizes = {"10 tiles": [729] * 10, "ragged": [4096, 1, 777, 16384], **{str(n): [n] for n in (1024, 4096, 16384)}}
    if setting.tiny:
        sizes = {name: [max(1, n // 64) for n in lengths] for name, lengths in sizes.items()}
    rows: list[dict[str, Any]] = []
    for width, heads in ((72, 16), (80, 16), (128, 12))[: 1 if setting.tiny else None]:
        for label, lengths in sizes.items():
            if setting.is_over:
                break
            device = torch.device(setting.device)
            calls = kernel_calls(lengths, width, heads, device)
            times = {name: seconds_of(call, device, 1 if setting.tiny else 10) for name, call in calls.items()}
            rows.append({"tokens": label, "width": width, "heads": heads, "seconds": times})
            setting.leave({"rows": rows})
    setting.leave({"complete": not setting.is_over, "rows": rows})


def kernel_calls(lengths: list[int], width: int, heads: int, device: Any) -> dict[str, Callable[[], Any]]:
    """What is timed, by name, on segments of some lengths."""
    import torch

    from illava_hooks.merge.kernels import ops

    total, segments, longest = sum(lengths), len(lengths), max(lengths)
    query, key = (torch.randn(total, heads, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    borders = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    whole = query.new_ones(1, heads, longest, width)
    features = torch.randn(total, 1152, device=device, dtype=torch.bfloat16)
    order = torch.arange(longest, device=device).expand(segments, -1).contiguous()
    counts = torch.tensor(lengths, device=device)
    rows = (counts.cumsum(0) - counts)[:, None] + torch.minimum(order, counts[:, None] - 1)
    zeros = torch.zeros(order.shape, device=device)
    lse = ops.row_lse_varlen(query, key, borders, 0.1, lengths=lengths)
    return {
        "row LSE": lambda: ops.row_lse_varlen(query, key, borders, 0.1, lengths=lengths),
        "received attention": lambda: ops.received_attention_varlen(query, key, borders, 0.1, lengths=lengths),
        "received attention, LSE lent": lambda: ops.received_attention_varlen(
            query, key, borders, 0.1, lse=lse, lengths=lengths
        ),
        "closest": lambda: ops.closest_behind(features, rows, order, counts, zeros),
        "match": lambda: ops.match_behind(features, rows, order, counts, counts // 2),
        "SDPA of the longest": lambda: torch.nn.functional.scaled_dot_product_attention(whole, whole, whole),
    }


def seconds_of(call: Callable[[], Any], device: Any, repeats: int) -> float:
    """Seconds of one call, of several in a row behind two that do not count: autotuning, caches."""
    from illava_hooks.tools.bench.meters import Stopwatch

    watch = Stopwatch(device)
    for _ in range(2):
        call()
    began = watch.look()[0]
    for _ in range(repeats):
        call()
    return (watch.look()[0] - began) / repeats


def build(setting: Setting, shape: str, attention: str = "sdpa") -> Any:
    """A model of a published shape, in what it is run in on such a device."""
    import torch

    from illava_hooks.tools.bench import build_shape

    dtype = torch.float32 if setting.device == "cpu" else torch.bfloat16
    return build_shape(shape, setting.device, dtype, attention, setting.tiny)


def speed(setting: Setting, given: Speed) -> None:
    """Prefill by stage, decode steps, peaks and merging's own share, unpatched and merged in turn."""
    import torch

    from illava_hooks.tools.bench import Workload, as_dict, compare

    if given.attention != "sdpa" and (setting.device == "cpu" or importlib.util.find_spec("flash_attn") is None):
        setting.leave({"complete": True, "skipped": f"{given.attention}: flash_attn is not there", "rows": []})
        return
    model = build(setting, given.shape, given.attention)
    rows: list[dict[str, Any]] = []
    for label, load in given.loads.items():
        if setting.is_over:
            break
        small: dict[str, Any] = {
            name: small_of(name, value) if setting.tiny else value for name, value in load.items()
        }
        work = Workload(**small, new=3 if setting.tiny else 17)
        try:
            found = as_dict(compare(model, work, given.settings, 1 if setting.tiny else 3, label))
            for kind in ("unpatched", "merged"):
                del found[kind]["runs"]
            rows.append({key: value for key, value in found.items() if key != "report"})
        except torch.OutOfMemoryError:
            rows.append({"label": label, "out of memory": True})
        free()
        setting.leave({"shape": given.shape, "attention": given.attention, "settings": given.settings, "rows": rows})
    setting.leave(
        {
            "complete": len(rows) == len(given.loads),
            "shape": given.shape,
            "attention": given.attention,
            "settings": given.settings,
            "rows": rows,
        }
    )


def fresh(setting: Setting) -> None:
    """An answer to an image of a size that the process has not seen yet, and the same once more.

    On such a size whatever is tuned, planned or loaded by length is so anew: that is what users of any sizes pay.
    """
    from illava_hooks import merging, patch
    from illava_hooks.tools.bench import Workload, measure
    from illava_hooks.tools.bench.workload import build_workload

    model = build(setting, "qwen2-vl-7b")
    patch(model, **KEEP)
    rows: list[dict[str, Any]] = []
    sides = range(16, 24, 4) if setting.tiny else range(40, 112, 4)
    for number, height in enumerate(sides):
        if setting.is_over:
            break
        kind = ("unpatched", "merged")[number % 2]
        inputs = build_workload(model, Workload(patches=height * (height + 2)))
        with merging(model, kind == "merged"):
            runs = [measure(model, inputs, 9) for _ in range(2)]
        times = [(run.prefill_s, run.decode_s) for run in runs]
        if number > 1:  # of the first of each kind everything is new
            rows.append({"kind": kind, "patches": height * (height + 2), "first": times[0], "again": times[1]})
        setting.leave({"rows": rows})
    setting.leave({"complete": not setting.is_over, "rows": rows})


def small_of(name: str, value: int) -> int:
    """A workload's number for a rehearsal."""
    return {"patches": max(64, value // 64), "frames": 2, "batch": 2, "tiles": min(value, 3), "images": value}[name]


def frames(setting: Setting) -> None:
    """The longest video, by doubling, before memory runs out: unpatched and merged."""
    import torch

    from illava_hooks import merging, patch
    from illava_hooks.tools.bench import Workload, measure
    from illava_hooks.tools.bench.workload import build_workload

    model = build(setting, "llava-onevision-7b")
    patch(model)
    found: dict[str, Any] = {}
    for kind in ("unpatched", "merged"):
        count, found[kind] = (1 if setting.tiny else 32), {"frames": 0, "ran out": False}
        while count <= (2 if setting.tiny else 2048) and not setting.is_over:
            try:
                with merging(model, kind == "merged"):
                    measure(model, build_workload(model, Workload(frames=count)), 1)
            except torch.OutOfMemoryError:
                found[kind]["ran out"] = True
                break
            finally:
                free()
            found[kind]["frames"], count = count, count * 2
            setting.leave({"rows": found})
    setting.leave({"complete": not setting.is_over, "rows": found})


def free() -> None:
    """Gives memory back that nobody holds."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Piece:
    """One process.

    Attributes:
        run: what it does.
        seconds: its limit.
    """

    run: Callable[[Setting], None]
    seconds: int


def _seconds(given: Speed) -> int:
    """For the model, and ten or so for each workload."""
    return 25 + 11 * len(given.loads)


def _speed(given: Speed) -> Callable[[Setting], None]:
    return lambda setting: speed(setting, given)


#: In the order of what they are worth.
PIECES = {
    "check": Piece(check, 240),
    "kernels": Piece(kernels, 60),
    **{f"speed-{name}": Piece(_speed(given), _seconds(given)) for name, given in SPEEDS.items()},
    "fresh": Piece(fresh, 60),
    "frames": Piece(frames, 75),
}


# ---------------------------------------------------------------------- one process each


#: From this release of transformers on stages can be timed apart.
TRANSFORMERS = (5, 18)
#: What it wants as new as it is itself.
_ITS_OWN = ("tokenizers", "safetensors", "regex", "huggingface_hub", "hf_xet")


def unpack(target: Path) -> list[str]:
    """Makes importable what ``make gpu-pack`` left and the machine lacks; wheels are archives of packages.

    What is packed also goes before an older release, since packed ones want each other as new as they are; but the
    machine keeps its transformers, and what belongs to it, where stages can be timed apart with them.

    Raises:
        SystemExit: a wheel that is needed is for another Python.
    """
    wheels = {wheel.name.split("-")[0].lower(): wheel for wheel in sorted(PACK.glob("*.whl"))}
    is_old = "transformers" in wheels and _installed("transformers") < TRANSFORMERS
    taken = []
    for name, wheel in wheels.items():
        there = _installed(name)
        newer = there < _numbers(wheel.name.split("-")[1]) and (name not in ("transformers", *_ITS_OWN) or is_old)
        if there and not newer:
            continue
        if not _fits(wheel):
            version = f"{sys.version_info.major}.{sys.version_info.minor}"
            raise SystemExit(
                f"{wheel.name} in {PACK} is not for this Python, {version}; run make gpu-pack "
                f"GPU_PACK_PYTHON={version} where there is a network, or give make gpu a GPU_PYTHON that it is for"
            )
        taken.append(name)
        if not (done := target / f"{wheel.stem}.unpacked").exists():
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(target)
            done.touch()
    return taken


def _fits(wheel: Path) -> bool:
    """Whether this Python can load what is compiled in a wheel."""
    python, abi, _ = wheel.stem.split("-")[-3:]
    return abi in ("none", "abi3") or f"cp{sys.version_info.major}{sys.version_info.minor}" in python.split(".")


def _installed(name: str) -> tuple[int, ...]:
    """The release that the machine has; empty: none."""
    try:
        return _numbers(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return ()


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def variables() -> dict[str, str]:
    """The environment of a piece; what is packed goes before what the machine has."""
    path = os.pathsep.join(str(part) for part in (SITE, ROOT / "src", ROOT / "tests", ROOT / "benchmarks"))
    # What Triton finds when it tunes a kernel is kept, too: a second call does not tune again.
    kept = {"TRITON_CACHE_AUTOTUNING": "1"}
    return {**os.environ, **kept, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}


def is_complete(file: Path) -> bool:
    """Whether a piece has all its figures."""
    return file.exists() and bool(json.loads(file.read_text(encoding="utf-8")).get("complete"))


def run_all(
    device: str, tiny: bool, seconds: float, results: Path, wanted: list[str], stretch: float
) -> Iterator[tuple[str, str]]:
    """Runs what is missing, one process after the other; tells each piece's name and how it ended."""
    until = time.time() + seconds
    unpack(SITE)
    results.mkdir(parents=True, exist_ok=True)
    for name in wanted:
        file, left = results / f"gpu-{name}.json", until - time.time()
        if is_complete(file):
            yield name, "there already"
            continue
        if left < GRACE:
            yield name, "no time left; call again"
            continue
        limit = min(stretch * PIECES[name].seconds, left)
        command = [sys.executable, __file__, "--only", name, "--device", device, "--until", str(time.time() + limit)]
        command += ["--results", str(results), *(["--tiny"] if tiny else [])]
        try:
            done = subprocess.run(
                command, env=variables(), capture_output=True, text=True, timeout=limit + GRACE, check=False
            )
        except subprocess.TimeoutExpired:
            yield name, "out of time; call again"
            continue
        if done.returncode:
            yield name, f"failed: {' '.join(done.stderr.split())[-600:]}"
        else:
            yield name, "done" if is_complete(file) else "in part; call again"


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="narrow models and small workloads: a rehearsal")
    parser.add_argument("--seconds", type=float, default=560, help="for all pieces")
    parser.add_argument("--pieces", default=",".join(PIECES), help="which of them, separated by commas")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--stretch", type=float, default=1.0, help="times the limit of each piece")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.pieces.split(",") if name not in PIECES]:
        parser.error(f"--pieces has {unknown[0]!r}; choose from {', '.join(PIECES)}")
    if given.tiny and given.results == ROOT / "docs" / "results":
        parser.error("--tiny is a rehearsal, whose figures mean nothing; give --results FOLDER as well")
    if given.only:
        PIECES[given.only].run(
            Setting(given.device, given.tiny, given.until, given.results / f"gpu-{given.only}.json")
        )
        return 0
    if given.device == "cuda" and not _has_cuda():
        print("no CUDA device: nothing was measured; rehearse with --device cpu --tiny --results FOLDER")
        return 1
    failed = False
    for name, ended in run_all(
        given.device, given.tiny, given.seconds, given.results, given.pieces.split(","), given.stretch
    ):
        print(f"{name}: {ended}", flush=True)
        failed = failed or ended.startswith("failed")
    if given.results == ROOT / "docs" / "results":
        fill_gpu(ROOT / "docs")
    return int(failed)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
