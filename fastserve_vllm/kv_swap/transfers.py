"""What crosses between the scheduler's swap manager and the workers."""

from dataclasses import dataclass, field
from enum import Enum
from typing import TypeVar

_Key = TypeVar("_Key", int, str)
_Number = TypeVar("_Number", int, float)


class Direction(Enum):
    """Where a transfer copies to: `OUT` from device to host, `IN` from host to device."""

    OUT = "out"
    IN = "in"


@dataclass(frozen=True, slots=True)
class Transfer:
    """Whole blocks to copy; every worker copies its own shard of them.

    Attributes:
        transfer_id: unique, rising.
        direction: see `Direction`.
        device_blocks: block ids on the device.
        host_blocks: block ids in each worker's host pool, as many.
        urgent: the step that carries it must not compute before it is done.
    """

    transfer_id: int
    direction: Direction
    device_blocks: tuple[int, ...]
    host_blocks: tuple[int, ...]
    urgent: bool = False


@dataclass(slots=True)
class Report:
    """What one worker did since its last report, or several workers' reports merged.

    Attributes:
        done: workers that finished a transfer, failed ones included, by transfer id.
        failed: causes of failed transfers by transfer id.
        copied_bytes: by `Direction.value`, summed over workers.
        copy_s: seconds that those copies took, by `Direction.value`, summed over workers.
        waited_s: seconds that steps stood still for urgent transfers; the largest of the workers'.
        copies: transfers that did not fail, by "rank,direction" of the worker that finished them.
    """

    done: dict[int, int] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    copied_bytes: dict[str, int] = field(default_factory=dict)
    copy_s: dict[str, float] = field(default_factory=dict)
    waited_s: float = 0.0
    copies: dict[str, int] = field(default_factory=dict)

    def merge(self, other: "Report") -> "Report":
        """Both reports as one."""
        return Report(
            done=_sum(self.done, other.done),
            failed={**other.failed, **self.failed},
            copied_bytes=_sum(self.copied_bytes, other.copied_bytes),
            copy_s=_sum(self.copy_s, other.copy_s),
            waited_s=max(self.waited_s, other.waited_s),
            copies=_sum(self.copies, other.copies),
        )


def _sum(one: dict[_Key, _Number], other: dict[_Key, _Number]) -> dict[_Key, _Number]:
    return {key: one.get(key, 0) + other.get(key, 0) for key in {**one, **other}}
