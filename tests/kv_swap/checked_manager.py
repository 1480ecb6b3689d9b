"""A swap manager for tests that read like tables."""

from fastserve_vllm.kv_swap.manager import SwapManager
from fastserve_vllm.kv_swap.transfers import Direction, Report

SIZE = 4
OUT, IN = Direction.OUT, Direction.IN


class Manager(SwapManager):
    """A manager whose integrity is checked after everything that changes it."""

    def __init__(self, host_blocks=8, sizes=(SIZE,), **options):
        super().__init__(host_blocks, sizes, **options)

    def swap_out(self, *args, **options):
        transfer = super().swap_out(*args, **options)
        self.check_integrity()
        return transfer

    def swap_in(self, *args, **options):
        transfer = super().swap_in(*args, **options)
        self.check_integrity()
        return transfer

    def discard(self, request_id):
        direction = super().discard(request_id)
        self.check_integrity()
        return direction

    def blocks_to_copy(self, name, blocks, tokens, *, keys=()):
        """How many blocks a swap-out would copy now; nothing changes."""
        copy = self._outbound.copy_of(name)
        return len(self._outbound.plan(copy, blocks, tokens, keys).places)

    def land(self, *transfers, cause=None):
        """Every worker reports the transfers; without any, all that were to be handed over."""
        transfers = transfers or self.take_transfers()
        numbers = [transfer.transfer_id for transfer in transfers]
        report = Report(dict.fromkeys(numbers, self._in_flight._workers))
        if cause is not None:
            report.failed = dict.fromkeys(numbers, cause)
        completions = self.report(report)
        self.check_integrity()
        return completions

    def out(self, name, blocks, tokens, keys=()):
        """Swap a request with one group out, and wait for it."""
        transfer = self.swap_out(name, [blocks], tokens, keys=[keys])
        self.land()
        return transfer

    def back(self, name, blocks, **options):
        """Swap a request with one group in, and wait for it."""
        transfer = self.swap_in(name, [blocks], **options)
        self.land()
        return transfer

    def round_trip(self, name, blocks, tokens, keys=()):
        """Leave a retained copy behind."""
        self.out(name, blocks, tokens, keys)
        self.back(name, blocks)
