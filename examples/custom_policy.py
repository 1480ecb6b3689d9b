"""A scheduling policy of your own: short prompts overtake long ones, at every token.

    python examples/custom_policy.py --model MODEL [any other engine flag of vLLM]

With a server: PYTHONPATH=examples vllm serve MODEL --scheduler fastserve \\
    --fastserve-config.policy custom_policy:ShortPromptsFirst
"""

from vllm import EngineArgs, SamplingParams
from vllm.utils.argparse_utils import FlexibleArgumentParser

from fastserve_vllm import LLM
from fastserve_vllm.policy.base import StaticPolicy
from fastserve_vllm.policy.job import Job


class ShortPromptsFirst(StaticPolicy):
    """Prompts of up to 64 tokens before longer ones; among equals, arrival order."""

    def key(self, job: Job) -> tuple[float, ...]:
        """Smaller runs first: priority, level (there is one), place, a unique number."""
        return (job.priority, 0, job.prompt_tokens > 64, job.arrival)


def main() -> None:
    """Four long prompts, then four short ones, for two batch places; prints the order they end."""
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(description=__doc__))
    parser.set_defaults(max_num_seqs=2, disable_log_stats=False)
    args = vars(EngineArgs.from_cli_args(parser.parse_args()))
    llm = LLM(**args, fastserve_config={"policy": "custom_policy:ShortPromptsFirst"})
    prompts = ["long " * 100] * 4 + ["short"] * 4
    answers = llm.generate(prompts, SamplingParams(max_tokens=32, ignore_eos=True), use_tqdm=False)
    for answer in sorted(answers, key=lambda one: one.metrics.last_token_ts):
        print(answer.prompt.split()[0], len(answer.outputs[0].token_ids), "tokens")


if __name__ == "__main__":
    main()
