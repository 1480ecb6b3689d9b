"""What the policy knows of a request."""

from dataclasses import dataclass, field
from enum import Enum
from operator import attrgetter
from typing import Any


class JobState(Enum):
    """Where a live request is; invariant I1: exactly one of these.

    `BLOCKED` waits for something other than a turn (a grammar, input, remote KV). `QUEUED` could
    run and holds no batch place. `RUNNING` is in the batch. `PAUSED` was left out of the batch
    and keeps its KV cache on the device. `SWAPPING_OUT`, `SWAPPED` and `SWAPPING_IN`: its KV cache
    is on its way to the host, there, and on its way back; it cannot run until it is `PAUSED` again.
    """

    BLOCKED = "blocked"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SWAPPING_OUT = "swapping_out"
    SWAPPED = "swapped"
    SWAPPING_IN = "swapping_in"


OrderKey = tuple[float, ...]
"""Position in the total order; smaller runs first. Ends in a number unique to the job."""


@dataclass(slots=True, eq=False)
class Job:
    """A live request, as far as scheduling is concerned. Never holds its true output length (I8).

    Attributes:
        job_id: the request's id.
        prompt_tokens: tokens of the prompt.
        priority: vLLM's request priority, a class above the levels; smaller runs first.
        first_step_s: predicted seconds from first being scheduled to the first token.
        handle: the host's own object for the request; the policy never looks into it.
    """

    job_id: str
    prompt_tokens: int
    priority: int = 0
    first_step_s: float = 0.0
    handle: Any = None

    state: JobState = JobState.BLOCKED
    level: int = 0
    key: OrderKey = ()
    arrival: int = 0
    """Sequence number of the arrival: total, and independent of the clock's resolution."""
    entry: int = 0
    """Sequence number of its entry into the current level."""
    joined_s: float = 0.0
    """When it became able to run, on the scheduler's clock."""
    attained_service_s: float = 0.0
    """Service attained in the current level up to the last time the job stopped running."""
    served_s: float = 0.0
    """Service attained in its life, likewise."""
    longer_s: float = 0.0
    """Service that its answer is expected to take beyond others', as of entering the last level."""
    grace_s: float = 0.0
    """Seconds by which its quantum is longer, in the level that it joined."""
    turn_s: float | None = None
    """Seconds of the turn that ageing has given it; None: it has none."""
    turn_tokens: int = 0
    """Tokens that stood between it and its first one when that was last looked at in a turn."""
    running_since_s: float = 0.0
    """Reading of the policy's service clock when the job last started to run."""
    waiting_since_s: float = 0.0
    """When the job last began to wait for a turn, on the scheduler's clock."""
    next_tokens: int = 1
    """Tokens its next step would compute, were the token budget unlimited."""
    swapped_tokens: int = 0
    """Tokens of a queued job whose KV cache comes back from the host when it starts."""
    unserved: bool = False
    """Whether its KV cache came back from the host and it has not run since."""
    ticket: Any = field(default=None, repr=False)
    """Its live entry in the ready queue; an entry that is not the ticket is stale."""
    expiry: Any = field(default=None, repr=False)
    """Its live entry among the quantum expiries; likewise."""
    due: Any = field(default=None, repr=False)
    """Its live entry among the waiting jobs that may fall due; likewise."""


by_key = attrgetter("key")
"""Sorts jobs into the total order."""
