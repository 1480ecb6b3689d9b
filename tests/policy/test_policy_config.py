"""The configuration: what it refuses and how it says so."""

import dataclasses
import json
import math

import pytest

from fastserve_vllm.config import POLICY_NAMES, ConfigError, FastServeConfig

REFUSED = [
    ("policy", "lifo", "'fastserve', 'mlfq', 'fcfs' or 'fixed-priority'"),
    ("policy", None, "'fastserve'"),
    ("base_quantum_s", 0, "greater than 0"),
    ("base_quantum_s", -0.1, "greater than 0"),
    ("base_quantum_s", math.nan, "finite"),
    ("base_quantum_s", math.inf, "finite"),
    ("base_quantum_s", "1", "number"),
    ("base_quantum_s", True, "number"),
    ("quantum_ratio", 1, "greater than 1"),
    ("quantum_ratio", 0.5, "greater than 1"),
    ("quantum_ratio", math.nan, "finite"),
    ("quantum_ratio", math.inf, "finite"),
    ("quantum_ratio", "2", "number"),
    ("num_levels", 0, "greater than or equal to 1"),
    ("num_levels", 65, "less than or equal to 64"),
    ("num_levels", 2.5, "integer"),
    ("num_levels", True, "integer"),
    ("objective", "fast", "'balanced', 'smooth' or 'paper'"),
    ("objective", None, "'balanced'"),
    ("service_weight", -1, "greater than or equal to 0"),
    ("service_weight", math.inf, "finite"),
    ("first_token_share", 0, "greater than 0"),
    ("first_token_share", 1.1, "less than or equal to 1"),
    ("first_token_share", math.nan, "finite"),
    ("learn_lengths", "yes", "boolean"),
    ("learn_lengths", 1, "boolean"),
    ("ageing", "fast", "'relative' or 'absolute'"),
    ("ageing_ratio", -0.5, "greater than or equal to 0"),
    ("ageing_ratio", math.nan, "finite"),
    ("starvation_limit_s", 0.0, "greater than 0 or 'off'"),
    ("starvation_limit_s", -3, "greater than 0 or 'off'"),
    ("starvation_limit_s", math.nan, "a finite number or 'off'"),
    ("starvation_limit_s", math.inf, "a finite number or 'off'"),
    ("starvation_limit_s", "never", "a valid number or 'off'"),
    ("starvation_limit_s", True, "a valid number or 'off'"),
    ("max_token_gap_s", 0, "greater than 0"),
    ("max_token_gap_s", "off", "number"),
    ("swap_mode", "lru", "'proactive', 'reactive' or 'recompute'"),
    ("swap_mode", None, "'proactive'"),
    ("swap_space_gib", 0, "greater than 0"),
    ("swap_space_gib", math.inf, "finite"),
    ("swap_space_gib", "4", "number"),
    ("step_time_profile", 7, "string"),
    ("save_step_time_profile", ["x"], "string"),
    ("trace_file", True, "string"),
    ("trace_file", "", "at least 1 character"),
]


@pytest.mark.parametrize(("field", "value", "accepted"), REFUSED)
def test_a_bad_value_is_refused(field, value, accepted):
    """The message names the field, what it accepts and what was given."""
    with pytest.raises(ConfigError) as error:
        FastServeConfig.parse({field: value})
    message = str(error.value)
    assert f"fastserve_config.{field}:" in message
    assert accepted in message
    assert repr(value) in message


def test_every_field_refuses_something():
    """No field goes unchecked."""
    assert {field for field, _, _ in REFUSED} == set(FastServeConfig().to_dict())


def test_an_unknown_key_is_refused():
    """The message names the key and the known ones."""
    with pytest.raises(ConfigError, match=r"\.quantum is not a known key") as error:
        FastServeConfig.parse({"quantum": 1.0})
    assert all(name in str(error.value) for name in FastServeConfig().to_dict())


def test_all_mistakes_are_named_at_once():
    """Two mistakes are one error that names both."""
    with pytest.raises(ConfigError) as error:
        FastServeConfig.parse({"num_levels": 0, "quantum_ratio": 1})
    assert "num_levels" in str(error.value)
    assert "quantum_ratio" in str(error.value)


@pytest.mark.parametrize("raw", ["fastserve", 5, ["policy"], [("policy", "fcfs")], {1: 2}, True])
def test_what_is_not_a_mapping_of_names_is_refused(raw):
    """Only a mapping of names is a configuration."""
    with pytest.raises(ConfigError, match="must be a mapping of names"):
        FastServeConfig.parse(raw)


@pytest.mark.parametrize("raw", [None, {}])
def test_nothing_means_the_defaults(raw):
    """No configuration is the default one."""
    assert FastServeConfig.parse(raw) == FastServeConfig()


CHANGED = {
    "policy": "mlfq",
    "base_quantum_s": 0.5,
    "quantum_ratio": 3.0,
    "num_levels": 4,
    "objective": "smooth",
    "service_weight": 0.0,
    "first_token_share": 0.25,
    "learn_lengths": False,
    "ageing": "absolute",
    "ageing_ratio": 0.0,
    "starvation_limit_s": "off",
    "max_token_gap_s": 0.2,
    "step_time_profile": "in.json",
    "save_step_time_profile": "out.json",
    "trace_file": "trace.jsonl",
}


@pytest.mark.parametrize("raw", [{}, CHANGED, *({"policy": name} for name in POLICY_NAMES)])
def test_a_configuration_survives_json(raw):
    """`to_dict` is JSON-ready and `parse` reads it back."""
    config = FastServeConfig.parse(raw)
    assert config.to_dict().items() >= raw.items()
    assert FastServeConfig.parse(config.to_dict()) == config
    assert FastServeConfig.parse(json.loads(json.dumps(config.to_dict()))) == config


def test_whole_numbers_are_seconds_too():
    """JSON has one kind of number: `3` is as good as `3.0` for a number of seconds."""
    config = FastServeConfig.parse(json.loads('{"starvation_limit_s": 3, "quantum_ratio": 2}'))
    assert config == FastServeConfig(starvation_limit_s=3.0, quantum_ratio=2.0)


def test_a_configuration_does_not_change():
    """The record is frozen."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        FastServeConfig().num_levels = 3
