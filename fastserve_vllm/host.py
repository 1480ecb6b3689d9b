"""Checks at start-up that FastServe can drive the installed vLLM, and the executor."""

from typing import TYPE_CHECKING

from packaging.version import InvalidVersion, Version

from fastserve_vllm.config import ConfigError
from fastserve_vllm.contract import CONTRACT
from fastserve_vllm.seam import Seam

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SUPPORTED = ((0, 32), (0, 34))
"""vLLM's minor versions from the first up to, not including, the second."""


class HostContractError(RuntimeError):
    """The installed vLLM is not one that this FastServe can drive; the message says why."""


def check(contract: tuple[Seam, ...] = CONTRACT) -> None:
    """Compare the installed vLLM with the contract.

    Raises:
        HostContractError: listing the version or every seam that does not fit.
    """
    import vllm

    low, high = SUPPORTED
    if not low <= _release(vllm.__version__) < high:
        raise HostContractError(
            f"this FastServe supports vLLM >={low[0]}.{low[1]},<{high[0]}.{high[1]}; "
            f"{vllm.__version__} is installed"
        )
    violations = [text for seam in contract for text in seam.violations()]
    if violations:
        raise HostContractError(
            f"vLLM {vllm.__version__} is not as FastServe expects:\n- " + "\n- ".join(violations)
        )


def check_executor(vllm_config: "VllmConfig", *, swaps: bool) -> None:
    """Check that one scheduler decides for all workers and, if KV is swapped, hears all of them.

    Raises:
        ConfigError: it does not, with what to do instead.
    """
    from vllm.v1.executor.abstract import Executor

    parallel = vllm_config.parallel_config
    if parallel.distributed_executor_backend == "external_launcher" and parallel.world_size > 1:
        raise ConfigError(
            "with the executor external_launcher every rank runs a scheduler of its own, and all "
            "have to decide alike; FastServe decides by measured times, which differ: use mp or ray"
        )
    # vLLM 0.32's older Ray executor compiles a graph whose outputs are the last stage's.
    pipeline = parallel.pipeline_parallel_size > 1
    if swaps and pipeline and hasattr(Executor.get_class(vllm_config), "_compiled_ray_dag"):
        raise ConfigError(
            "the Ray executor that VLLM_USE_RAY_V2_EXECUTOR_BACKEND=0 selects tells the scheduler "
            "only what the last stage of a pipeline has copied, so requests would wait for ever: "
            "leave that variable alone, or use --fastserve-config.swap_mode recompute"
        )


def _release(version: str) -> tuple[int, ...]:
    """(major, minor); () for a version that is none, as in a source tree without metadata."""
    try:
        return Version(version).release[:2]
    except InvalidVersion:
        return ()
