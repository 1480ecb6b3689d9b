"""What a step does, and counts of what the steps so far did."""

from dataclasses import dataclass, field
from typing import NamedTuple

from fastserve_vllm.policy.job import Job, JobState


class StepPlan(NamedTuple):
    """What one step does; the host applies it.

    Attributes:
        batch: the jobs that run, in the total order. A prefill that gets only what the others
            leave of the token budget comes last.
        started: those of them that were not running before.
        paused: jobs left out that keep their KV cache on the device.
        recomputed: jobs that give up their KV cache, before anything else happens.
        spilled: jobs whose device blocks are taken at once, and whose KV cache goes to the host
            before the step computes: the step waits for the copy.
        swapped_out: jobs whose KV cache is copied to the host while others run.
        swapped_in: jobs whose KV cache is copied back likewise.
        saved: jobs that stay, and whose full blocks are copied to the host in advance.
        held: jobs left out because all that they have to compute is in flight: not preempted.
        single_tokens: every job of the batch computes one token. False: some may compute more.
    """

    batch: tuple[Job, ...]
    started: tuple[Job, ...] = ()
    paused: tuple[Job, ...] = ()
    recomputed: tuple[Job, ...] = ()
    spilled: tuple[Job, ...] = ()
    swapped_out: tuple[Job, ...] = ()
    swapped_in: tuple[Job, ...] = ()
    saved: tuple[Job, ...] = ()
    held: tuple[Job, ...] = ()
    single_tokens: bool = False


@dataclass(slots=True)
class StepCounters:
    """Arrows taken so far, by name.

    Attributes:
        joined: jobs that joined a queue, by entry level.
        preempted: running jobs that left the batch, by "mode,cause": what becomes of the KV
            cache (`paused`, `swapped_out`, `spilled`, `recomputed`), and why (another was before
            it in the `order`, `memory` was short, the `host` did it, `copy_failed`).
        declined: batch places declined, by reason.
    """

    started: int = 0
    paused: int = 0
    recomputed: int = 0
    spilled: int = 0
    swapped_out: int = 0
    swapped_in: int = 0
    saved: int = 0
    finished: int = 0
    joined: dict[int, int] = field(default_factory=dict)
    preempted: dict[str, int] = field(default_factory=dict)
    declined: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, num_levels: int) -> "StepCounters":
        """Nothing was counted yet."""
        return cls(joined=dict.fromkeys(range(num_levels), 0))

    def pause(self, times: int) -> None:
        """So many running jobs gave way to others, and kept their KV cache on the device."""
        self.paused += times
        if times:
            self.preempt("paused", "order", times)

    def send_away(self, job: Job, plan: StepPlan, mode: str) -> None:
        """A job leaves the device, to which the plan meant to give a turn or a pause, or nothing.

        To be called before its state changes.
        """
        if job in plan.started:
            self.started -= 1
        elif job in plan.held:
            return  # It was not preempted: it waits for what is in flight.
        elif job in plan.paused:
            self.preempt("paused", "order", -1)
            self.preempt(mode, "order")
        else:
            self.take_blocks(job, mode, "memory")

    def take_blocks(self, job: Job, mode: str, cause: str) -> None:
        """The job leaves the device: a preemption, if it runs. To be called before it stops."""
        if job.state is JobState.RUNNING:
            self.preempt(mode, cause)

    def decline(self, reasons: dict[str, int]) -> None:
        """Batch places were declined, so often for each reason."""
        for reason, times in reasons.items():
            self.declined[reason] = self.declined.get(reason, 0) + times

    def preempt(self, mode: str, cause: str, times: int = 1) -> None:
        """Running jobs left the batch."""
        key = f"{mode},{cause}"
        self.preempted[key] = self.preempted.get(key, 0) + times
