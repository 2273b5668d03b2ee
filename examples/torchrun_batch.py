"""A file of questions answered by as many processes as `torchrun` starts, on one machine or many.

    torchrun --nproc-per-node 2 --max-restarts 3 examples/torchrun_batch.py --input rows.jsonl --output answers

Every process takes each n-th row and appends to a file of its own. Rows that are answered are not asked again, so a
process that dies costs the rows of one batch: torchrun starts all of them again, and they go on. The folder must be
one that all machines share.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch

from illava_hooks.integrations.batch import ADDED, MEDIA, BatchAnswers


def answered(folder: Path) -> set[int]:
    """The rows that are in some file; a line that was cut off when its process died is none."""
    found: set[int] = set()
    for file in folder.glob("*.jsonl"):
        found |= {json.loads(line)["row"] for line in file.read_bytes().split(b"\n")[:-1]}
    return found


def main() -> None:
    """Answers this process's share of what is left."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--input", type=Path, required=True, help="JSON lines: question, image, images or video")
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    options = parser.parse_args()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    options.output.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in options.input.read_bytes().split(b"\n") if line.strip()]
    # By row, not by place among what is left: processes that start a moment apart see different things left.
    done = answered(options.output)
    mine = [index for index in range(rank, len(rows), world) if index not in done]
    answers = BatchAnswers(
        options.model,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        device=device,
        folder=options.input.parent,
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    with (options.output / f"{rank}-{attempt}-{os.getpid()}.jsonl").open("w", encoding="utf-8") as file:
        for start in range(0, len(mine), options.batch_size):
            batch = mine[start : start + options.batch_size]
            found = answers({name: [rows[index].get(name) for index in batch] for name in ("question", *MEDIA)})
            for number, index in enumerate(batch):
                line = {**rows[index], "row": index} | {name: found[name][number] for name in ADDED}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
    print(f"process {rank} of {world}: {len(mine)} rows answered")


if __name__ == "__main__":
    main()
