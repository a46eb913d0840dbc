"""The typed configuration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from studio.base import Base
from studio.errors import FileError, RequestError, UnknownNameError
from studio.family import FAMILIES
from training.config import FOREIGN_NAMES, ConceptConfig, make_config
from training.config_file import load_config
from training.finished import differences
from training.plan import settled

NEEDED: dict[str, Any] = {"data": "d", "output": "o.safetensors", "trigger": "zqx"}


def test_yaml_with_overrides_and_relative_paths(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("data: pics\noutput: out/a.safetensors\ntrigger: zqx\nsteps: 7\nmin_snr: null\n")
    config = load_config(tmp_path / "job.yaml", steps=9)
    assert (config.data, config.steps, config.min_snr) == (tmp_path / "pics", 9, None)
    assert config.work == tmp_path / "out" / "a.train"


def test_a_base_beside_the_file_is_found_there(tmp_path: Path) -> None:
    (tmp_path / "bases" / "own").mkdir(parents=True)
    (tmp_path / "embedded").mkdir()
    needed = "data: pics\noutput: a.safetensors\ntrigger: zqx\n"

    def told(base: str) -> str:
        (tmp_path / "job.yaml").write_text(f"{needed}base: {base}\n")
        return load_config(tmp_path / "job.yaml").base

    assert told("bases/own") == str(tmp_path / "bases" / "own")
    assert told(str(tmp_path / "bases")) == str(tmp_path / "bases")
    assert [told(name) for name in ("embedded", "owner/name", "./absent")] == ["embedded", "owner/name", "./absent"]
    (tmp_path / "job.yaml").write_text(f"{needed}start_from: first.safetensors\n")
    assert load_config(tmp_path / "job.yaml").start_from == tmp_path / "first.safetensors"


def test_unknown_keys_offer_the_near_name() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'learning_rate'"):
        make_config(**NEEDED, learning_rat=1)
    with pytest.raises(RequestError, match="'network_dim': here it is called 'rank'"):
        make_config(**NEEDED, network_dim=4)
    assert set(FOREIGN_NAMES.values()) <= set(ConceptConfig.model_fields)
    assert not set(FOREIGN_NAMES) & set(ConceptConfig.model_fields)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank": 0}, "'rank' is 0: input should be greater"),
        ({"rank": 100_000}, "'rank' is 100000: input should be less"),
        ({"learning_rate": -1e-4}, "'learning_rate' is -0.0001"),
        ({"learning_rate": float("nan")}, "'learning_rate' is nan"),
        ({"steps": 0}, "'steps' is 0"),
        ({"caption_dropout": 1.5}, "'caption_dropout' is 1.5"),
        ({"trigger": "  "}, "trigger is empty"),
        ({"trigger": "{x}"}, "brace"),
        ({"output": "a.ckpt"}, "must end in .safetensors"),
        ({"targets": "("}, "nor a regular expression"),
        ({"caption": "a {cls}"}, "only {trigger} and {class_word}"),
        ({"prior": "images"}, "needs prior_data"),
        ({"prior_data": "p"}, "set prior to 'images'"),
        ({"text_learning_rate": 1e-4}, "set train_text to 'lora'"),
        ({"text_learning_rate": 1e-4, "train_text": "embedding"}, "train_text is 'embedding': set train_text to 'lora'"),
        ({"token_learning_rate": 1e-4}, "set train_text to 'embedding'"),
        ({"token_init": "cat", "train_text": "lora"}, "set train_text to 'embedding'"),
        ({"train_unet": False}, "nothing would be learnt"),
        ({"token_norm": 0.5}, "'token_norm' is 0.5"),
        ({"optimizer": "prodigy", "block_rates": {"up": 0.5}}, "block_rates other than 0 and 1 is given"),
        ({"schedule": "step"}, "'schedule' is 'step'"),
    ],
)
def test_bad_values_are_one_sentence(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError) as caught:
        make_config(**(NEEDED | changes))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", [name for name, field in ConceptConfig.model_fields.items() if field.is_required()])
def test_a_missing_value_is_named_with_what_to_give(key: str) -> None:
    with pytest.raises(RequestError, match=f"'{key}' is missing: give the"):
        make_config(**{name: value for name, value in NEEDED.items() if name != key})


@pytest.mark.parametrize(
    ("text", "said"), [("- a\n", "option: value"), ("a: [", "not YAML"), ("!!python/object:x {}", "not YAML")]
)
def test_bad_files(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(FileError, match=said):
        load_config(tmp_path / "job.yaml")
    with pytest.raises(FileError, match="cannot read"):
        load_config(tmp_path / "absent.yaml")


def test_templates_and_strength() -> None:
    assert make_config(**NEEDED).fill(make_config(**NEEDED).template) == "a zqx"
    cat = make_config(**NEEDED, class_word="cat", rank=4)
    assert cat.fill(cat.template) == "a zqx cat"
    assert cat.strength == 4.0
    style = make_config(**NEEDED, kind="style", alpha=1)
    assert (style.fill(style.template), style.strength) == ("a picture in zqx style", 1.0)


def test_every_option_is_in_the_manual() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text("utf-8")
    table = "".join(line for line in text.splitlines() if line.startswith("| `"))
    assert [name for name in ConceptConfig.model_fields if f"`{name}`" not in table] == []


def test_differences() -> None:
    assert differences({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}) == ["b: 2 -> 3", "c: (absent) -> 4"]


def test_what_is_left_out_follows_base_and_kind(base: Base, tmp_path: Path) -> None:
    def chosen(base: Base, **values: Any) -> tuple[float, object]:
        config = settled(make_config(data=tmp_path, output=tmp_path / "x.safetensors", trigger="zqx", **values), base)
        return config.learning_rate, config.targets

    assert chosen(base) == (1e-3, "attn+ff")
    assert chosen(base, kind="style") == (2e-3, "image")
    assert chosen(base, kind="style", targets="attn", learning_rate=5e-4) == (5e-4, "attn")
    assert chosen(base, optimizer="prodigy") == (1.0, "attn+ff")
    large = replace(base, family=FAMILIES["sd15"])
    assert chosen(large) == (1e-4, "attn+ff")
    assert chosen(large, learning_rate=1e-3) == (1e-3, "attn+ff")
