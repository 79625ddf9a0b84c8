"""The pooling's flags: every field has one, and each text becomes the value it says."""

import dataclasses
import math

import pytest

from lazyclip.base.errors import UserError
from lazyclip.poolflags import POOL_FLAGS, pool_overrides
from lazyclip.pooling import PoolSpec


def test_every_field_of_the_spec_has_a_flag_with_help():
    fields = [f.name for f in dataclasses.fields(PoolSpec)]
    assert sorted(row.field for row in POOL_FLAGS) == sorted(fields)
    assert [row.flag for row in POOL_FLAGS] == [
        "--last-pooling", "--last-k", "--last-score", "--last-sigma", "--last-kernel", "--last-eps",
    ]  # fmt: skip
    assert all(row.help for row in POOL_FLAGS)


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [("k", "32", 32), ("k", "1", 1), ("k", "0.5", 0.5), ("k", "1.0", 1.0), ("k", "5e-1", 0.5),
     ("sigma", "sqrt", None), ("sigma", "inf", math.inf), ("sigma", "3.5", 3.5), ("sigma", "0", 0),
     ("eps", "1e-4", 1e-4), ("eps", "0", 0), ("score", "repo", "repo"),
     ("kernel", "repo", "repo"), ("pooling", "token", "token")],
)  # fmt: skip
def test_a_text_becomes_its_value_of_the_right_type(field, text, value):
    found = pool_overrides({field: text})
    assert found == {field: value}
    if field == "k":
        assert type(found["k"]) is type(value)  # 1 is one patch, 1.0 all of them
    assert PoolSpec.from_mapping(found, "x")


def test_flags_not_given_leave_no_key():
    assert pool_overrides({}) == {}
    assert pool_overrides({row.field: None for row in POOL_FLAGS}) == {}
    # `sqrt` is given, though its value is None.
    assert pool_overrides({"sigma": "sqrt", "k": None}) == {"sigma": None}


@pytest.mark.parametrize(
    ("field", "text"),
    [("k", "0"), ("k", "-3"), ("k", "1.5"), ("k", "0.0"), ("k", "half"), ("k", ""), ("k", "nan"),
     ("k", "inf"), ("score", "papr"), ("kernel", "gauss"), ("pooling", "cls"), ("sigma", "wide"),
     ("sigma", "-1"), ("sigma", "nan"), ("eps", "tiny"), ("eps", "-1"), ("eps", "nan"),
     ("eps", "inf")],
)  # fmt: skip
def test_a_wrong_value_names_flag_and_value_in_one_line(field, text):
    with pytest.raises(UserError) as caught:
        pool_overrides({field: text})
    said = str(caught.value)
    assert f"--last-{field}" in said
    assert text in said
    assert "\n" not in said
