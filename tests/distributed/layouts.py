"""The ways to spread an engine over workers that can run on one machine without an accelerator."""

import os
from dataclasses import dataclass
from pathlib import Path

SUPPORT = Path(__file__).resolve().parent.parent / "support"
# The eager runner of a later stage has no intermediate tensors to start from.
PIPELINE_ON_CPU = ("--no-enforce-eager", "--compilation-config", '{"mode": 1, "backend": "eager"}')
# Room for about a fifth of what the batch wants; a small base quantum preempts as often as can be.
PRESSURE = ("--num-gpu-blocks-override", "25", "--max-num-seqs", "8")
FASTSERVE = ("--scheduler", "fastserve", "--fastserve-config.base_quantum_s", "0.002")


@dataclass(frozen=True)
class Layout:
    """How an engine, or several, are spread over workers.

    Attributes:
        name: in tables.
        executor: vLLM's name of what runs the workers.
        flags: what a user adds to `vllm serve`.
        engines: data-parallel engines.
        ranks: workers of each.
        extra: flags that only a CPU needs.
        overlap: steps overlap, as they do on GPUs.
    """

    name: str
    executor: str
    flags: tuple[str, ...] = ()
    engines: int = 1
    ranks: int = 1
    extra: tuple[str, ...] = ()
    overlap: bool = False

    def __str__(self):
        return f"{self.name}, {self.executor}"

    @property
    def ray(self):
        """Whether a Ray node has to be there."""
        return self.executor == "ray"

    @property
    def command(self):
        """What a user types."""
        return " ".join(("vllm serve MODEL --scheduler fastserve", *self.flags))

    def environment(self, base, ray_address=None, **variables):
        """Of the server: the test platform, ruined blocks, and where Ray is."""
        path = os.pathsep.join(filter(None, [str(SUPPORT), base.get("PYTHONPATH")]))
        env = base | {"PYTHONPATH": path, "FASTSERVE_TEST_ASYNC": str(int(self.overlap))}
        env |= variables
        if self.ray:
            env |= {
                "RAY_ADDRESS": ray_address,
                "FASTSERVE_TEST_RAY": "1",
                "RAY_AUTH_MODE": "disabled",
            }
        return env


def _layouts(executor):
    backend = ("--distributed-executor-backend", executor)
    tensor, pipeline = ("--tensor-parallel-size", "2"), ("--pipeline-parallel-size", "2")
    data, overlapping = ("--data-parallel-size", "2"), "tensor parallel 2, overlapping steps"
    yield Layout("tensor parallel 2", executor, (*tensor, *backend), ranks=2)
    yield Layout(overlapping, executor, (*tensor, *backend), ranks=2, overlap=True)
    yield Layout("pipeline 2", executor, (*pipeline, *backend), ranks=2, extra=PIPELINE_ON_CPU)
    backend = ("--data-parallel-backend", "ray") if executor == "ray" else ()
    yield Layout("data parallel 2", executor, (*data, *backend), engines=2)


ONE = Layout("one worker", "mp")
LAYOUTS = (ONE, *_layouts("mp"), *_layouts("ray"))
