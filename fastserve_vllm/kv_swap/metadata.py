"""What crosses between the scheduler and the workers in a step; both ways it is pickled."""

from dataclasses import dataclass

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)
from vllm.v1.outputs import KVConnectorOutput

from fastserve_vllm.kv_swap.transfers import Report, Transfer


@dataclass(frozen=True)
class SwapMetadata(KVConnectorMetadata):
    """From the scheduler to every worker: what a step copies.

    Attributes:
        transfers: to be started, in this order where they share blocks.
        flush: finish everything in flight before the step computes.
    """

    transfers: tuple[Transfer, ...] = ()
    flush: bool = False


@dataclass(frozen=True)
class SwapWorkerMetadata(KVConnectorWorkerMetadata):
    """From the workers to the scheduler: what they have copied."""

    report: Report

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "SwapWorkerMetadata":
        """Two workers' reports as one.

        Raises:
            TypeError: the other is not a `SwapWorkerMetadata`.
        """
        if not isinstance(other, SwapWorkerMetadata):
            raise TypeError(f"cannot merge a swap report with {type(other).__name__}")
        return SwapWorkerMetadata(self.report.merge(other.report))


def find_report(output: KVConnectorOutput | None) -> Report | None:
    """What FastServe's workers say in a step's output, be it one connector's or several'."""
    metadata = None if output is None else output.kv_connector_worker_meta
    for part in getattr(metadata, "metadata", (metadata,)):
        if isinstance(part, SwapWorkerMetadata):
            return part.report
    return None
