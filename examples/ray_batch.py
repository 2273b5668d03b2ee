"""A table of questions answered by Ray Data on many machines, a bad row gets an error column.

    python examples/ray_batch.py --input rows.parquet --output answers --model tiny --actors 2

``pip install "ray[data]"``; on one machine Ray starts by itself, on a cluster it is found by ``RAY_ADDRESS``. The
table is parquet or JSON lines with the columns that ``BatchAnswers`` takes; paths must be readable on every machine.
Parts of it are asked again when an actor dies, so that no row is lost; the output is one parquet file a part.
"""

from __future__ import annotations

import argparse

import ray

from illava_hooks.integrations.batch import BatchAnswers


def main() -> None:
    """Reads, answers, writes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--input", required=True, help="a file or folder, .parquet or .jsonl")
    parser.add_argument("--output", required=True, help="a folder")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--actors", type=int, default=2, help="processes with a model each")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of each of them")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    options = parser.parse_args()
    read = ray.data.read_json if options.input.endswith(("jsonl", "json")) else ray.data.read_parquet
    table = read(options.input)
    answers = table.map_batches(
        BatchAnswers,
        fn_constructor_args=(options.model,),
        fn_constructor_kwargs={"batch_size": options.batch_size, "max_new_tokens": options.max_new_tokens},
        batch_size=options.batch_size,
        compute=ray.data.ActorPoolStrategy(size=options.actors),
        num_cpus=1,
        num_gpus=options.gpus,
    )
    answers.write_parquet(options.output)


if __name__ == "__main__":
    main()
