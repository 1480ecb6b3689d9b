"""User configuration: one frozen, validated record.

Every field states its unit and why its default is what it is. A wrong key, type or value raises
`ConfigError` at construction, naming the field and what it accepts.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from typing import Annotated, Any, Literal, get_args

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

PolicyName = Literal["fastserve", "mlfq", "fcfs", "fixed-priority"]
SwapMode = Literal["proactive", "reactive", "recompute"]
Objective = Literal["balanced", "smooth", "paper"]
AgeingRule = Literal["relative", "absolute"]
POLICY_NAMES: tuple[str, ...] = get_args(PolicyName)
OwnPolicy = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]

_ACCEPTS = "Input should be "
# Said instead of what pydantic says of a pattern.
_OWN_POLICY = "module:Class, a policy of your own"
_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


CHECK_EVERY = "FASTSERVE_CHECK_EVERY"
"""Environment variable: check the invariants in every so many steps, and stop where one is broken.
For soak tests: a check looks at every request."""


class ConfigError(ValueError):
    """A FastServe configuration that cannot be used; the message names the field."""


@dataclass(frozen=True, config=_STRICT)
class FastServeConfig:
    """What a user may set; `FastServeConfig.parse` is the way in from JSON or keyword arguments."""

    policy: PolicyName | OwnPolicy = "fastserve"
    """Which policy orders requests: skip-join MLFQ (`fastserve`), MLFQ without skip-join (`mlfq`),
    arrival order (`fcfs`), or shortest prompt first (`fixed-priority`). `module:Class`: one of your
    own, a `fastserve_vllm.policy.base.Policy` that is made without arguments; its module is
    imported in the engine's process."""

    base_quantum_s: float | None = Field(default=None, gt=0)
    """Seconds of service in the highest level. None: a decode step of a full batch, so a token of
    each request; `paper`: the smallest decode step seen so far (section 4.1). Either follows the
    model and the machine by itself."""

    objective: Objective = "balanced"
    """Where the waiting goes under overload (docs/objectives.md). `balanced`: the first token at
    once, a finite ladder, and turns for whoever can have one for nothing. `smooth`: the gap between
    two tokens stays within `max_token_gap_s` while the load allows, at the price of more KV swap.
    `paper`: as published, for comparison. It sets the defaults of the nine fields that follow."""

    quantum_ratio: float | None = Field(default=None, gt=1)
    """Quantum of a level over that of the level above it. None: 2.1; `paper`: 2."""

    num_levels: int | None = Field(default=None, ge=1, le=64)
    """Number of levels; the last has no quantum. None: 7, which tell answers apart up to 77 base
    quanta of service, about as many tokens; `paper`: 64."""

    service_weight: float | None = Field(default=None, ge=0)
    """Seconds of age that a second of attained service counts for in the last level; 0 is arrival
    order. None: 50; `paper`: 0."""

    first_token_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the time for which first tokens may hold up others: prefills, as predicted, beyond a
    decode step of a full batch. Who comes beyond it joins the last level, and relative ageing gives
    it a turn. Where prompts are most of the work, a smaller share serves answers better. None: 1,
    first tokens at once."""

    learn_lengths: bool | None = None
    """Whether the last level expects answers to be as long as those to prompts of about the same
    length were, as far as that has told them apart. None: yes; `paper`: no."""

    ageing: AgeingRule | None = None
    """Who is raised after waiting. `relative`: it waits for `ageing_ratio` times the service it has
    attained and gets one turn. `absolute`: it waits for `starvation_limit_s` and goes to the
    highest level, the paper's rule. None: `relative`; `paper`: `absolute`."""

    ageing_ratio: float | None = Field(default=None, ge=0)
    """Seconds of waiting for each second of service that a request has attained before it gets a
    turn, where that costs more than a batch place. None: 20; `smooth`: 0, which lets nobody wait
    for longer than `max_token_gap_s`."""

    starvation_limit_s: Annotated[float, Field(gt=0)] | Literal["off"] | None = None
    """Seconds a request may wait for its next turn at most, and `off` to let it wait for ever.
    None: 6; `paper`: 0.3, from section 4.1."""

    max_token_gap_s: float | None = Field(default=None, gt=0)
    """Bound of the gap between two tokens with relative ageing, seconds. A prompt is prefilled in
    chunks that respect it, where chunked prefill is on. None: 0.4, two tokens at the five a second
    that people read, or 32 base quanta where steps are so slow that this is longer."""

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

    trace_file: str | None = Field(default=None, min_length=1)
    """Path of a file to which every state change of every request is written, as JSON lines. With
    data parallelism each engine adds its number to the name. At most 4 files of 64 MiB are kept."""

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
            raise ConfigError("; ".join(_explain(cls, error.errors()))) from None
        except TypeError as error:
            raise ConfigError(f"fastserve_config must be a mapping of names: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The JSON-ready mapping that `parse` accepts."""
        return asdict(self)


def _explain(cls: type, errors: Iterable[Any]) -> list[str]:
    """One sentence for each field that pydantic refused: what it accepts, what was given.

    Of a field that accepts several types, pydantic says for each why it is not that.
    """
    refused: dict[str, list[Any]] = {}
    for error in errors:
        refused.setdefault(".".join(str(part) for part in error["loc"][:1]), []).append(error)
    sentences = []
    for name, [first, *others] in refused.items():
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            known = ", ".join(sorted(f.name for f in fields(cls)))
            sentences.append(f"fastserve_config.{name} is not a known key; known keys are: {known}")
            continue
        accepts = [first["msg"], *(other["msg"].removeprefix(_ACCEPTS) for other in others)]
        if name == "policy":
            accepts = [first["msg"], _OWN_POLICY]
        sentences.append(
            f"fastserve_config.{name}: {' or '.join(accepts)} (got {first['input']!r})"
        )
    return sentences


def check_period_steps() -> int:
    """Steps from one integrity check to the next, from the environment; 0: none.

    Raises:
        ConfigError: the variable is not a number of at least 0.
    """
    text = os.environ.get(CHECK_EVERY, "0")
    if not text.isdecimal():
        raise ConfigError(f"{CHECK_EVERY} is a number of steps, 0 for never; got {text!r}")
    return int(text)
