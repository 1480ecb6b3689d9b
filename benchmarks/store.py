"""Measured points as JSON files in a folder: written once, found again, never mixed up."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.alone import Alone
from benchmarks.errors import InputError
from benchmarks.manifest import code_fingerprint, manifest, rounded, versions, write_json
from benchmarks.result import RunResult


def point_name(system: str, load: float | None, seed: int) -> str:
    """File name of a point, without its ending."""
    at = "all-at-once" if load is None else f"load{load:g}"
    return f"{system}_{at}_seed{seed}"


@dataclass(frozen=True)
class Store:
    """A folder of points that share a configuration."""

    folder: Path
    config: Mapping[str, Any]

    def find(self, system: str, load: float | None, seed: int) -> RunResult | None:
        """The point, if it was measured with the code and the versions that are here now.

        Raises InputError for a point of another configuration: it is not this run's to replace.
        """
        path = self._path(system, load, seed)
        if not path.is_file():
            return None
        document = _read(path)
        found = document["manifest"]
        differing = _differing(rounded({"config": self.config}), {"config": found.get("config")})
        if differing:
            raise InputError(
                f"{path} was measured with other {', '.join(differing)}: name another --out "
                "folder, or replace its points with --overwrite"
            )
        current = {"code": code_fingerprint(), "versions": versions()}
        return run_of(document) if all(found.get(k) == v for k, v in current.items()) else None

    def save(self, run: RunResult) -> None:
        """Write a point, replacing one of the same name."""
        document = {"manifest": manifest(self.config), **document_of(run)}
        write_json(self._path(run.system, run.load, run.seed), document)

    def _path(self, system: str, load: float | None, seed: int) -> Path:
        return self.folder / f"{point_name(system, load, seed)}.json"


def load_points(folder: Path) -> list[RunResult]:
    """Every point in a folder. Raises InputError when there is none, or they do not compare."""
    documents = {path.name: _read(path) for path in sorted(folder.glob("*_seed*.json"))}
    if not documents:
        raise InputError(f"{folder} holds no measured points")
    first, *others = documents
    for name in others:
        ours, theirs = documents[first]["manifest"], documents[name]["manifest"]
        keys = ("config", "versions", "code")
        differing = list(_differing({k: ours[k] for k in keys}, {k: theirs[k] for k in keys}))
        if differing:
            raise InputError(
                f"{first} and {name} do not compare, for they differ in {', '.join(differing)}"
            )
    return [run_of(document) for document in documents.values()]


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest of a folder's last written point."""
    last = max(folder.glob("*_seed*.json"), key=lambda path: path.stat().st_mtime)
    found: dict[str, Any] = _read(last)["manifest"]
    return found


def document_of(run: RunResult) -> dict[str, Any]:
    """A point as it is written."""
    return {
        "system": run.system,
        "load": run.load,
        "seed": run.seed,
        "rate_rps": run.rate_rps,
        "alone_ms": None if run.alone is None else run.alone.document(),
        "figures": {k: v for k, v in run.figures.items() if k != "quantiles"},
        "counters": run.counters,
        "wall": run.wall,
        "output_digest": run.output_digest,
        # One line a column, for there are hundreds of numbers.
        "quantiles": _packed(run.figures.get("quantiles", {})),
        "timeline": _packed(run.timeline),
        # In the order of the requests' ids.
        "request_digests": " ".join(digest for _, digest in sorted(run.request_digests.items())),
    }


def run_of(document: Mapping[str, Any]) -> RunResult:
    """Read what `document_of` wrote; requests are named by their place."""
    idle = document["alone_ms"]
    digests = document["request_digests"].split()
    return RunResult(
        system=document["system"],
        load=document["load"],
        seed=document["seed"],
        rate_rps=document["rate_rps"],
        figures=document["figures"] | {"quantiles": _unpacked(document.get("quantiles", {}))},
        output_digest=document["output_digest"],
        request_digests={f"{number:06d}": digest for number, digest in enumerate(digests)},
        counters=document["counters"],
        wall=document["wall"],
        timeline=_unpacked(document.get("timeline", {})),
        alone=None if idle is None else Alone.parse(idle),
    )


def _packed(columns: Mapping[str, Sequence[float]]) -> dict[str, str]:
    return {name: " ".join(f"{value:.5g}" for value in column) for name, column in columns.items()}


def _unpacked(columns: Mapping[str, str]) -> dict[str, list[float]]:
    return {name: [float(text) for text in column.split()] for name, column in columns.items()}


def _read(path: Path) -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if "manifest" not in document or "figures" not in document:
        raise InputError(f"{path} is not a measured point")
    return document


def _differing(mine: Any, theirs: Any, at: Sequence[str] = ()) -> list[str]:
    """Dotted names of what differs."""
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        keys = dict.fromkeys([*mine, *theirs])
        return [
            name for key in keys for name in _differing(mine.get(key), theirs.get(key), (*at, key))
        ]
    return [] if mine == theirs else [".".join(map(str, at))]
