"""What an engine's steps take on this machine, fitted to steps that were measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import nnls

NAMES = ("step_s", "prefill_token_s", "decode_s", "context_token_s")


def fit_steps(shapes: Sequence[tuple[int, int, int]], step_s: Sequence[float]) -> dict[str, float]:
    """Seconds of a step, and of a prefill token, a decode and a context token in it; none below 0.

    Args:
        shapes: prefill tokens, decodes and tokens of context of each step.
        step_s: what each took.
    """
    features = np.asarray([(1, *shape) for shape in shapes], dtype=np.float64)
    scale = features.max(axis=0)
    scale[scale == 0] = 1.0
    solution, _ = nnls(features / scale, np.asarray(step_s, dtype=np.float64))
    return dict(zip(NAMES, (solution / scale).tolist(), strict=True))


def coefficients(fits: Sequence[dict[str, Any]]) -> tuple[float, ...]:
    """The mean of several fits, in the order of a step-time model."""
    return tuple(float(np.mean([fit[name] for fit in fits])) for name in NAMES)
