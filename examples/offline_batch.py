"""A batch of prompts, offline: short answers do not wait for long ones.

    python examples/offline_batch.py --model MODEL [any other engine flag of vLLM]

`fastserve_vllm.LLM` is `vllm.LLM` with another scheduler; everything else is as you know it.
"""

from vllm import EngineArgs, SamplingParams
from vllm.utils.argparse_utils import FlexibleArgumentParser

from fastserve_vllm import LLM


def main() -> None:
    """Twelve requests in four batch places; every third is ten times as long."""
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(description=__doc__))
    parser.set_defaults(max_num_seqs=4, disable_log_stats=False)
    args = EngineArgs.from_cli_args(parser.parse_args())

    # In your own code: LLM("MODEL", fastserve_config={"starvation_limit_s": 1.0}, ...).
    llm = LLM.from_engine_args(args)
    prompts = [f"Tell me a story about the number {i}." for i in range(12)]
    params = [
        SamplingParams(temperature=0, max_tokens=160 if i % 3 == 0 else 16, ignore_eos=True)
        for i in range(12)
    ]
    print("tokens  first token  done")
    for output in llm.generate(prompts, params, use_tqdm=False):
        times = output.metrics
        done_s = times.last_token_ts - times.queued_ts
        tokens = len(output.outputs[0].token_ids)
        print(f"{tokens:6}  {times.first_token_ts - times.queued_ts:9.3f} s  {done_s:.3f} s")


if __name__ == "__main__":
    main()
