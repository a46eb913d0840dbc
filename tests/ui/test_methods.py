"""What the command line tells of methods and their options."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from compose import METHODS, method_named
from ui import cli, console, methods

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_line_and_every_option_a_help(name: str) -> None:
    told = methods.describe(name)
    assert told.summary == told.summary.strip() != ""
    assert [option.name for option in told.options] == list(method_named(name).takes.model_fields)
    for option in told.options:
        # A few words are no help: an option says what it does, and what the paper has where there is one.
        assert len(option.help.split()) >= 4, f"{name}: the docstring of the options says too little of '{option.name}'"
        assert option.help.endswith(".")
        assert "`" not in option.help
        assert option.values


def test_texts_are_those_of_the_docstring() -> None:
    told = {option.name: option for option in methods.describe("cmlora").options}
    assert told["intervals"].help.startswith("c1,c2: steps from one whole forward of the dominant LoRA to the next")
    assert told["order"].values == "paper | reversed | random | rotation"
    assert told["always"].help.startswith("LoRAs that act in every pass")
    assert [methods.shown(told[name].default) for name in ("intervals", "always", "cache", "cut")] == [
        "2,3",
        "-",
        "true",
        "-",
    ]
    assert {o.name: o.values for o in methods.describe("merge").options}["weight"] == "number | 1/K"


def test_values_tell_their_range() -> None:
    told = {(name, o.name): o.values for name in METHODS for o in methods.describe(name).options}
    assert told[("switch", "tau")] == "whole number from 1"
    assert told[("cmlora", "phase")] == "number 0..1"
    assert told[("cmlora", "intervals")] == "whole number from 1,whole number from 1"
    assert told[("clora", "threshold")] == "number from 0, under 1"
    assert told[("clora", "refine")] == "number 0..1,..."
    assert told[("clora", "morphology")] == "dilate | erode | open | close,..."
    assert told[("merge", "density")] == "number over 0, to 1"
    assert told[("masked", "seeds")] == "number over 0, to 0.5"


def test_methods_prints_all_or_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.run(cli.app, ["methods", "--json"]) == 0
    assert [method["name"] for method in json.loads(capsys.readouterr().out)["methods"]] == list(METHODS)
    assert console.run(cli.app, ["methods", "switch"]) == 0
    printed = capsys.readouterr().out
    assert "tau" in printed
    assert "max_age" not in printed
    assert console.run(cli.app, ["methods", "swich"]) == 3
    assert "did you mean 'switch'" in capsys.readouterr().err


def test_help_lists_methods_without_torch() -> None:
    code = "import sys; from ui import methods; print(methods.listing()); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    *lines, torch = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(METHODS)
    assert "  switch" in "\n".join(lines)
    assert "One LoRA per step, in turns." in result.stdout
    assert torch == "False"
