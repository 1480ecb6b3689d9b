"""How long steps take: measured when they end, learned, and saved as a profile."""

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from vllm.v1.core.sched.output import SchedulerOutput

from fastserve_vllm.config import ConfigError, FastServeConfig
from fastserve_vllm.policy.step_time import (
    StepShape,
    StepTimeModel,
    load_profile,
    save_profile,
)

if TYPE_CHECKING:
    from collections.abc import Callable

_PROFILE_PERIOD_S = 5.0
# Beside a model's forward pass Python runs at half its speed, for the caches are cold. So steps are
# learned from in batches, but for the first ones, on which every prediction hangs.
_LEARN_STEPS = 16
_EAGER_STEPS = 64


class EndedStep(NamedTuple):
    """A step that computed something.

    Attributes:
        shape: what it computed.
        requests: how many it ran.
        predicted_s: what the model had said, in seconds.
        actual_s: what it took.
    """

    shape: StepShape
    requests: int
    predicted_s: float
    actual_s: float


class StepTimer:
    """Measures the steps that end, and learns from them, some steps late.

    Args:
        config: names the profile to begin with, and where to save what was learned.
        engine: number of a data-parallel engine; the first one saves for all.

    Attributes:
        step_time: what was learned.
        note: told of every step when it is learned from.
        uncharged_s: seconds of the steps that ended since `take_s`.

    Raises:
        ConfigError: the profile cannot be read.
    """

    def __init__(self, config: FastServeConfig, engine: int = 0) -> None:
        self.step_time = _step_time_model(config)
        self.note: Callable[[EndedStep], None] | None = None
        self._scheduled_at: deque[float] = deque()
        # With the seconds that each took.
        self._unlearned: list[tuple[SchedulerOutput, float]] = []
        self._last_output_s = 0.0
        self.uncharged_s = 0.0
        self._profile = config.save_step_time_profile if engine == 0 else None
        self._saved_s = float("-inf")

    def scheduled(self, now_s: float) -> None:
        """A step was scheduled, empty or not."""
        self._scheduled_at.append(now_s)

    def ended(self, output: SchedulerOutput, now_s: float) -> None:
        """The oldest step in flight ended, empty or not.

        It took the seconds that it ran alone: from its start, or from the end of the one before.
        """
        # Another part of the engine may complete a step that was not planned here.
        scheduled_s = self._scheduled_at.popleft() if self._scheduled_at else now_s
        if not output.total_num_scheduled_tokens:
            return
        # A clock that was set back gives nobody service back.
        step_s = max(now_s - max(scheduled_s, self._last_output_s), 0.0)
        self._last_output_s = now_s
        self.uncharged_s += step_s
        self._unlearned.append((output, step_s))
        eager = self.step_time.observations < _EAGER_STEPS
        if eager or len(self._unlearned) >= _LEARN_STEPS:
            self.learn()

    def learn(self) -> None:
        """Learn from the steps that have ended since the last call."""
        for output, step_s in self._unlearned:
            shape = _shape_of(output)
            if self.note is not None:
                predicted_s = self.step_time.predict_s(shape)
                requests = len(output.num_scheduled_tokens)
                self.note(EndedStep(shape, requests, predicted_s, step_s))
            self.step_time.observe(shape, step_s)
        self._unlearned.clear()

    def take_s(self) -> float:
        """Seconds of the steps that ended since the last call: to be charged to those that ran."""
        seconds, self.uncharged_s = self.uncharged_s, 0.0
        return seconds

    def save_at_times(self, now_s: float) -> None:
        """Save the profile unless it was saved a moment ago."""
        if now_s - self._saved_s > _PROFILE_PERIOD_S:
            self.save(now_s)

    def save(self, now_s: float) -> None:
        """Save the profile where that is configured and a step has been measured."""
        self.learn()
        if self._profile is not None and self.step_time.min_decode_step_s is not None:
            save_profile(self.step_time, self._profile)
            self._saved_s = now_s


def _shape_of(output: SchedulerOutput) -> StepShape:
    decodes = list(output.num_scheduled_tokens.values()).count(1)
    return StepShape(
        prefill_tokens=output.total_num_scheduled_tokens - decodes,
        decodes=decodes,
        context_tokens=sum(output.scheduled_cached_reqs.num_computed_tokens),
    )


def _step_time_model(config: FastServeConfig) -> StepTimeModel:
    if config.step_time_profile is None:
        return StepTimeModel()
    try:
        return load_profile(config.step_time_profile)
    except ValueError as error:
        raise ConfigError(f"fastserve_config.step_time_profile: {error}") from None
