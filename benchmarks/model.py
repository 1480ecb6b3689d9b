"""The model that benchmarks run on: the seeded tiny one, unless a folder is given."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.errors import InputError


def model_folder(path: Path | None) -> Path:
    """Return `path`, or the tiny model's folder, which is written on first use."""
    if path is not None:
        if not (path / "config.json").is_file():
            raise InputError(f"{path} is not a model folder")
        return path
    from scripts.tiny_model import build_tiny_model

    return Path(build_tiny_model(Path(tempfile.gettempdir()) / "fastserve-vllm-tiny-model"))
