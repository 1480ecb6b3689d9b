"""vLLM's `LLM` and `AsyncLLM`, scheduled by FastServe."""

from collections.abc import Mapping
from typing import Any

import vllm
from vllm.v1.engine.async_llm import AsyncLLM as _AsyncLLM

from fastserve_vllm import host
from fastserve_vllm.config import FastServeConfig
from fastserve_vllm.selection import engine_overrides, refuse_conflicts, select

Config = FastServeConfig | Mapping[str, Any] | None


class LLM(vllm.LLM):
    """`vllm.LLM`; takes `fastserve_config`, a mapping of the keys of `FastServeConfig`.

    Raises:
        ConfigError: the configuration is not valid.
        ValueError: `scheduler_cls` or `kv_offloading_size` is given too.
        HostContractError: the installed vLLM does not fit.
    """

    def __init__(self, model: str, *, fastserve_config: Config = None, **kwargs: Any) -> None:
        host.check()
        refuse_conflicts(kwargs.pop("scheduler_cls", None), kwargs.get("kv_offloading_size"))
        overrides = engine_overrides(fastserve_config, kwargs.pop("kv_transfer_config", None))
        super().__init__(model, **kwargs, **overrides)


class AsyncLLM(_AsyncLLM):
    """vLLM's `AsyncLLM`; build it with `from_engine_args`.

    An engine configuration that was already built cannot be changed: pass it through
    `fastserve_vllm.select` while it still is a set of engine arguments.
    """

    @classmethod
    def from_engine_args(
        cls, engine_args: Any, *args: Any, fastserve_config: Config = None, **kwargs: Any
    ) -> "AsyncLLM":
        """As vLLM's, with FastServe selected on `engine_args`."""
        host.check()
        select(engine_args, fastserve_config)
        engine: AsyncLLM = super().from_engine_args(engine_args, *args, **kwargs)
        return engine
