"""Several simulated engines behind a router, in one simulated time.

An engine's step is planned when it begins and takes effect when it ends, so a router always sees
the state of the moment of an arrival. A leap of an engine ends at the arrivals that it gets itself;
those of its neighbours leave it alone.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from heapq import heappop, heappush

from fastserve_vllm.config import FastServeConfig
from fastserve_vllm.simulator.engine import SimulatedEngine
from fastserve_vllm.simulator.routers import Router
from fastserve_vllm.simulator.served import ServedRequest
from fastserve_vllm.simulator.shape import EngineShape
from fastserve_vllm.traces import Request


class SimulatedReplica:
    """An engine, and the requests that came during the step that it is in.

    Attributes:
        engine: serves the requests.
        unfinished: requests that it got and that are not done.
        got: requests that it ever got.
        kv_usage: share of its KV blocks in use, as of the last step that ended.
        wakes_s: when something happens next; infinite: never.
    """

    def __init__(self, engine: SimulatedEngine) -> None:
        self.engine = engine
        self.unfinished = 0
        self.got = 0
        self.kv_usage = 0.0
        self.wakes_s = math.inf
        self._came: deque[Request] = deque()
        self._busy = False

    @property
    def waiting(self) -> int:
        """Unfinished requests that have no place on the device."""
        return self.unfinished - self.engine.planner.roster.num_residents

    def take(self, request: Request) -> None:
        """A request arrives."""
        self.unfinished += 1
        self.got += 1
        self._came.append(request)
        if len(self._came) > 1:
            return  # the first of them has ended what can be ended
        if self._busy:
            self.engine.cut(request.arrival_s)
            self.wakes_s = self.engine.ends_s
        else:
            self.wakes_s = request.arrival_s

    def turn(self) -> list[ServedRequest]:
        """What was begun has ended: take in who came, and begin the next."""
        engine, came = self.engine, self._came
        served = engine.finish() if self._busy else []
        self.unfinished -= len(served)
        self.kv_usage = 1 - engine.kv.device.count / engine.shape.device_blocks
        if came and not len(engine.planner):
            engine.now_s = max(engine.now_s, came[0].arrival_s)
        while came and came[0].arrival_s <= engine.now_s:
            engine.arrive(came.popleft())
        self._busy = bool(len(engine.planner))
        if self._busy:
            engine.begin()
            if came:
                engine.cut(came[0].arrival_s)
        self.wakes_s = engine.ends_s if self._busy else math.inf
        return served


class Fleet:
    """Replicas of one engine behind a router.

    Args:
        shape: of each engine.
        config: FastServe's configuration of each.
        replicas: how many.
        router: who gets a request.
        on_gap: as for `SimulatedEngine`.
        leap: as for `SimulatedEngine`.
    """

    def __init__(
        self,
        shape: EngineShape,
        config: FastServeConfig,
        replicas: int,
        router: Router,
        *,
        on_gap: Callable[[float, int], None] | None = None,
        leap: bool = True,
    ) -> None:
        if replicas < 1:
            raise ValueError(f"replicas must be at least 1, got {replicas}")
        self.router = router
        self.replicas = [
            SimulatedReplica(SimulatedEngine(shape, config, on_gap=on_gap, leap=leap))
            for _ in range(replicas)
        ]
        # (when, which): what is there no longer is passed over.
        self._events: list[tuple[float, int]] = []

    def serve(self, requests: Iterable[Request]) -> Iterator[ServedRequest]:
        """Serve the requests, which come in order of arrival; yields each one as it finishes.

        What ends at the very moment of an arrival ends after it.

        Raises:
            ValueError: a request can never fit on a device, or arrives before its predecessor.
            RuntimeError: an engine can make no progress.
        """
        events, replicas, now_s = self._events, self.replicas, 0.0
        for request in requests:
            if request.arrival_s < now_s:
                raise ValueError(f"request {request.id} arrives out of order")
            now_s = request.arrival_s
            while events and events[0][0] < now_s:
                yield from self._next()
            chosen = self.router.choose(request, replicas)
            replica = replicas[chosen]
            known_s = replica.wakes_s
            replica.take(request)
            if replica.wakes_s != known_s:
                heappush(events, (replica.wakes_s, chosen))
        while events:
            yield from self._next()

    def check_integrity(self) -> None:
        """Laws I1 and I4 in every replica, and nobody is lost on the way.

        Raises:
            AssertionError: naming the law.
        """
        for replica in self.replicas:
            replica.engine.check_integrity()
            there = len(replica.engine.planner) + len(replica._came)
            assert replica.unfinished == there, "I1: requests of a replica"

    def _next(self) -> list[ServedRequest]:
        when_s, index = heappop(self._events)
        replica = self.replicas[index]
        if replica.wakes_s != when_s:
            return []
        served = replica.turn()
        if len(replica.engine.planner) or replica.wakes_s < math.inf:
            heappush(self._events, (replica.wakes_s, index))
        return served
