"""Going on from a finished LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from studio.base import Base
from studio.errors import CancelledError, FileError, RequestError
from studio.lora.files import load_lora, read_header
from studio.lora.model import LoraDelta
from tests.training.conftest import Configure
from training import describe, train_concept
from training.adapters import attached, chosen_layers
from training.plan import prepare
from training.progress import Progress
from training.start import start_of


def quiet(progress: Progress) -> None:
    pass


@pytest.fixture
def first(configure: Configure, tmp_path: Path) -> Path:
    """A LoRA and the words of the trigger."""
    config = configure(output=tmp_path / "first.safetensors", train_text="embedding", save_precision="fp32", learning_rate=1e-2)
    return train_concept(config, quiet).path


def test_the_first_step_starts_where_the_other_run_ended(configure: Configure, base: Base, first: Path) -> None:
    """The deltas are the same, though the strength is another one."""
    config = configure(start_from=first, train_text="embedding", alpha=1.0)
    start, lora = start_of(base, config, chosen_layers(base, config)), load_lora(first)
    assert start.sha256 == lora.sha256
    with attached(base, config) as adapters:
        adapters.load(start.weights)
        begun = adapters.deltas()
        assert adapters.word is not None
        assert torch.equal(adapters.word.learnt()["zqx"]["text_encoder"], lora.tokens["zqx"]["text_encoder"])
    for key, delta in lora.layers.items():
        assert isinstance(delta, LoraDelta)
        assert begun[key].alpha == 1.0
        torch.testing.assert_close(begun[key].scale * begun[key].up @ begun[key].down, delta.scale * delta.up @ delta.down)


def test_a_run_goes_on_from_it_and_is_resumed_from_itself(configure: Configure, first: Path) -> None:
    changes: dict[str, Any] = {"start_from": first, "train_text": "embedding", "save_precision": "fp32", "learning_rate": 1e-6}
    config = configure(**changes)
    path = train_concept(config, quiet).path
    whole, begun = path.read_bytes(), load_lora(first)
    for key, delta in load_lora(path).layers.items():
        torch.testing.assert_close(delta.up, begun.layers[key].up, atol=1e-4, rtol=1e-2)  # type: ignore[union-attr]
    path.unlink()

    def stop(progress: Progress) -> None:
        if progress.step == 2:
            raise CancelledError("enough")

    with pytest.raises(CancelledError):
        train_concept(config, stop)
    assert train_concept(config, quiet).path.read_bytes() == whole
    assert f'"start_from": "{begun.sha256}"' in read_header(path).metadata["studio.config"]


def test_it_is_known_by_its_content(configure: Configure, first: Path, tmp_path: Path) -> None:
    config = configure(start_from=first, train_text="embedding", steps=1)
    train_concept(config, quiet)
    renamed = first.rename(tmp_path / "renamed.safetensors")
    assert train_concept(config.model_copy(update={"start_from": renamed}), quiet).losses == ()
    with pytest.raises(RequestError, match=r"other values \(start_from: [0-9a-f]{64} -> \(absent\)\)"):
        train_concept(configure(train_text="embedding", steps=1), quiet)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank": 3}, "start_from 'first.safetensors' has rank 2, but this run 3: set rank to 2"),
        ({"targets": "attn+ff"}, "has other layers than this run"),
        ({"train_text": "embedding+lora"}, "has other layers than this run"),
        ({"train_text": "none"}, "but this run learns no learnt words: set trigger, train_text, tokens and layerwise"),
        ({"tokens": 3}, "has the word 'zqx' as [4, 2, 32], but this run learns the word 'zqx' as [4, 3, 32]"),
        ({"trigger": "kvk"}, "but this run learns the word 'kvk'"),
    ],
)
def test_what_does_not_fit_is_one_sentence(configure: Configure, first: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError) as caught:
        describe(configure(**{"start_from": first, "train_text": "embedding", **changes}))
    assert said.replace("[4, ", "[") in str(caught.value).replace(f"[{layers(first)}, ", "[")
    assert "\n" not in str(caught.value)


def layers(path: Path) -> int:
    return len(load_lora(path).tokens["zqx"]["text_encoder"])


def test_words_too_long_to_be_learnt_are_told(configure: Configure, first: Path) -> None:
    def told(**changes: Any) -> bool:
        notes = prepare(configure(start_from=first, train_text="embedding", **changes)).notes
        return any("raise token_norm or set it to null" in note for note in notes)

    assert not told(token_norm=100)
    with safe_open(first, "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    save_file({key: value * 10 if "tokens" in key else value for key, value in tensors.items()}, first, metadata)
    assert told() and not told(token_norm=None) and not told(token_norm=100)


def test_another_base_and_no_file(configure: Configure, first: Path, tmp_path: Path) -> None:
    with safe_open(first, "pt") as file:
        metadata = file.metadata() | {"studio.base_sha256": "0" * 64, "studio.base": "elsewhere"}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
    save_file(tensors, first, metadata)
    with pytest.raises(
        RequestError, match="was learnt on another base, 'elsewhere', and not on 'tiny': take a LoRA of this base"
    ):
        prepare(configure(start_from=first, train_text="embedding"))
    with pytest.raises(FileError, match="absent"):
        prepare(configure(start_from=tmp_path / "absent.safetensors"))
