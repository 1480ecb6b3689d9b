"""Everything that is measured on an accelerator: copies, and systems on a model of 8B parameters.

    python -m benchmarks.gpu --out DIR
    python -m benchmarks.gpu --only copies --out DIR
    python -m benchmarks.gpu --only kv --trace sharegpt.csv --loads 0.9 1.2 --out DIR

Three parts, each with its folder in DIR: `copies` is the copy engine against a plain copy; `slots`
and `kv` are `benchmarks.run` on the wall's clock, whose points are measured once and then found
again. Weights are dummies, so tokens mean nothing here: `pytest -m gpu` compares them on a model
whose tokens do. Exit status: 0; 1 if a part failed; 2 for bad input; 3 without an accelerator.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import cli, copy_bandwidth, run
from benchmarks.copy_bandwidth import CopyPlan
from benchmarks.errors import InputError
from benchmarks.llama_8b import BLOCK_SIZE, CONFIG, write_model
from benchmarks.manifest import manifest, write_json
from benchmarks.processes import in_fresh_process, platform_is_cuda_alike
from benchmarks.store import load_points
from benchmarks.tables import printed

PARTS = ("copies", "slots", "kv")
NO_ACCELERATOR = 3
# By part. What may fail for reasons of its own comes last: the others are then there already.
SYSTEMS = {
    "slots": ("vllm-fcfs", "fastserve"),
    "kv": (
        "vllm-fcfs",
        "fastserve",
        "fastserve-reactive",
        "fastserve-recompute",
        "vllm-fcfs+offload",
    ),
}
# By part, so that each fits in ten minutes, of which starting engines takes most. Where KV cache is
# short, fewer requests are in service, and fewer make a queue.
LOADS = {"slots": (0.9, 1.2), "kv": (1.2,)}
REQUESTS = {"slots": 500, "kv": 120}
_MAX_SEATS = 1024


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="What is measured on an accelerator."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART")
    copies = parser.add_argument_group("copies")
    copies.add_argument("--blocks", type=int, nargs="+", default=[64, 256, 1024])
    copies.add_argument("--repetitions", type=int, default=9)
    copies.add_argument("--pool-blocks", type=int, default=2048, help="on either side, 2 MiB each")
    systems = parser.add_argument_group("slots and kv")
    systems.add_argument("--trace", type=Path, help="CSV of lengths (default: ShareGPT's)")
    systems.add_argument("--requests", type=int, help=f"of a point (default: {REQUESTS})")
    systems.add_argument(
        "--loads", type=float, nargs="+", help=f"arrival rates over capacity (default: {LOADS})"
    )
    systems.add_argument("--seeds", type=int, nargs="+", default=[0])
    systems.add_argument("--batch", type=int, default=64)
    systems.add_argument("--systems", nargs="+", metavar="NAME", help="instead of each part's own")
    systems.add_argument(
        "--engine-args", type=json.loads, default={}, help="further engine arguments, JSON"
    )
    systems.add_argument("--overwrite", action="store_true", help="measure points again")
    args = parser.parse_args(argv)
    if not isinstance(args.engine_args, dict):
        parser.error("--engine-args: a JSON object is expected")
    if not 0 < min(args.blocks) <= max(args.blocks) <= args.pool_blocks or args.repetitions < 1:
        parser.error("--blocks: from 1 to --pool-blocks each; --repetitions: 1 or more")
    return args


def missing_accelerator(_: None = None) -> str | None:
    """What keeps this machine from measuring; None: nothing. Run it in a process of its own."""
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA or ROCm device"
    if not platform_is_cuda_alike():
        return "the installed vLLM is built for another platform"
    return None


def engine_arguments(batch: int, requests: int) -> dict[str, Any]:
    """Engine arguments of every system, as `--engine-args` of `benchmarks.run`.

    Graphs of decode steps without compilation: an engine starts in seconds, and its steps are
    still the device's to run, not Python's.
    """
    # The V2 model runner keeps a seat for each paused request: one for everybody.
    seats = max(batch + 1, min(batch + requests, _MAX_SEATS))
    return {
        "dtype": CONFIG["torch_dtype"],
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "enforce_eager": False,
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "max_cudagraph_capture_size": batch,
        },
        "max_num_active_seqs": batch,
        "max_num_seqs": seats,
    }


def run_arguments(part: str, args: argparse.Namespace, model: Path) -> list[str]:
    """The command line of `benchmarks.run` for a part."""
    requests = REQUESTS[part] if args.requests is None else args.requests
    engine = engine_arguments(args.batch, requests) | args.engine_args
    options = {
        "--regime": [part],
        "--clock": ["wall"],
        "--systems": args.systems or SYSTEMS[part],
        **({"--trace": [args.trace]} if args.trace else {"--workload": ["sharegpt"]}),
        "--model": [model],
        "--requests": [requests],
        "--loads": args.loads or LOADS[part],
        "--seeds": args.seeds,
        "--batch": [args.batch],
        "--block-size": [BLOCK_SIZE],
        "--engine-args": [json.dumps(engine)],
        "--out": [args.out / part],
    }
    words = [str(word) for name, values in options.items() for word in (name, *values)]
    return [*words, "--overwrite"] if args.overwrite else words


def measure_copies(args: argparse.Namespace) -> int:
    """Measure copies, print them as a table, and write them."""
    plan = CopyPlan(tuple(args.blocks), args.repetitions, args.pool_blocks)
    rows = in_fresh_process(copy_bandwidth.measure, plan)
    config = {
        "blocks": args.blocks,
        "repetitions": args.repetitions,
        "pool_blocks": args.pool_blocks,
        "layouts": copy_bandwidth.LAYOUTS,
    }
    write_json(args.out / "copies" / "copies.json", {"manifest": manifest(config), "cases": rows})
    print(copy_bandwidth.table(rows))
    return 0


def measure_systems(part: str, command: Sequence[str], folder: Path) -> int:
    """Measure a part's points; if one fails, print the tables of those before it."""
    try:
        status = run.main(command)
    except Exception:
        traceback.print_exc()
        _print_measured(folder)
        status = 1
    print(f"{part}: dummy weights, so whether outputs are identical says nothing")
    return status


def _print_measured(folder: Path) -> None:
    try:
        print(printed(load_points(folder)))
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")


def measure(args: argparse.Namespace, scratch: Path) -> int:
    """Every part that is asked for; one that fails does not keep the next from running."""
    model = write_model(scratch / "llama-8b")
    parts = [part for part in PARTS if part in args.only]
    commands = {part: run_arguments(part, args, model) for part in parts if part in SYSTEMS}
    for command in commands.values():
        cli.parse_arguments(command)  # exits before minutes are spent on another part
    statuses = []
    for part in parts:
        print(f"\n## {part}\n", flush=True)
        if part in commands:
            statuses.append(measure_systems(part, commands[part], args.out / part))
            continue
        try:
            statuses.append(measure_copies(args))
        except Exception:
            traceback.print_exc()
            statuses.append(1)
    return max(statuses)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the module's first lines list the exit statuses."""
    args = parse_arguments(argv)
    missing = in_fresh_process(missing_accelerator, None)
    if missing is not None:
        sys.stderr.write(f"no accelerator: {missing}; benchmarks.gpu measures nothing without\n")
        return NO_ACCELERATOR
    with tempfile.TemporaryDirectory() as scratch:
        return measure(args, Path(scratch))


if __name__ == "__main__":
    sys.exit(main())
