"""Many streams at a time from the asynchronous engine, inside your own program.

python examples/async_engine.py --model MODEL [any other engine flag of vLLM]
"""

import asyncio
import time

from vllm import AsyncEngineArgs, SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.utils.argparse_utils import FlexibleArgumentParser

from fastserve_vllm import AsyncLLM


async def stream(engine: AsyncLLM, number: int, max_tokens: int) -> None:
    """Generate one answer token by token; print when the first and the last token came."""
    params = SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        ignore_eos=True,
        output_kind=RequestOutputKind.DELTA,
    )
    started_s, first_s, tokens = time.perf_counter(), None, 0
    async for output in engine.generate(f"Question {number}:", params, f"request-{number}"):
        first_s = first_s or time.perf_counter() - started_s
        tokens += len(output.outputs[0].token_ids)
    done_s = time.perf_counter() - started_s
    print(f"request {number:2}: {tokens:3} tokens, first after {first_s:.3f} s, all {done_s:.3f} s")


async def main() -> None:
    """Twelve streams share four batch places."""
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(description=__doc__))
    parser.set_defaults(max_num_seqs=4)
    args = AsyncEngineArgs.from_cli_args(parser.parse_args())
    engine = AsyncLLM.from_engine_args(args, fastserve_config={"starvation_limit_s": 1.0})
    try:
        await asyncio.gather(*(stream(engine, i, 16 if i % 3 else 160) for i in range(12)))
    finally:
        engine.shutdown()


if __name__ == "__main__":
    asyncio.run(main())
