"""Limits of fields, unknown keys, and the JSON Schema that describes both."""

import math
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from snpatch.config import EngineConfig
from snpatch.errors import SnpatchError
from snpatch.guard.config import GuardConfig
from snpatch.server.config import ServeConfig
from snpatch.sweeps.config import SweepConfig
from snpatch.sweeps.sweep_file import SweepSpec
from snpatch.utils import schema
from snpatch.utils.schema import option


@dataclass(frozen=True)
class Limited:
    share: float | None = option(0.5, "A share.", above=0, below=1)
    size: int = option(4, "A size.", min=1, max=9)
    kind: str = field(default="a", metadata={"choices": ("a", "b")})


@pytest.mark.parametrize("value", [0.001, 0.999, None])
def test_value_within_exclusive_limits_is_valid(value):
    schema.validate(Limited(share=value))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"share": 0}, "x: share: expected more than 0, got 0"),
        ({"share": 1}, "x: share: expected less than 1, got 1"),
        ({"share": math.nan}, "x: share: expected more than 0, got nan"),
        ({"size": 0}, "x: size.* at least 1, got 0"),
        ({"size": 10}, "x: size.* at most 9, got 10"),
        ({"kind": "c"}, "x: kind.* one of a, b, got 'c'"),
    ],
)
def test_value_outside_a_limit_is_named(values, message):
    with pytest.raises(SnpatchError, match=message) as error:
        schema.validate(Limited(**values), "x: ")
    assert error.value.field == next(iter(values))


@dataclass(frozen=True)
class Numbers:
    factor: float = 0.0
    k: int | float = 0


def test_whole_number_of_float_field_becomes_float():
    numbers = schema.from_dict(Numbers, "x", {"factor": 1, "k": 1})
    assert (type(numbers.factor), type(numbers.k)) == (float, int)
    with pytest.raises(SnpatchError, match="x: factor: expected a number that float64 can hold, got 1000"):
        schema.from_dict(Numbers, "x", {"factor": 10**400})


def test_json_schema_has_all_limits():
    properties = schema.json_schema(Limited)["properties"]
    assert (properties["share"]["exclusiveMinimum"], properties["share"]["exclusiveMaximum"]) == (0, 1)
    assert (properties["size"]["minimum"], properties["size"]["maximum"]) == (1, 9)
    assert properties["kind"]["enum"] == ["a", "b"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GuardConfig(folds=1), "guard: folds.* at least 2, got 1"),
        (lambda: GuardConfig(class_weight="even"), "guard: class_weight.* one of balanced, got 'even'"),
        (lambda: GuardConfig(max_iter=0), "guard: max_iter.* at least 1, got 0"),
        (lambda: SweepConfig("a", "b", (1,), resamples=0), "sweep: resamples.* at least 1, got 0"),
        (lambda: SweepConfig("a", "b", (1,), confidence=1), "sweep: confidence: expected less than 1, got 1"),
        (lambda: ServeConfig(EngineConfig("m"), max_requests=0), "max_requests.* at least 1, got 0"),
        (lambda: ServeConfig(EngineConfig("m"), drain_s=math.nan), "drain_s.* at least 0, got nan"),
    ],
)
def test_configs_check_the_limits_of_their_fields(make, message):
    with pytest.raises(SnpatchError, match=message):
        make()


def test_unknown_key_of_a_sweep_file_suggests_the_nearest():
    message = "unknown key rankigns; expected one of .*, rankings, .*. Did you mean rankings[?]"
    with pytest.raises(SnpatchError, match=message):
        SweepSpec.from_dict({"model": "m", "rankigns": {}}, Path())
