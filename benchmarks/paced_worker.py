"""vLLM's CPU worker, whose outputs are there when the pace says so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.cpu_worker import CPUWorker

from benchmarks.pace import Pace, pace_of_environment
from benchmarks.virtual_clock import step_shape

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput

    Output = ModelRunnerOutput | AsyncModelRunnerOutput


class PacedOutput(AsyncModelRunnerOutput):
    """A step's output, which its reader waits for until a moment."""

    def __init__(self, output: Output, pace: Pace, end_s: float) -> None:
        self._output = output
        self._pace = pace
        self._end_s = end_s

    def get_output(self) -> ModelRunnerOutput:
        """Wait, and return the output."""
        output = self._output
        if isinstance(output, AsyncModelRunnerOutput):
            output = output.get_output()
        self._pace.take(self._end_s)
        return output

    def get_kv_connector_output(self) -> Any:
        """What the KV connector said of the step; vLLM 0.33 asks for it if `get_output` fails."""
        output: Any = self._output
        if isinstance(output, AsyncModelRunnerOutput):
            return output.get_kv_connector_output()
        return output.kv_connector_output


class PacedWorker(CPUWorker):
    """Computes a step when it is handed one, which has to take less time than the pace gives it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pace = pace_of_environment()
        self._end_s = 0.0

    def execute_model(self, scheduler_output: SchedulerOutput) -> Output | None:
        """Compute a step; without tokens it takes no time."""
        if scheduler_output.total_num_scheduled_tokens:
            self._end_s = self._pace.begin(step_shape(scheduler_output))
        return super().execute_model(scheduler_output)

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> Output:
        """The tokens of the step that was computed last, once it is over."""
        return PacedOutput(super().sample_tokens(grammar_output), self._pace, self._end_s)
