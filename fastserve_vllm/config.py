"""User configuration: one frozen, validated record.

Every field states its unit and why its default is what it is. A wrong key, type or value raises
`ConfigError` at construction, naming the field and what it accepts.
"""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, Literal, get_args

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

PolicyName = Literal["fastserve", "mlfq", "fcfs", "fixed-priority"]
SwapMode = Literal["proactive", "reactive", "recompute"]
POLICY_NAMES: tuple[str, ...] = get_args(PolicyName)

_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class ConfigError(ValueError):
    """A FastServe configuration that cannot be used; the message names the field."""


@dataclass(frozen=True, config=_STRICT)
class FastServeConfig:
    """What a user may set; `FastServeConfig.parse` is the way in from JSON or keyword arguments."""

    policy: PolicyName = "fastserve"
    """Which policy orders requests: skip-join MLFQ (`fastserve`), MLFQ without skip-join (`mlfq`),
    arrival order (`fcfs`), or shortest prompt first (`fixed-priority`)."""

    base_quantum_s: float | None = Field(default=None, gt=0)
    """Seconds of service in the highest level. None: the smallest decode step seen so far, as in
    section 4.1 of the paper; it then follows the model and the machine by itself."""

    quantum_ratio: float = Field(default=2.0, gt=1)
    """Quantum of a level over that of the level above it. The paper uses 2."""

    num_levels: int = Field(default=10, ge=1, le=64)
    """Number of levels; the last has no quantum and is served in arrival order. 10 levels with
    ratio 2 tell answers apart up to 511 base quanta of service."""

    steady_levels: int = Field(default=8, ge=1, le=64)
    """Levels that are open at any load. The ones below open only while more than 1.5 batches of
    requests wait: among long answers, arrival order gives the best mean end-to-end latency as long
    as few wait. `num_levels` or more keeps all levels open."""

    starvation_limit_s: float | None = Field(default=3.0, gt=0)
    """Seconds a request may wait for its next turn before it is promoted to the highest level;
    None switches promotion off."""

    swap_mode: SwapMode = "proactive"
    """What becomes of a preempted request's KV cache when the device runs out of blocks. It moves
    to host memory ahead of need (`proactive`), moves when the room or the KV cache is needed and
    the step waits for the copy (`reactive`), or is dropped and computed again (`recompute`)."""

    swap_space_gib: float = Field(default=4.0, gt=0)
    """Host memory for swapped KV cache, GiB a worker. It is pinned where the platform can."""

    step_time_profile: str | None = None
    """Path of a saved step-time profile (JSON). It pins the model: nothing is learned online, so
    that runs can be reproduced."""

    save_step_time_profile: str | None = None
    """Path to which the learned step-time profile is written whenever the engine runs dry, at most
    every 5 seconds, and when it shuts down."""

    @classmethod
    def parse(cls, raw: Mapping[str, Any] | None) -> "FastServeConfig":
        """Validate `raw`.

        Raises:
            ConfigError: an unknown key, a wrong type, or a value out of range.
        """
        if not isinstance(raw, Mapping | None):
            raise ConfigError(f"fastserve_config must be a mapping of names, got {raw!r}")
        try:
            return cls(**(raw or {}))
        except ValidationError as error:
            raise ConfigError("; ".join(_explain(cls, e) for e in error.errors())) from None
        except TypeError as error:
            raise ConfigError(f"fastserve_config must be a mapping of names: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The JSON-ready mapping that `parse` accepts."""
        return asdict(self)


def _explain(cls: type, error: Any) -> str:
    """One sentence for a pydantic error: field, what it accepts, what was given."""
    name = ".".join(str(part) for part in error["loc"][:1])
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = ", ".join(sorted(f.name for f in fields(cls)))
        return f"fastserve_config.{name} is not a known key; known keys are: {known}"
    return f"fastserve_config.{name}: {error['msg']} (got {error['input']!r})"
