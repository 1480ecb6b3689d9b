"""A model-free engine whose copies are late, out of order and sometimes fail."""

from dataclasses import replace

from vllm.v1.outputs import KVConnectorOutput

from fastserve_vllm.kv_swap.metadata import SwapMetadata, SwapWorkerMetadata
from fastserve_vllm.kv_swap.transfers import Direction, Report
from fastserve_vllm.testing import ModelFreeEngine


class FuzzEngine(ModelFreeEngine):
    """Every choice is made by `dice`, so that a seed gives the same run again.

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
        self.failed = 0
        super().__init__(*args, **kwargs)

    def _copy(self, metadata):
        if not isinstance(metadata, SwapMetadata):
            return None
        self.transfers += metadata.transfers
        self.under_way += metadata.transfers
        waited_for = {t.transfer_id for t in self.under_way if t.urgent or metadata.flush}
        over = [
            t
            for t in self.under_way
            if t.transfer_id in waited_for or self.dice.random() >= self.delay_rate
        ]
        self.under_way = [t for t in self.under_way if t not in over]
        self.dice.shuffle(over)
        failed = [t for t in over if self.dice.random() < self.failure_rate]
        self.failed += len(failed)
        if not over:
            return None
        workers = self.config.parallel_config.world_size
        report = Report(
            done={t.transfer_id: workers for t in over},
            failed={t.transfer_id: "a made-up failure" for t in failed},
            copied_bytes={d.value: 4096 for d in Direction},
            copy_s={d.value: 1e-6 for d in Direction},
        )
        unfilled = [t for t in failed if t.urgent and t.direction is Direction.IN]
        return KVConnectorOutput(
            kv_connector_worker_meta=SwapWorkerMetadata(report),
            invalid_block_ids={block for t in unfilled for block in t.device_blocks},
        )

    def _sample(self, output):
        """As the model runner: no output in a step that computes nothing."""
        sampled = super()._sample(output)
        return sampled if output.num_scheduled_tokens else replace(sampled, sampled_token_ids=[])
