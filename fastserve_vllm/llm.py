"""vLLM's `LLM` and `AsyncLLM`, scheduled by FastServe."""

from collections.abc import Mapping
from typing import Any

import vllm
from vllm.v1.engine.async_llm import AsyncLLM as _AsyncLLM

from fastserve_vllm.config import FastServeConfig
from fastserve_vllm.selection import check_scheduler_class, engine_overrides, select

Config = FastServeConfig | Mapping[str, Any] | None


class LLM(vllm.LLM):
    """`vllm.LLM`; takes `fastserve_config`, a mapping of the keys of `FastServeConfig`.

    Raises:
        ConfigError: the configuration is not valid.
        ValueError: `scheduler_cls` is given too.
    """

    def __init__(self, model: str, *, fastserve_config: Config = None, **kwargs: Any) -> None:
        check_scheduler_class(kwargs.pop("scheduler_cls", None))
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
        """vLLM's `AsyncLLM.from_engine_args`, with FastServe selected on `engine_args`."""
        return super().from_engine_args(select(engine_args, fastserve_config), *args, **kwargs)
