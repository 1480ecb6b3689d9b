"""Priorities: an urgent request displaces running ones, at the next token.

    python examples/priorities.py --model MODEL [any other engine flag of vLLM]

vLLM's `priority` (smaller is more urgent) is a class above FastServe's levels: within a class,
short requests come first as ever.
"""

from vllm import EngineArgs, SamplingParams
from vllm.utils.argparse_utils import FlexibleArgumentParser

from fastserve_vllm import LLM

URGENT, NORMAL, BACKGROUND = -1, 0, 1


def main() -> None:
    """Requests of three classes compete for two batch places; prints the order they end in."""
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(description=__doc__))
    parser.set_defaults(max_num_seqs=2, disable_log_stats=False)
    llm = LLM.from_engine_args(EngineArgs.from_cli_args(parser.parse_args()))

    jobs = [("background", BACKGROUND), ("normal", NORMAL), ("urgent", URGENT)] * 3
    outputs = llm.generate(
        [f"Write a report, number {i}." for i in range(len(jobs))],
        SamplingParams(temperature=0, max_tokens=48, ignore_eos=True),
        priority=[priority for _, priority in jobs],
        use_tqdm=False,
    )
    order = sorted(zip(outputs, jobs, strict=True), key=lambda pair: pair[0].metrics.last_token_ts)
    for output, (name, _) in order:
        done_s = output.metrics.last_token_ts - output.metrics.queued_ts
        print(f"{name:10}  done after {done_s:.3f} s")


if __name__ == "__main__":
    main()
