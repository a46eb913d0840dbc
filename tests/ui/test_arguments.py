"""The command line's own small notations."""

from __future__ import annotations

import pytest

from studio.errors import RequestError
from ui.arguments import parse_settings


@pytest.mark.parametrize("value", ["2024-02-30", "!!int foo", "!!bool foo", "!!timestamp foo", "? [a]", "\x01", "[" * 3000])
def test_a_value_that_is_no_yaml_is_a_sentence(value: str) -> None:
    with pytest.raises(RequestError, match=r"^--set 'tau=.* is not a YAML value, for example 5"):
        parse_settings([f"tau={value}"])
