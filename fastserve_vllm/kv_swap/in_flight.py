"""The transfers in flight, from being begun to having been reported by every worker."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import count

from fastserve_vllm.kv_swap.host_copy import Flight, HostCopy
from fastserve_vllm.kv_swap.host_pool import ContentKey, HostPool
from fastserve_vllm.kv_swap.transfers import Direction, Report, Transfer


class InFlight:
    """Holds the host blocks of every transfer until it has landed.

    Args:
        pool: the host's blocks.
        workers: how many report each transfer.
    """

    def __init__(self, pool: HostPool, workers: int) -> None:
        self._pool = pool
        self._workers = workers
        self._flights: dict[int, Flight] = {}
        self._unsent: dict[int, Flight] = {}
        self._ids = count()

    def __len__(self) -> int:
        return len(self._flights)

    def __iter__(self) -> Iterator[Flight]:
        """All of them, in the order in which they were begun."""
        return iter(self._flights.values())

    def begin(
        self,
        copy: HostCopy,
        direction: Direction,
        device_blocks: Sequence[int],
        host_blocks: Sequence[int],
        *,
        keys: dict[int, ContentKey] | None = None,
        urgent: bool,
    ) -> Transfer:
        """A transfer of the copy, in flight unless it is empty.

        Args:
            copy: whose host blocks they are.
            direction: where to.
            device_blocks: block ids on the device.
            host_blocks: block ids on the host, as many.
            keys: content that host blocks will have, by block.
            urgent: see `Transfer`.
        """
        number = next(self._ids)
        transfer = Transfer(number, direction, tuple(device_blocks), tuple(host_blocks), urgent)
        if device_blocks:
            flight = Flight(transfer, copy, self._workers, keys or {})
            self._pool.hold(host_blocks)
            self._flights[number] = self._unsent[number] = flight
            copy.flights.append(flight)
        return transfer

    def withdraw(self, copy: HostCopy, *directions: Direction) -> bool:
        """Take back what the workers do not know of yet; returns whether there was anything.

        Its device blocks may get new owners in this very step, which nothing would order.
        """
        withdrawn = [f for f in copy.unsent() if f.transfer.direction in directions]
        for flight in withdrawn:
            copy.flights.remove(flight)
            del self._unsent[flight.transfer.transfer_id]
            self.land(flight)
        return bool(withdrawn)

    def take(self) -> tuple[Transfer, ...]:
        """Those begun since the last call, in order; the workers know of them from now on."""
        flights = list(self._unsent.values())
        self._unsent.clear()
        for flight in flights:
            flight.sent = True
        return tuple(flight.transfer for flight in flights)

    def note(self, report: Report) -> Iterator[HostCopy]:
        """Take the report in; yields the copies whose transfers may have been reported by all.

        Raises:
            ValueError: a transfer is not in flight, or more workers report it than there are.
        """
        self._check(report)
        for number, cause in report.failed.items():
            self._flights[number].cause = cause
        for number, workers in report.done.items():
            self._flights[number].missing -= workers
        for number in sorted(report.done):
            # It has landed already where an older transfer of the copy was in the report too.
            if number in self._flights:
                yield self._flights[number].copy

    def land(self, flight: Flight) -> None:
        """The transfer touches its host blocks no more."""
        del self._flights[flight.transfer.transfer_id]
        self._pool.drop(flight.transfer.host_blocks)

    def check_integrity(self) -> None:
        """See `check_order`; and every transfer is known to its copy, and sent or to be sent.

        Raises:
            AssertionError: naming the law.
        """
        unsent = [flight for flight in self if not flight.sent]
        assert list(self._unsent.values()) == unsent, "I1: a transfer is sent xor to be sent"
        for flight in self:
            assert flight in flight.copy.flights, f"I1: {flight.transfer} has no copy"
            assert 0 <= flight.missing <= self._workers, f"I1: {flight.transfer} was reported twice"
        check_order(self, self._pool)

    def _check(self, report: Report) -> None:
        for number in (*report.done, *report.failed):
            flight = self._flights.get(number)
            if flight is None or not flight.sent:
                raise ValueError(f"transfer {number} is not in flight")
            if report.done.get(number, 0) > flight.missing:
                raise ValueError(f"transfer {number}: more reports than workers")


def check_order(flights: Iterable[Flight], pool: HostPool) -> None:
    """Law I5's part in flight: no transfer touches what an earlier one may still touch.

    Urgent transfers out are ordered at once. Urgent ones in are so too once they were handed
    over: the others of the same step are not ordered after them.

    Args:
        flights: all transfers in flight, in the order of their ids.
        pool: the host's blocks.

    Raises:
        AssertionError: naming the law.
    """
    to_device: set[int] = set()
    from_device: set[int] = set()
    to_host: set[int] = set()
    from_host: set[int] = set()
    for flight in flights:
        transfer = flight.transfer
        device, host = set(transfer.device_blocks), set(transfer.host_blocks)
        assert len(device) == len(host) == len(transfer.host_blocks), f"I5: {transfer} repeats"
        dead = flight.copy.is_abandoned
        assert dead or not device & to_device, f"I5: {transfer} touches what a transfer in writes"
        assert not host & to_host, f"I5: {transfer} touches what a transfer out writes"
        if transfer.direction is Direction.IN:
            assert not device & from_device, f"I5: {transfer} writes what a transfer out reads"
            if not (transfer.urgent and flight.sent):
                to_device |= device
                from_host |= host
        else:
            assert not host & from_host, f"I5: {transfer} writes what a transfer in reads"
            known = any(map(pool.is_published, host))
            assert not known, f"I5: {transfer} writes content that is known"
            if not transfer.urgent:
                # What is read from blocks that a request gave up while it was saved is not used.
                from_device |= set() if flight.copy.is_abandoned else device
                to_host |= host
