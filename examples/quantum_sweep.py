"""What the ladder's quantum does to latency: simulated, so no model and no GPU are needed.

    python examples/quantum_sweep.py [--load 1.1] [--requests 2000] [--batch 16]

Each row is a base quantum, in decode steps of a full batch. A short one tells answers apart sooner
and preempts more often; a long one comes close to first come, first served. The engine learns its
own (1.0 here) unless `base_quantum_s` is set.
"""

import argparse

from fastserve_vllm import FastServeConfig
from fastserve_vllm.policy.step_time import StepShape
from fastserve_vllm.simulator.run import capacity_rps, simulate, virtual_step_time
from fastserve_vllm.simulator.shape import EngineShape
from fastserve_vllm.traces import built_in, stream_requests


def main() -> None:
    """Simulate the same requests under each quantum."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--load", type=float, default=1.1)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    steps, rows = virtual_step_time(), built_in("sharegpt")
    ample = 1 << 20
    shape = EngineShape(args.batch, 2048, ample, 32, ample, steps, block_copy_s=7e-5)
    rate_rps = args.load * capacity_rps(shape, rows, seed=0)
    step_s = steps.predict_s(StepShape(0, args.batch))
    print("quantum  mean TTFT  P95 TTFT  mean normalized  P99 e2e  pauses")
    for quantum in (0.25, 1, 4, 16, 64, 256):
        config = FastServeConfig(base_quantum_s=quantum * step_s)
        figures = simulate(shape, config, stream_requests(rows, args.requests, rate_rps, 1.0, 0))
        ttft, per_token, whole = (figures[f"{n}_ms"] for n in ("ttft", "normalized", "e2e"))
        print(
            f"{quantum:7g}  {ttft['mean']:6.0f} ms  {ttft['p95']:5.0f} ms  "
            f"{per_token['mean']:12.1f} ms  {whole['p99']:4.0f} ms  "
            f"{figures['preemptions']['paused']:6}"
        )


if __name__ == "__main__":
    main()
