"""Checks at start-up that the installed vLLM is one that FastServe can drive."""

from packaging.version import InvalidVersion, Version

from fastserve_vllm.contract import CONTRACT
from fastserve_vllm.seam import Seam

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


def _release(version: str) -> tuple[int, ...]:
    """(major, minor); () for a version that is none, as in a source tree without metadata."""
    try:
        return Version(version).release[:2]
    except InvalidVersion:
        return ()
