"""A model-free engine whose copies are late, out of order and sometimes fail."""

from kv_contents import Contents, Runner
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

from fastserve_vllm.kv_swap.metadata import SwapMetadata, SwapWorkerMetadata
from fastserve_vllm.kv_swap.transfers import Direction, Report
from fastserve_vllm.testing import ModelFreeEngine


class FuzzEngine(ModelFreeEngine):
    """Every choice is made by `dice`, so that a seed gives the same run again.

    Tokens depend on what is in the blocks: see `kv_contents`.

    Args:
        dice: a `random.Random`.
        failure_rate: share of the copies that fail.
        delay_rate: chance that a copy which nobody waits for is not reported in a step.
    """

    def __init__(self, *args, dice, failure_rate=0.0, delay_rate=0.5, **kwargs):
        self.dice = dice
        self.failure_rate = failure_rate
        self.delay_rate = delay_rate
        self.under_way = []
        self.failing = set()
        self.failed = 0
        super().__init__(*args, **kwargs)
        self.contents = Contents(self.config.cache_config.block_size)
        overlapping = self.config.scheduler_config.async_scheduling
        self.runner = Runner(self.contents, overlapping=overlapping)

    def schedule(self):
        """As the base class; what goes to the workers does not change afterwards."""
        output = super().schedule()
        for new in output.scheduled_new_reqs:
            if new.prefill_token_ids is not None:
                new.prefill_token_ids = list(new.prefill_token_ids)
        return output

    def _sample(self, output):
        """Copies that are urgent, the computation, and copies that may be late, in this order."""
        metadata = output.kv_connector_metadata
        swaps = isinstance(metadata, SwapMetadata)
        if swaps:
            self._hand_over(metadata)
        sampled = self.runner.run(output)
        ids = list(output.num_scheduled_tokens)
        return ModelRunnerOutput(
            ids,
            {r: i for i, r in enumerate(ids)},
            # As the model runner: no output in a step that computes nothing.
            [sampled[r] for r in ids],
            kv_connector_output=self._report(metadata) if swaps else None,
        )

    def _hand_over(self, metadata):
        """The step begins: copies that it waits for are made, the others begin."""
        self.transfers += metadata.transfers
        if metadata.flush:
            for transfer in self.under_way:
                self.contents.carry_out(transfer)
        for transfer in sorted(metadata.transfers, key=_order):
            if fails := self.dice.random() < self.failure_rate:
                self.failing.add(transfer.transfer_id)
            self.contents.hand_over(transfer, fails=fails)
            if transfer.urgent or self.dice.random() < 0.5:
                self.contents.carry_out(transfer)
        self.under_way += metadata.transfers

    def _report(self, metadata):
        """What the workers say at the end of the step."""
        waited_for = {t.transfer_id for t in self.under_way if t.urgent or metadata.flush}
        over = [
            t
            for t in self.under_way
            if t.transfer_id in waited_for or self.dice.random() >= self.delay_rate
        ]
        self.under_way = [t for t in self.under_way if t not in over]
        self.dice.shuffle(over)
        if not over:
            return None
        for transfer in over:
            self.contents.carry_out(transfer)
        failed = [t for t in over if t.transfer_id in self.failing]
        self.failed += len(failed)
        workers = self.config.parallel_config.world_size
        report = Report(
            done={t.transfer_id: workers for t in over},
            failed={t.transfer_id: "a made-up failure" for t in failed},
            copied_bytes={d.value: 4096 for d in Direction},
            copy_s={d.value: 1e-6 for d in Direction},
        )
        return KVConnectorOutput(kv_connector_worker_meta=SwapWorkerMetadata(report))


def _order(transfer):
    """Urgent copies to the host first, then urgent ones to the device, then the others."""
    return (not transfer.urgent, transfer.direction is Direction.IN, transfer.transfer_id)
