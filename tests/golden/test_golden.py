"""The numbers of every guide and estimator are those that they were.

``record.json`` holds what ``cases.py`` computed before the library was redesigned. A change that
is not meant to change a number leaves it as it is. One that is says so, and makes it again::

    python -m tests.golden.cases > record.json && mv record.json tests/golden/

All is computed in float64 on one thread, so that other processors differ in the last digits only;
still, make the record on the machine that compares with it.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.golden.cases import CASES, SAME, compute

pytestmark = pytest.mark.filterwarnings("ignore:fewer than 3 of")
RECORD = json.loads((Path(__file__).parent / "record.json").read_text())


def leaves(value, name=""):
    """The lists, numbers and texts of nested dictionaries, by their path."""
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, part in value.items() for k, v in leaves(part, f"{name}/{key}").items()}


def is_text(value):
    return np.asarray(value).dtype.kind == "U"


def assert_same(found, wanted):
    found, wanted = leaves(found), leaves(wanted)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if is_text(value):
            assert found[name] == value, name
        else:
            np.testing.assert_allclose(
                found[name], value, rtol=1e-10, atol=1e-10, equal_nan=True, err_msg=name
            )


@pytest.mark.parametrize("name", CASES)
def test_the_numbers_are_those_of_the_record(name):
    assert_same(compute(name), RECORD[name])


def test_the_record_has_the_numbers_of_these_cases():
    assert RECORD.keys() == CASES.keys()


@pytest.mark.parametrize("name", SAME)
def test_a_training_that_was_stopped_has_the_numbers_of_one_that_was_not(name):
    assert RECORD[name] == RECORD[SAME[name]]
