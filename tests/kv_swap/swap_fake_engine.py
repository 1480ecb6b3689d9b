"""An engine in small: requests compute, leave for the host and come back, in any order.

Contents are modelled token by token and on every worker. Invariant I5 is checked where an engine
would rely on it: before a step computes on KV, and when a copy is reported to have worked.
"""

import copy
from dataclasses import dataclass, field
from enum import Enum
from math import lcm
from random import Random

from swap_fake_worker import NULL, POISON, FakeDevice, FakeWorker

from fastserve_vllm.kv_swap.manager import Completion, CopyState, SwapManager
from fastserve_vllm.kv_swap.transfers import Direction, Report, Transfer

FAMILIES = 2
NAMES = [f"r{number}" for number in range(7)]
MAX_TOKENS = 24
MAX_DRAFTS = 3


class Place(Enum):
    """Where a request's KV is, as the engine sees it. `NOWHERE`: to be computed (again)."""

    NOWHERE = "nowhere"
    RESIDENT = "resident"
    LEAVING = "leaving"
    AWAY = "away"
    COMING = "coming"


STATES = {
    Place.NOWHERE: (None, CopyState.SAVING, CopyState.RETAINED),
    Place.RESIDENT: (None, CopyState.RETAINED, CopyState.SAVING),
    Place.LEAVING: (CopyState.SWAPPING_OUT,),
    Place.AWAY: (CopyState.SWAPPED,),
    Place.COMING: (CopyState.SWAPPING_IN,),
}


@dataclass(eq=False)
class FakeRequest:
    """A request. Its first `shared` tokens are those of all requests of its family.

    Attributes:
        expected: what each token's KV must be, by group.
        computed: tokens with KV. drafts: tokens after them that were computed and rejected.
        planned: tokens that the next step computes. unloaded: the next step brings its KV.
        suspects: urgent transfers of it that failed, which it has not been told of.
        tainted: its KV on the device is wrong because of one of them.
        doomed: its copy was invalidated while moving.
        transfer: the copy that is moving. saving: the copy in advance that is in flight.
    """

    name: str
    lineages: list[int]
    shared: int
    goal: int
    groups: int
    version: int = 0
    place: Place = Place.NOWHERE
    tables: list[list[int]] = field(default_factory=list)
    expected: list[list[int]] = field(default_factory=list)
    computed: int = 0
    drafts: int = 0
    planned: int = 0
    unloaded: bool = False
    suspects: set[int] = field(default_factory=set)
    tainted: bool = False
    doomed: bool = False
    transfer: Transfer | None = None
    saving: Transfer | None = None
    saving_doomed: bool = False

    def start(self, version: int) -> None:
        """Begin from nothing, with the weights of that version."""
        self.place, self.version = Place.NOWHERE, version
        self.tables = [[] for _ in range(self.groups)]
        self.computed = self.drafts = self.planned = 0
        self.unloaded = self.tainted = self.doomed = False
        self.suspects = set()
        self.transfer = None
        self.expected = [
            [self.content(group, position) for position in range(self.goal)]
            for group in range(self.groups)
        ]

    def content(self, group: int, position: int) -> int:
        lineage = self.lineages[position >= self.shared]
        return ((lineage * 4096 + self.version) * 4 + group) * 64 + position

    def key(self, end: int) -> tuple[int, int]:
        """Names the tokens up to `end`: not the group, not the weights."""
        return self.lineages[end > self.shared], end


@dataclass
class EngineConfig:
    """Sizes of a small world; `windows`: tokens that a group looks back, None: all."""

    host_blocks: int = 24
    device_blocks: int = 40
    block_tokens: tuple[int, ...] = (4,)
    windows: tuple[int | None, ...] = (None,)
    workers: int = 1
    failure_rate: float = 0.05
    probe_rate: float = 0.05


class FakeEngine:
    """Drives a `SwapManager` and checks I4 and I5; `pick` makes every choice."""

    def __init__(self, pick: Random, config: EngineConfig) -> None:
        self.pick, self.config = pick, config
        self.sizes = config.block_tokens
        self.manager = SwapManager(
            config.host_blocks, self.sizes, workers=config.workers, null_block=NULL
        )
        self.workers = [
            FakeWorker.make(config.device_blocks, config.host_blocks, max(self.sizes))
            for _ in range(config.workers)
        ]
        self.device = FakeDevice(config.device_blocks, self.workers)
        self.live: dict[str, FakeRequest] = {}
        self.limbo: dict[int, list[list[int]]] = {}
        self.owners: dict[int, FakeRequest] = {}
        self.version = self.serial = self.finished = self.verified = 0
        self.events: dict[str, int] = {}

    # ---- what can happen ------------------------------------------------------------------

    def arrive(self) -> None:
        """A request arrives; its name may be that of one whose transfers are still in flight."""
        free = [name for name in NAMES if name not in self.live]
        if not free:
            return
        goal = self.pick.randint(1, MAX_TOKENS)
        self.serial += 1
        lineages = [self.pick.randrange(FAMILIES), FAMILIES + self.serial]
        shared = self.pick.choice([goal, self.pick.randint(0, goal)])
        request = FakeRequest(self.pick.choice(free), lineages, shared, goal, len(self.sizes))
        request.start(self.version)
        self.live[request.name] = request

    def admit(self, request: FakeRequest) -> None:
        """A request without KV becomes resident, with what the prefix cache has of it."""
        hit = self.hit_tokens(request, request.goal - 1)
        request.tables = self.adopt(request, hit)
        request.computed, request.place = hit, Place.RESIDENT

    def plan(self, request: FakeRequest) -> None:
        """Allocate blocks for what a resident computes in the next step, if there are enough."""
        if request.planned or request.computed == request.goal or self.pick.random() < 0.2:
            return
        planned = min(self.pick.choice([1, 1, 1, 3, 9]), request.goal - request.computed)
        end = request.computed + planned + self.pick.randint(0, MAX_DRAFTS)
        needed = [
            max(slots(end, size) - len(table), 0)
            for table, size in zip(request.tables, self.sizes, strict=True)
        ]
        if sum(needed) > len(self.device.free):
            return
        for table, number in zip(request.tables, needed, strict=True):
            table.extend(self.device.take(number))
        request.planned, request.drafts = planned, 0

    def step(self) -> None:
        """Hand the transfers over, then compute what was planned."""
        transfers = self.manager.take_transfers()
        self.now([t for t in transfers if t.urgent and t.direction is Direction.OUT])
        self.device.compute_begins()
        self.now([t for t in transfers if t.urgent and t.direction is Direction.IN])
        for worker in self.workers:
            worker.queue += [t for t in transfers if not t.urgent]
        for request in self.live.values():
            if request.place is Place.RESIDENT:
                self.load(request)
                self.compute(request)

    def now(self, transfers: list[Transfer]) -> None:
        for transfer in transfers:
            for worker in self.workers:
                fail = self.pick.random() < self.config.failure_rate
                worker.copy(transfer, fail=fail)
                if fail:
                    self.count("urgent failures")
                    self.owners[transfer.transfer_id].suspects.add(transfer.transfer_id)

    def load(self, request: FakeRequest) -> None:
        """Attention reads the KV: it is right, or a transfer that failed will be told of."""
        if not request.unloaded and not request.planned:
            return
        self.verified += 1
        request.tainted |= not self.is_right(request)
        assert request.suspects or not request.tainted, "I5: KV is wrong before a step"
        request.unloaded = False
        self.publish(request)

    def compute(self, request: FakeRequest) -> None:
        end = request.computed + request.planned
        if request.planned:
            request.drafts = self.pick.randint(0, self.room_for_drafts(request, end))
        for group, table in enumerate(request.tables):
            size = self.sizes[group]
            for position in range(request.computed, end + request.drafts * bool(request.planned)):
                real = position < end and not request.tainted
                token = request.expected[group][position] if real else POISON
                for worker in self.workers:
                    worker.device[table[position // size]][position % size] = token
        request.computed, request.planned = end, 0
        for group, table in enumerate(request.tables):
            for slot in range(0 if request.saving else self.first_seen(group, end)):
                self.device.drop([table[slot]])
                table[slot] = NULL
        self.publish(request)

    def room_for_drafts(self, request: FakeRequest, end: int) -> int:
        ends = [len(t) * size for t, size in zip(request.tables, self.sizes, strict=True)]
        return max(min([MAX_DRAFTS, *(last - end for last in ends)]), 0)

    def swap_out(self, request: FakeRequest, *, urgent: bool) -> None:
        """A resident leaves; what it was to compute is not computed."""
        if request.saving:
            assert not self.manager.has_room(request.name, request.tables, request.computed)
            if urgent:
                self.count("saves abandoned")
                self.restart(request)
            return
        request.planned = 0
        tokens = request.computed + request.drafts
        args = (request.name, request.tables, tokens)
        keys = self.some_keys(request)
        room = self.manager.has_room(*args, keys=keys)
        others = {name: self.manager.state(name) for name in self.live}
        transfer = self.manager.swap_out(*args, keys=keys, urgent=urgent)
        assert (transfer is not None) == room
        if transfer is None:
            assert others == {name: self.manager.state(name) for name in self.live}
            self.refused(request, args, keys, urgent=urgent)
            return
        self.count("urgent outs" if urgent else "outs")
        held = {block for table in request.tables for block in table if block != NULL}
        assert held.issuperset(transfer.device_blocks)
        self.owners[transfer.transfer_id] = request
        if transfer.device_blocks and not urgent:
            request.place, request.transfer = Place.LEAVING, transfer
            return
        request.place, request.unloaded = Place.AWAY, False
        self.device.guarded.update(transfer.device_blocks)
        self.give_up_device(request)

    def refused(self, request, args, keys, *, urgent) -> None:
        """There is no room, even without the copies that could be dropped."""
        self.count("no room")
        if self.pick.random() < self.config.probe_rate:
            probe = copy.deepcopy(self.manager)
            for other in list(probe._copies._idle):
                if other.request_id != request.name:
                    probe.invalidate(other.request_id)
            assert not probe.has_room(*args, keys=keys), "there was room"
        if urgent and (request.unloaded or self.pick.random() < 0.5):
            self.restart(request)
        elif urgent:
            # What it will compute again is what its copy has: that stays valid.
            suspects = request.suspects
            self.give_up_device(request)
            request.start(self.version)
            request.suspects = suspects

    def save(self, request: FakeRequest) -> None:
        """A resident's full blocks are copied in advance, and it goes on."""
        step = lcm(*self.sizes)
        tokens = request.computed // step * step
        if request.saving or request.unloaded or not tokens:
            return
        transfer = self.manager.save(
            request.name, request.tables, tokens, keys=self.some_keys(request)
        )
        if transfer is not None and transfer.device_blocks:
            self.count("saves")
            self.owners[transfer.transfer_id] = request
            request.saving, request.saving_doomed = transfer, False

    def swap_in(self, request: FakeRequest, *, urgent: bool) -> None:
        """A request that is away comes back, if the device has room; its drafts do not."""
        wanted = request.computed
        first_token = self.hit_tokens(request, wanted)
        needed = [
            slots(wanted, size) - max(first_token // size, self.first_seen(group, wanted))
            for group, size in enumerate(self.sizes)
        ]
        extra = self.pick.randint(0, 1)
        if sum(max(number, 0) + extra for number in needed) > len(self.device.free):
            return
        assert self.manager.tokens(request.name) == wanted + request.drafts
        request.tables = self.adopt(request, first_token)
        for group, table in enumerate(request.tables):
            nulls = self.first_seen(group, wanted) - len(table)
            table.extend([NULL] * nulls)
            table.extend(self.device.take(max(needed[group], 0) + extra))
        tokens = wanted if request.drafts or self.pick.random() < 0.5 else None
        transfer = self.manager.swap_in(
            request.name, request.tables, tokens, first_token=first_token, urgent=urgent
        )
        self.count("urgent ins" if urgent else "ins")
        request.drafts = 0
        self.owners[transfer.transfer_id] = request
        if transfer.device_blocks and not urgent:
            request.place, request.transfer = Place.COMING, transfer
        else:
            request.place, request.unloaded = Place.RESIDENT, bool(transfer.device_blocks)

    def leave(self, request: FakeRequest) -> None:
        """The request finishes or is aborted, wherever it is."""
        moving = request.transfer or request.saving
        sent = moving is not None and not any(
            flight.transfer is moving and not flight.sent for flight in self.manager._in_flight
        )
        direction = self.manager.discard(request.name)
        assert self.manager.state(request.name) is None
        assert (direction is not None) == sent
        del self.live[request.name]
        if direction is None:
            self.give_up_device(request)
        else:
            self.count("aborted copies")
            assert direction is moving.direction
            self.limbo[moving.transfer_id] = request.tables

    def invalidate(self, request: FakeRequest) -> None:
        """The request's copy is not to be used."""
        self.manager.invalidate(request.name)
        if request.place in (Place.LEAVING, Place.COMING):
            request.doomed = True
        else:
            self.restart(request)

    def invalidate_all(self, *, weights: bool) -> None:
        """No copy is to be used; with new weights, no KV either."""
        self.manager.invalidate_all()
        self.version += weights
        if weights:
            self.device.forget_content()
        for request in self.live.values():
            if request.place in (Place.LEAVING, Place.COMING):
                request.doomed = True
            elif weights or request.place is Place.AWAY:
                self.restart(request)
            request.saving_doomed = True

    def work(self) -> None:
        """A worker copies anything that it was given."""
        worker = self.pick.choice(self.workers)
        if worker.queue:
            transfer = worker.queue.pop(self.pick.randrange(len(worker.queue)))
            worker.copy(transfer, fail=self.pick.random() < self.config.failure_rate)

    def report(self) -> None:
        """Workers report something of what they have done, together or one after the other."""
        merged = Report()
        for worker in self.workers:
            report = worker.report(self.pick)
            if self.pick.random() < 0.5:
                merged = merged.merge(report)
            else:
                self.take_in(report)
        self.take_in(merged)

    def take_in(self, report: Report) -> None:
        for completion in self.manager.report(report):
            self.complete(completion)

    # ---- what is told ---------------------------------------------------------------------

    def complete(self, completion: Completion) -> None:
        if completion.discarded:
            for table in self.limbo.pop(completion.transfer_id):
                self.device.drop(table)
            return
        request = self.live[completion.request_id]
        assert self.owners[completion.transfer_id] is request, "a request hears of another's copy"
        if request.saving and completion.transfer_id == request.saving.transfer_id:
            self.saved(request, completion)
        elif completion.cause is None:
            self.worked(request, completion)
        elif completion.lost or request.version != self.version:
            self.count("lost")
            self.restart(request)
        else:
            self.count("still there")
            assert request.place is Place.LEAVING
            assert self.is_right(request), "I5: KV is wrong after a copy out that failed"
            request.place, request.transfer, request.doomed = Place.RESIDENT, None, False

    def saved(self, request: FakeRequest, completion: Completion) -> None:
        request.saving = None
        if completion.cause is None:
            assert request.place is Place.RESIDENT
            assert not request.saving_doomed
            assert not request.tainted
            self.count("saved")
        elif completion.lost and request.place is not Place.NOWHERE:
            self.restart(request)
        assert self.manager.state(request.name) is (
            None if completion.cause else CopyState.RETAINED
        )

    def worked(self, request: FakeRequest, completion: Completion) -> None:
        place = Place.LEAVING if completion.direction is Direction.OUT else Place.COMING
        assert request.place is place
        assert request.transfer.transfer_id == completion.transfer_id
        assert not request.doomed, "an invalidated copy was reported to be good"
        # A swap-in that was overtaken by the swap-out did not bring anything.
        assert request.unloaded or self.is_right(request), f"I5: KV is wrong, {place.value}"
        assert not request.tainted
        self.verified += 1
        request.transfer = None
        if place is Place.LEAVING:
            request.place, request.unloaded = Place.AWAY, False
            self.give_up_device(request)
        else:
            request.place = Place.RESIDENT
            self.publish(request)

    def restart(self, request: FakeRequest) -> None:
        self.manager.invalidate(request.name)
        self.give_up_device(request)
        request.start(self.version)
        request.saving_doomed = True

    # ---- what must hold -------------------------------------------------------------------

    def check(self) -> None:
        self.manager.check_integrity()
        tables = [table for request in self.live.values() for table in request.tables]
        tables += [table for limbo in self.limbo.values() for table in limbo]
        self.device.check_integrity(tables)
        for request in self.live.values():
            state = self.manager.state(request.name)
            assert (state is CopyState.SAVING) == (request.saving is not None)
            assert state in STATES[request.place], f"{request.name} is {request.place}, not {state}"

    def is_right(self, request: FakeRequest) -> bool:
        """Whether every token's KV is what it should be, on every worker."""
        for group, table in enumerate(request.tables):
            size, expected = self.sizes[group], request.expected[group]
            for slot in range(slots(request.computed, size)):
                block = table[slot]
                right = expected[slot * size : min((slot + 1) * size, request.computed)]
                if block == NULL:
                    assert slot < self.first_seen(group, request.computed)
                elif any(w.device[block][: len(right)] != right for w in self.workers):
                    return False
        return True

    def drain(self) -> None:
        """Left alone, every request finishes, and nothing is left behind."""
        self.config.failure_rate, self.pick = 0.0, Random(0)
        for _ in range(40 * (len(self.live) + 1)):
            self.flush()
            if not self.live:
                break
            # One after the other: two that do not fit together could evict each other for ever.
            self.bring_forward(next(iter(self.live.values())))
        assert not self.live, "a request never finishes"
        self.flush()
        manager = self.manager
        assert manager.in_flight == 0
        assert not self.limbo
        assert len(self.device.free) == self.config.device_blocks - 1
        assert manager.free_blocks == self.config.host_blocks
        assert not manager._pool._by_key
        assert not manager._returning
        assert manager.reclaimable_blocks == 0

    def flush(self) -> None:
        """All that is in flight lands."""
        self.step()
        while any(worker.queue or worker.done for worker in self.workers):
            self.work()
            self.report()
        self.check()
        assert not any(request.suspects for request in self.live.values()), "nobody was told"

    def bring_forward(self, request: FakeRequest) -> None:
        if request.place is Place.NOWHERE:
            self.admit(request)
        elif request.place is Place.AWAY:
            self.swap_in(request, urgent=self.pick.random() < 0.5)
        if request.place is Place.RESIDENT and request.computed == request.goal:
            self.leave(request)
            self.finished += 1
        elif request.place is Place.RESIDENT:
            self.plan(request)
        elif request.place is not Place.COMING:
            self.evict(request)
        if request.place is Place.RESIDENT and not request.planned and request.name in self.live:
            self.evict(request)

    def evict(self, but: FakeRequest) -> None:
        """Make room on the device."""
        for other in list(self.live.values()):
            if other is not but and other.place is Place.RESIDENT:
                self.swap_out(other, urgent=True)

    # ---- helpers --------------------------------------------------------------------------

    def count(self, event: str) -> None:
        self.events[event] = self.events.get(event, 0) + 1

    def some(self, *places: Place) -> FakeRequest | None:
        requests = self.all(*places or Place)
        return self.pick.choice(requests) if requests else None

    def all(self, *places: Place) -> list[FakeRequest]:
        return [request for request in self.live.values() if request.place in places]

    def first_seen(self, group: int, tokens: int) -> int:
        """First slot that a request with so many tokens still needs."""
        window = self.config.windows[group]
        return 0 if window is None else max(tokens - window, 0) // self.sizes[group]

    def hit_tokens(self, request: FakeRequest, limit: int) -> int:
        """Tokens that the device has already: a boundary of every group's blocks."""
        step = lcm(*self.sizes)
        for tokens in range(limit // step * step, 0, -step):
            if all(
                (group, request.key((slot + 1) * size)) in self.device.cached
                for group, size in enumerate(self.sizes)
                for slot in range(self.first_seen(group, tokens), tokens // size)
            ):
                return tokens
        return 0

    def adopt(self, request: FakeRequest, tokens: int) -> list[list[int]]:
        """Tables of cached blocks; what is out of the window is now and then there too."""
        generous = self.pick.random() < 0.3
        tables = []
        for group, size in enumerate(self.sizes):
            seen = self.first_seen(group, tokens)
            table = []
            for slot in range(tokens // size):
                block = self.device.cached.get((group, request.key((slot + 1) * size)))
                wanted = block is not None and (generous or slot >= seen)
                table.append(self.device.share(block) if wanted else NULL)
            tables.append(table)
        return tables

    def publish(self, request: FakeRequest) -> None:
        """The prefix cache learns a resident's full blocks."""
        if request.tainted or request.version != self.version or not self.is_right(request):
            return
        for group, size in enumerate(self.sizes):
            for slot in range(request.computed // size):
                block = request.tables[group][slot]
                if block != NULL:
                    self.device.publish((group, request.key((slot + 1) * size)), block)

    def some_keys(self, request: FakeRequest) -> list[list[tuple[int, int]]]:
        """Content keys, also of tokens yet to be computed: mostly all, or fewer, or none."""
        known = request.computed if request.drafts else request.goal
        groups = self.pick.choice([0, len(self.sizes), len(self.sizes)])
        keys = []
        for size in self.sizes[:groups]:
            number = known // size
            number = self.pick.choice([number, number, self.pick.randint(0, number)])
            keys.append([request.key((slot + 1) * size) for slot in range(number)])
        return keys

    def give_up_device(self, request: FakeRequest) -> None:
        for table in request.tables:
            self.device.drop(table)
        request.tables = [[] for _ in self.sizes]


def slots(tokens: int, size: int) -> int:
    """Slots that hold so many tokens."""
    return -(-tokens // size)
