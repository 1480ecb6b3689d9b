"""One thing of vLLM's that FastServe relies on, and whether the installed one still has it."""

import dis
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True, slots=True)
class Seam:
    """One thing of vLLM's that FastServe relies on.

    Attributes:
        path: "module:Class.member".
        parameters: names that a function's signature must have, in this order, first.
        sets: names of attributes that the class's `__init__` must set.
        why: what FastServe does with it.
    """

    path: str
    why: str
    parameters: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()

    def violations(self) -> Iterator[str]:
        """What about the seam is not as expected; nothing when all is well."""
        try:
            target = _resolve(self.path)
        except (ImportError, AttributeError) as error:
            yield f"{self.path} is missing ({error}); needed to {self.why}"
            return
        if self.parameters:
            found = tuple(inspect.signature(target).parameters)
            if found[: len(self.parameters)] != self.parameters:
                yield (
                    f"{self.path} takes {found}, expected it to begin with {self.parameters}; "
                    f"needed to {self.why}"
                )
        written = set(written_by_init(target)) if self.sets else set()
        for name in self.sets:
            if name not in written:
                yield f"{self.path} does not set {name}; needed to {self.why}"


def _resolve(path: str) -> Any:
    module, _, names = path.partition(":")
    target: Any = import_module(module)
    for name in names.split("."):
        target = getattr(target, name)
    return target


def written_by_init(cls: type[Any]) -> Iterator[str]:
    """Names of the attributes that the class's `__init__` assigns; none where it is compiled."""
    if not inspect.isfunction(cls.__init__):
        return
    for instruction in dis.get_instructions(cls.__init__):
        if instruction.opname == "STORE_ATTR":
            yield instruction.argval
