"""Everything a user can get wrong before a training: one clear sentence each, and nothing is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from studio.errors import StudioError
from tests.training.conftest import Configure
from training import train_concept

Spoil = Callable[[Path], dict[str, Any]]


def no_pictures(folder: Path) -> dict[str, Any]:
    for path in folder.iterdir():
        path.unlink()
    return {}


def one_picture(folder: Path) -> dict[str, Any]:
    for path in sorted(folder.iterdir())[2:]:
        path.unlink()
    return {}


def broken_picture(folder: Path) -> dict[str, Any]:
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:60])
    return {}


def lonely_caption(folder: Path) -> dict[str, Any]:
    (folder / "9.txt").write_text("a {trigger} apple")
    return {}


def file_in_the_way(folder: Path) -> dict[str, Any]:
    (folder.parent / "out").write_text("a file")
    return {"output": folder.parent / "out" / "zqx.safetensors"}


def values(**changes: Any) -> Spoil:
    return lambda folder: changes


CASES: dict[str, tuple[Spoil, str]] = {
    "no pictures": (no_pictures, "no pictures in"),
    "one picture": (one_picture, "holds one picture"),
    "broken picture": (broken_picture, "2.png: image file is truncated: replace or remove it"),
    "caption without picture": (lonely_caption, "9.txt' has no picture of the same name"),
    "no folder": (values(data="nowhere"), "'nowhere' does not exist"),
    "known trigger": (values(trigger="apple"), "'apple' is already a known word of 'tiny'"),
    "empty trigger": (values(trigger=" "), "trigger is empty"),
    "rank 0": (values(rank=0), "'rank' is 0"),
    "huge rank": (values(rank=10_000), "'rank' is 10000"),
    "rank above the layers": (values(rank=300), "rank 300 is more than any chosen layer"),
    "negative rate": (values(learning_rate=-1e-4), "'learning_rate' is -0.0001"),
    "negative rate of words": (values(train_text="embedding", token_learning_rate=-1.0), "'token_learning_rate' is -1.0"),
    "output in a file": (file_in_the_way, "cannot be written"),
    "output nowhere": (values(output="/proc/no/zqx.safetensors"), "cannot be written"),
    "output of another kind": (values(output="zqx.ckpt"), "must end in .safetensors"),
    "missing optimiser": (values(optimizer="Lion"), "needs the package lion_pytorch"),
    "unknown optimiser": (values(optimizer="adamz"), "'optimizer' is 'adamz'"),
    "two rates for prodigy": (
        values(optimizer="Prodigy", train_text="lora", text_learning_rate=1e-4),
        "has one rate for everything",
    ),
    "nothing to learn": (values(train_unet=False), "nothing would be learnt"),
    "half precision on a CPU": (values(precision="fp16"), "needs a CUDA device"),
    "prior prompt with the trigger": (values(prior_prompts=("a red apple", "a {trigger} apple")), "calls the trigger"),
    "prior prompt with the trigger's word": (values(prior_prompts=("ZQX on grass",)), "calls the trigger"),
    "more prior rows than the batch has": (values(prior_batch=5), "prior_batch 5 is more than batch 4"),
    "tokens kept of what is not shuffled": (values(keep_tokens=1), "keep_tokens is given but would do nothing"),
    "a scale of no sigmoid": (values(sigmoid_scale=2), "sigmoid_scale is given but would do nothing: set timestep_sampling to"),
    "a width of no Huber loss": (values(huber_c=0.2), "huber_c is given but would do nothing: set loss to 'huber'"),
    "the last of no files": (values(keep_last=2), "keep_last is given but would do nothing: set save_every"),
    "falls of no restarts": (values(cycles=2), "cycles is given but would do nothing: set schedule to 'cosine_with_restarts'"),
    "vectors of no words": (values(tokens=1), "tokens is given but would do nothing: set train_text to 'embedding'"),
    "layers of no words": (values(layerwise=False), "layerwise is given but would do nothing: set train_text"),
    "a length of no words": (values(token_norm=None, train_text="lora"), "token_norm is given but would do nothing"),
    "the weight of no prior": (
        values(kind="style", prior_weight=1),
        "prior_weight is given but would do nothing: set prior to",
    ),
    "rows of no prior": (values(prior="none", prior_batch=2), "prior_batch is given but would do nothing"),
    "prompts of no prior": (values(prior="none", prior_prompts=("a cat",)), "prior_prompts is given but would do nothing"),
    "several prompts for class pictures": (
        lambda folder: {"prior": "images", "prior_data": folder, "prior_prompts": ("a cat", "a dog")},
        "prior_prompts holds 2 prompts, but prior 'images' gives one to all class pictures",
    ),
    "a name of another trainer's layers": (values(block_rates={"input_blocks": 0.5}), "block_rates holds 'input_blocks'"),
    "no timesteps": (values(min_timestep=500, max_timestep=500), "max_timestep 500 is not above min_timestep 500"),
    "timesteps beyond the base's": (values(max_timestep=1001), "max_timestep 1001 is more than the 1000 timesteps"),
    "noise beyond the base's": (values(min_timestep=1000), "min_timestep 1000 is more than the 1000 timesteps"),
    "clip skip beyond the layers": (values(clip_skip=3), "clip_skip 3 is more than the 2 layers"),
    "unknown argument of the optimiser": (values(optimizer_args={"epz": 1e-6}), "'epz': did you mean 'eps'"),
    "unknown layout": (values(layout="comfy"), "'layout' is 'comfy'"),
    "no LoRA to start from": (values(start_from="nowhere.safetensors"), "nowhere.safetensors"),
    "unknown device": (values(device="tpu"), "'device' is 'tpu'"),
    "no such device": (values(device="mps"), "this machine has none that works"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_sentence_and_nothing_is_trained(
    configure: Configure, pictures: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    def trained(*args: object) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr("training.adapters.attached", trained)
    spoil, said = CASES[case]
    with pytest.raises(StudioError) as caught:
        train_concept(configure(**spoil(pictures)))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (pictures.parent / "out" / "zqx.train").exists()
