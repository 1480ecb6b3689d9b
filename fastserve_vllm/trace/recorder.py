"""A planner that writes down what it decides and what it is told."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from fastserve_vllm.policy.budget import StepLimits
from fastserve_vllm.policy.job import Job
from fastserve_vllm.policy.plan import StepPlanner
from fastserve_vllm.policy.step_plan import StepPlan
from fastserve_vllm.trace.trace_file import Event


class Sink(Protocol):
    """What becomes of events."""

    def add(self, event: Event, handle: Any) -> None:
        """Note an event of the job whose handle this is."""
        ...

    def step(self, now_s: float) -> None:
        """A step was planned."""
        ...

    def flush(self) -> None:
        """Write what is pending."""
        ...

    def close(self) -> None:
        """There will be no more."""
        ...


class RecordedPlanner(StepPlanner):
    """Decides as `StepPlanner` does. Without a trace the host uses that one: nothing is paid.

    Args:
        args, kwargs: as for `StepPlanner`.
        sinks: where to write.
        blocks: KV blocks that a job holds on the device.
        outcome: why a job that is removed has ended.
        clock: the scheduler's; for what happens between plans.
    """

    def __init__(
        self,
        *args: Any,
        sinks: Sequence[Sink],
        blocks: Callable[[Job], int],
        outcome: Callable[[Job], str],
        clock: Callable[[], float],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.sinks = sinks
        self._blocks = blocks
        self._outcome = outcome
        self._clock = clock
        self._step = 0
        # Jobs that compute more than their next token, until they do not.
        self._prefilling: dict[Job, None] = {}
        # The level of each job that was last written.
        self._levels: dict[Job, int] = {}

    def add(self, job: Job, now_s: float) -> None:
        """As the planner's."""
        super().add(job, now_s)
        self._note(job, "arrived", now_s)

    def add_blocked(self, job: Job) -> None:
        """As the planner's."""
        super().add_blocked(job)
        self._note(job, "arrived, not ready")

    def remove(self, job: Job) -> None:
        """As the planner's."""
        super().remove(job)
        self._prefilling.pop(job, None)
        self._write(job, "finished", self._outcome(job), self._clock())
        del self._levels[job]
        if not len(self):
            for sink in self.sinks:
                sink.flush()

    def block(self, job: Job) -> None:
        """As the planner's."""
        super().block(job)
        self._note(job, "not ready")

    def unblock(self, job: Job, now_s: float) -> None:
        """As the planner's."""
        super().unblock(job, now_s)
        self._note(job, "ready", now_s)

    def evict(self, job: Job, now_s: float, **how: Any) -> None:
        """As the planner's."""
        super().evict(job, now_s, **how)
        self._note(job, "blocks taken, copied" if how.get("spilled") else "blocks taken", now_s)

    def swapped_out(self, job: Job) -> None:
        """As the planner's."""
        super().swapped_out(job)
        self._note(job, "copied to the host")

    def stayed(self, job: Job) -> None:
        """As the planner's."""
        super().stayed(job)
        self._note(job, "copy failed")

    def swapped_in(self, job: Job) -> None:
        """As the planner's."""
        super().swapped_in(job)
        self._note(job, "copied to the device")

    def missed(self, job: Job, now_s: float) -> None:
        """As the planner's."""
        super().missed(job, now_s)
        self._note(job, "vLLM had no room", now_s)

    def observe(
        self, step_s: float, now_s: float, steps: int = 1
    ) -> tuple[Sequence[Job], Sequence[Job]]:
        """As the planner's."""
        self._step += steps - 1
        moved, raised = super().observe(step_s, now_s, steps)
        for job in dict.fromkeys(moved):
            down = job.level > self._levels.get(job, job.level)
            self._note(job, "quantum used up" if down else "turn over", now_s)
        self._note_all(raised, "waited for long", now_s)
        return moved, raised

    def plan(self, limits: StepLimits, now_s: float) -> StepPlan:
        """As the planner's."""
        self._step += 1
        if self._prefilling:
            self._note_decoding(limits.decode_tokens, now_s)
        plan = super().plan(limits, now_s)
        self._note_all(plan.paused, "others first", now_s)
        self._note_all(plan.spilled, "memory short, copied", now_s)
        self._note_all(plan.recomputed, "memory short, given up", now_s)
        self._note_all(plan.swapped_out, "leaves for others", now_s)
        self._note_all(plan.swapped_in, "turn is near", now_s)
        for job in plan.started:
            more = job.next_tokens if job.next_tokens > limits.decode_tokens else 0
            if more:
                self._prefilling[job] = None
            self._write(job, job.state.value, "turn", now_s, more)
        for sink in self.sinks:
            sink.step(now_s)
        return plan

    def _note_decoding(self, decode_tokens: int, now_s: float) -> None:
        """The step before computed the last token of some prompts."""
        for job in [job for job in self._prefilling if job.next_tokens <= decode_tokens]:
            del self._prefilling[job]
            self._note(job, "prompt computed", now_s)

    def _note_all(self, jobs: Iterable[Job], reason: str, now_s: float) -> None:
        for job in jobs:
            self._note(job, reason, now_s)

    def _note(self, job: Job, reason: str, now_s: float | None = None) -> None:
        self._write(job, job.state.value, reason, self._clock() if now_s is None else now_s)

    def _write(self, job: Job, state: str, reason: str, now_s: float, tokens: int = 0) -> None:
        self._levels[job] = job.level
        blocks = self._blocks(job)
        event = Event(now_s, self._step, job.job_id, state, job.level, reason, blocks, tokens)
        for sink in self.sinks:
            sink.add(event, job.handle)
