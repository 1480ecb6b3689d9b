"""The last plan, for as long as the next one cannot differ: most steps of a calm engine do not."""

from typing import TYPE_CHECKING

from vllm.v1.core.sched.interface import PauseState

from fastserve_vllm.policy.budget import StepLimits
from fastserve_vllm.policy.step_plan import StepPlan

if TYPE_CHECKING:
    from fastserve_vllm.scheduler import FastServeScheduler

# What a job attained since the last plan is charged with the next one.
_MOST_STEPS = 16


class StandingPlan:
    """Says in which steps there is nothing to choose.

    That is so where every live job runs and computes one token, nobody's quantum ends, and more
    blocks are free than the step and the reserve can take. Then neither planning nor showing vLLM
    the plan would change anything.

    Args:
        scheduler: it plans.

    Attributes:
        steps: how many steps the plan has stood for.
    """

    def __init__(self, scheduler: "FastServeScheduler") -> None:
        self._scheduler = scheduler
        self._plan: StepPlan | None = None
        self._calm_s = 0.0
        self._overlapping = False
        self.steps = 1

    def made(self, plan: StepPlan, limits: StepLimits, now_s: float) -> None:
        """A plan was made within these limits, and shown to vLLM."""
        planner = self._scheduler.planner
        self.steps = 1
        self._plan = None
        quiet_blocks = planner.quiet_blocks
        settled = plan.single_tokens and not plan.started and planner.roster.all_run
        if not settled or quiet_blocks is None:
            return
        # Nobody else takes any while the plan stands.
        wanted = _MOST_STEPS * len(plan.batch) * limits.block_bound + limits.headroom_blocks
        if limits.free_blocks - wanted >= quiet_blocks:
            self._plan = plan
            self._calm_s = planner.policy.calm_s(now_s)
            self._overlapping = limits.overlapping

    def again(self) -> StepPlan | None:
        """The plan, if it holds for one more step."""
        if self._plan is None or not self._holds(self._plan):
            return None
        self.steps += 1
        return self._plan

    def _holds(self, plan: StepPlan) -> bool:
        scheduler = self._scheduler
        roster = scheduler.planner.roster
        return (
            self.steps < _MOST_STEPS
            # Whoever comes, leaves or stops running changes one of the two numbers.
            and len(roster.jobs) == len(plan.batch)
            and roster.all_run
            and scheduler.timer.uncharged_s < self._calm_s
            and scheduler.step_time.revision == scheduler._followed
            and scheduler._pause_state is PauseState.UNPAUSED
            and not (self._overlapping and scheduler.demand.unready(plan.batch))
        )
