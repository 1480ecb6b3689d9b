"""Who of several replicas gets a request: the policies of vLLM's own balancer and its routers.

| here | elsewhere |
|---|---|
| `round-robin` | `roundrobin` of the production stack's router, `round_robin` of vllm-router |
| `least-loaded` | vLLM's balancer of data-parallel engines, `DPLBAsyncMPClient` |
| `prefix-affine` | `prefixaware` of the production stack's router |
"""

import random
from collections.abc import Callable, Sequence
from typing import Protocol

from fastserve_vllm.traces import Request


class Replica(Protocol):
    """What a router sees of a replica when a request arrives."""

    @property
    def unfinished(self) -> int:
        """Requests that it got and that are not done."""
        ...

    @property
    def waiting(self) -> int:
        """Those of them that have no place on the device."""
        ...

    @property
    def kv_usage(self) -> float:
        """Share of its KV blocks in use."""
        ...


class Router(Protocol):
    """Chooses a replica for each request, in order of arrival."""

    def choose(self, request: Request, replicas: Sequence[Replica]) -> int:
        """The index of the replica that gets the request."""
        ...


class RoundRobin:
    """One after the other."""

    def __init__(self) -> None:
        self._next = 0

    def choose(self, request: Request, replicas: Sequence[Replica]) -> int:
        """The one after the last."""
        chosen = self._next % len(replicas)
        self._next = chosen + 1
        return chosen


class LeastLoaded:
    """The fewest unfinished requests; of several, the first from a place that moves on by one.

    Requests that wait at a replica whose KV cache is more than half full count for more: up to
    three times, when it is full.
    """

    _FULL_WEIGHT = 6.0
    _FREE_USAGE = 0.5

    def __init__(self) -> None:
        self._first = 0

    def choose(self, request: Request, replicas: Sequence[Replica]) -> int:
        """The least loaded one."""
        scores: list[float] = [replica.unfinished for replica in replicas]
        usages = [replica.kv_usage for replica in replicas]
        if max(usages) > self._FREE_USAGE:
            for index, usage in enumerate(usages):
                over = max(usage - self._FREE_USAGE, 0.0)
                scores[index] += self._FULL_WEIGHT * over * replicas[index].waiting
        least, first = min(scores), self._first % len(scores)
        self._first = first + 1
        if least in scores[first:]:
            return scores.index(least, first)
        return scores.index(least)


class PrefixAffine:
    """Where the prefix was sent before; a new prefix, or none, goes anywhere.

    The production stack's router finds the longest prefix it has seen in the text of the prompt;
    here a request names its prefix. Neither forgets one, nor looks at the load.
    """

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(f"router {seed}").random  # noqa: S311 - no secret
        self._homes: dict[str, int] = {}

    def choose(self, request: Request, replicas: Sequence[Replica]) -> int:
        """The home of its prefix."""
        home = self._homes.get(request.prefix) if request.prefix else None
        if home is None:
            home = int(self._random() * len(replicas))
            if request.prefix:
                self._homes[request.prefix] = home
        return home


ROUTERS: dict[str, Callable[[], Router]] = {
    "round-robin": RoundRobin,
    "least-loaded": LeastLoaded,
    "prefix-affine": PrefixAffine,
}
