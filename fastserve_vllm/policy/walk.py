"""Chooses a step's batch where its limits bind: job by job, in the total order."""

from collections.abc import Iterator, Sequence

from fastserve_vllm.policy.budget import Demand, StepBudget, StepLimits, Verdict
from fastserve_vllm.policy.job import Job, JobState
from fastserve_vllm.policy.queues import ReadyQueue
from fastserve_vllm.policy.roster import Roster

# A step's walk ends once this many jobs a batch place were declined: beyond that, the step is
# short of tokens or memory, and looking further would cost more than an idle place.
LOOKAHEAD = 4


class Walk:
    """One step's walk over the jobs, which gives each what is still there.

    Args:
        roster: its queues lose the jobs that the walk looks at.
        candidates: jobs taken out of the queues or still running, in order.
        held: jobs taken out that have nothing to compute.
        limits: the room of the step.
        demand: the host's answers.

    Attributes:
        chosen: the jobs that run, in order.
        passed: those of the candidates and of the jobs looked at that do not.
        held: as given.
        budget: what is left, and who gives up KV cache.
    """

    def __init__(
        self,
        roster: Roster,
        candidates: Sequence[Job],
        held: Sequence[Job],
        limits: StepLimits,
        demand: Demand,
    ) -> None:
        self._roster = roster
        self._candidates = candidates
        self.held = held
        self.budget = StepBudget(limits, demand, self._holders)
        self.chosen: list[Job] = []
        self.passed: list[Job] = []
        self._choose()

    def _choose(self) -> None:
        chosen, passed, budget = self.chosen, self.passed, self.budget
        lookahead = LOOKAHEAD * (budget.limits.batch_limit + 1)
        for job in self._in_order():
            verdict = budget.admit(job)
            (chosen if verdict is Verdict.ADMITTED else passed).append(job)
            lookahead -= verdict is Verdict.DECLINED
            if verdict is Verdict.CLOSED or lookahead == 0:
                break
        taken = {*chosen, *passed}
        passed += [job for job in self._candidates if job not in taken]

    def _holders(self) -> Iterator[Job]:
        """The jobs with KV cache on the device, less those that the walk took from the queues."""
        yield from self._roster.paused
        yield from (
            job for job in (*self._candidates, *self.held) if job.state is not JobState.QUEUED
        )

    def _in_order(self) -> Iterator[Job]:
        """Merge the candidates with the queues, which lose what is yielded.

        Once the budget takes no queued job, only those with KV cache are worth a look.
        """
        take_queues = self.budget.limits.admit_queued
        for job in self._candidates:
            while take_queues and (head := self._first_welcome()) is not None:
                if head[0].key > job.key:
                    break
                yield head[1].pop()
            yield job
        while take_queues and (head := self._first_welcome()) is not None:
            yield head[1].pop()

    def _first_welcome(self) -> tuple[Job, ReadyQueue] | None:
        """The first of those that wait whom the budget may still admit."""
        head = self._roster.first_waiting()
        if head is not None and head[1] is self._roster.queued and not self.budget.takes(head[0]):
            return self._roster.first_holder()
        return head
