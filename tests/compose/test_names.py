"""What a request's LoRAs are called, by options and in figures."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

from compose import method_named
from compose.bank import Adapter, refuse_ambiguous, row_names
from compose.figures import Schedule
from compose.regions import named_by
from studio.errors import RequestError
from studio.lora.model import Lora
from studio.requests import Region

Sample = Callable[..., Tensor]


def named(*names: str) -> list[Adapter]:
    return [Adapter(name, Lora({})) for name in names]


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("ink", "ink"),
        ("style/ink", "ink"),
        ("/loras/ink.safetensors", "ink"),
        ("style-v1.0", "style-v1.0"),
        ("/loras/style-v1.5.safetensors", "style-v1.5"),
    ],
)
def test_the_short_name_is_without_folder_and_ending(name: str, short: str) -> None:
    assert named(name)[0].names == (name, short)


def test_rows_are_called_briefly_where_that_is_unique() -> None:
    assert row_names(named("style-v1.0", "a/style-v1.5.safetensors")) == ["style-v1.0", "style-v1.5"]
    same = ("a/ink.safetensors", "b/ink.safetensors")
    assert row_names(named(*same, "c/dog.safetensors")) == [*same, "dog"]
    assert row_names([]) == []


def test_a_name_that_two_have_is_refused() -> None:
    same = named("a/ink.safetensors", "b/ink.safetensors", "dog")
    with pytest.raises(
        RequestError, match=r"'always' names 'ink', which may mean a/ink.safetensors or b/ink.safetensors: write the name"
    ):
        refuse_ambiguous("ink", "always", same)
    for fine in ("a/ink.safetensors", "dog", "none"):
        refuse_ambiguous(fine, "always", same)
    for option, value in (("blocks", {"ink": {"up": 0.5}}), ("schedule", {"ink": [(0, 1)]})):
        with pytest.raises(RequestError, match=f"'{option}' names 'ink', which may mean"):
            method_named("merge", **{option: value}).check(same)
    method_named("merge", blocks={"a/ink.safetensors": {"up": 0.5}, "*": {"up": 1}}).check(same)


@pytest.mark.parametrize("method", ["merge", "composite", "switch", "cmlora"])
def test_figures_have_a_row_for_each_of_two_of_one_name(make_lora: Callable[..., Lora], sample: Sample, method: str) -> None:
    figures: list[Schedule] = []
    names = ["a/ink.safetensors", "b/ink.safetensors", "c/dog.v1.safetensors"]
    sample(
        method_named(method),
        [Adapter(name, make_lora(seed, "attn2")) for seed, name in enumerate(names)],
        steps=1,
        figures=figures,
    )
    assert list(figures[0].rows) == [*names[:2], "dog.v1"]


def test_a_region_must_say_which_of_two() -> None:
    same = named("a/ink.safetensors", "b/ink.safetensors")
    with pytest.raises(RequestError, match="'region' names 'ink', which may mean"):
        named_by(Region.parse("ink@0,0,1,1"), same)
    assert named_by(Region.parse("b/ink.safetensors@0,0,1,1"), same) == {1: 1.0}
