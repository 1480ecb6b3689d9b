"""KV swap changes no token, however the engine runs; `make exact` runs all cases at full size."""

import pytest
from exactness import Case, faults, run, stock

REQUESTS = 60
CASES = (
    Case("proactive", "sync", False, "small chunks"),
    Case("proactive", "tp 2", True, "large chunks"),
    Case("proactive", "pp 2", False, "small chunks"),
    Case("reactive", "pp 2", True, "large chunks"),
)


@pytest.fixture(scope="module")
def stock_tokens(tiny_model):
    return stock(tiny_model, REQUESTS)


@pytest.mark.parametrize(
    "case",
    [pytest.param(CASES[0], marks=pytest.mark.host_versions), *CASES[1:]],
    ids=str,
)
def test_swap_changes_no_token(tiny_model, stock_tokens, case):
    """KV blocks for a fifth of the demand, blocks poisoned before they are refilled."""
    assert not faults(case, run(tiny_model, case, REQUESTS), stock_tokens)
