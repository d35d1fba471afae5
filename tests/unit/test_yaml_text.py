"""YAML as YAML 1.2 has it, whoever reads it: scalars and refusals."""

import json
import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from g2rpo.yaml_text import parse_yaml

SCALARS: dict[str, Any] = {
    # no base 60, no dates
    "24:00:00": "24:00:00", "1:30": "1:30", "-1:30": "-1:30", "1:30.5": "1:30.5",
    "2026-01-01": "2026-01-01", "2026-01-01T10:00:00Z": "2026-01-01T10:00:00Z",
    # true and false alone
    "true": True, "True": True, "TRUE": True, "false": False, "yes": "yes", "No": "No",
    "on": "on", "OFF": "OFF", "y": "y", "n": "n", "tRUE": "tRUE",
    "null": None, "Null": None, "~": None, "": None, "none": "none", "nULL": "nULL",
    # integers
    "10": 10, "-3": -3, "+3": 3, "017": 17, "09": 9, "0o17": 15, "0x1F": 31, "0b11": "0b11",
    "1_000": "1_000", "0o8": "0o8", "-0o7": "-0o7", "-0x1": "-0x1",
    # floats
    "1e-5": 1e-5, "1E5": 1e5, "1.": 1.0, ".5": 0.5, "-.5e+3": -500.0, "1.0e-05": 1e-5, "+1.5": 1.5,
    ".inf": math.inf, "-.INF": -math.inf, "+.Inf": math.inf, "1_0.5": "1_0.5", "1e": "1e",
    ".": ".", "1.5.2": "1.5.2", "inf": "inf", "nan": "nan", "=": "=", "<<": "<<",
    "'10'": "10", '"true"': "true", "!!str 10": "10", "!!float 3": 3.0, "!!int 0o17": 15,
}  # fmt: skip


@pytest.mark.parametrize("text", SCALARS)
def test_a_scalar_means_what_yaml_1_2_says(text: str) -> None:
    expected = SCALARS[text]
    for found in (parse_yaml(text), parse_yaml(f"- [{text}]")[0][0] if text else None):
        assert found == expected
        assert type(found) is type(expected)


def test_not_a_number() -> None:
    assert all(math.isnan(value) for value in parse_yaml("[.nan, .NaN, .NAN]"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", ("duplicate key 'a'", "line 3")),
        ("{1: a, 01: b}", ("duplicate key 1",)),
        ("!!int 12:30", ("'12:30' in line 1 is not a valid int",)),
        ("!!bool yes", ("'yes'", "bool")),
        ("!!int 1_000", ("'1_000'", "int")),
        ("when: !!timestamp 2026-01-01", ("timestamp", "line 1")),
        ("!!binary aGk=", ("binary",)),
        ("!!set {a}", ("set",)),
        ("!!python/name:os.system x", ("os.system",)),
        ("!mine 3", ("!mine",)),
        ("a: &a [*a]", ("recursive",)),
        ("&a {b: *a}", ("recursive",)),
        ("[" * 3000, ("nested too deeply",)),
        ("9" * 5000, ("4300 digits",)),
        ("a: [1", ("line 1",)),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_what_is_no_plain_data_is_refused_in_one_line(text: str, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(words[0])) as caught:
        parse_yaml(text)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


NUMBERS = st.integers() | st.floats(allow_nan=False)


@given(st.recursive(
    st.none() | st.booleans() | NUMBERS.filter(math.isfinite) | st.text("ab:,[]{}#&*!|>%@0e."),
    lambda inner: st.lists(inner) | st.dictionaries(st.text("ab0"), inner),
    max_leaves=10,
))  # fmt: skip
def test_json_is_read_as_json(value: Any) -> None:
    assert repr(parse_yaml(json.dumps(value))) == repr(value)
