"""Every method by changing one word of a request."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from compose import METHODS, method_class
from compose.profile import SUFFIX, Profile
from pipelines import generate, rerun
from studio.base import Base
from studio.errors import RequestError, UnknownNameError
from studio.lora.files import load_lora
from studio.lora.model import Lora
from studio.lora.write import save_lora

MakeLora = Callable[..., Lora]


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.fixture
def quick(tiny_base: Path) -> dict[str, Any]:
    return {"base": str(tiny_base), "steps": 3, "size": (32, 16), "seed": 7, "progress": False}


@pytest.fixture
def three(make_lora: MakeLora, base: Base, tmp_path: Path) -> list[str]:
    """Three files, two of them with layers of the text encoder, each with its profile beside it."""
    paths = []
    for seed, wanted in enumerate(("attn1 attn2 text_encoder", "attn2 conv1", "attn2 text_encoder")):
        told = {"trigger": ("red", "green", "grass")[seed], "class_word": ("cat", "dog", "grass")[seed]}
        path = save_lora(tmp_path / f"lora{seed}.safetensors", make_lora(seed, wanted, size=0.25, **told))
        lora = load_lora(path)
        Profile(lora_sha256=lora.sha256, base_sha256=base.sha256, score=0.5 - seed, curve=(0.5 - seed,)).save(
            path.with_name(path.stem + SUFFIX)
        )
        paths.append(f"{path}:0.8")
    return paths


PROMPT = "on the left a red cat a green dog"
OPTIONS: dict[str, dict[str, Any]] = {
    "merge": {"weight": "1/K"}, "switch": {"tau": 1}, "composite": {"gain": 1.5}, "cmlora": {"max_age": 2},
    "clora": {"unit": "noise", "step": 0.5}, "attend": {"words": "cat,dog", "refinements": 1, "unit": "noise", "step": 0.5},
    "lora-composer": {"leak": 6.4}, "masked": {"isolation": True}, "regional": {"feather": 0.2},
}  # fmt: skip
"""Something else than the default for every method, so that a record must carry it."""
PLACED = [name for name in METHODS if method_class(name).regions == "required"]


@pytest.mark.parametrize("method", METHODS)
def test_one_word_chooses_the_method_and_a_picture_is_made_again(
    quick: dict[str, Any], three: list[str], tmp_path: Path, method: str
) -> None:
    options, places = OPTIONS[method], ["lora0@0,0,0.5,1", "lora1@0.5,0,1,1"] if method in PLACED else []
    shown = {**quick, "size": (64, 32), "regions": places}
    result = generate(PROMPT, loras=three, method=method, options=options, count=2, **shown)
    again = rerun(result.save(tmp_path / "made.png")[1], progress=False)
    assert again.request.options == options
    # Alone, not as one of two: another batch may round differently.
    assert abs(pixels(again.images[0]) - pixels(result.images[1])).max() <= 2
    assert not [note for note in result.notes if "profile" in note]
    summed = generate(PROMPT, loras=three, **{**shown, "regions": []})
    assert abs(pixels(result.images[0]) - pixels(summed.images[0])).max() > 3


def test_a_lora_may_be_called_by_the_stem_of_its_file(quick: dict[str, Any], three: list[str]) -> None:
    quick |= {"triggers": "keep"}
    kept = generate("a cat", loras=three, method="composite", options={"always": "lora1"}, **quick)
    other = generate("a cat", loras=three, method="composite", **quick)
    assert abs(pixels(kept.images[0]) - pixels(other.images[0])).max() > 3
    off = generate("a cat", loras=three[:2], options={"blocks": {"lora1": {"down": 0, "mid": 0, "up": 0}}}, **quick)
    assert abs(pixels(off.images[0]) - pixels(generate("a cat", loras=three[:1], **quick).images[0])).max() <= 1


@pytest.mark.parametrize(
    ("fields", "error", "why"),
    [
        ({"method": "composit"}, UnknownNameError, "unknown method 'composit': did you mean 'composite'"),
        (
            {"method": "switch", "options": {"taw": 1}},
            UnknownNameError,
            "unknown option of method 'switch' 'taw': did you mean 'tau'",
        ),
        ({"method": "switch", "options": {"tau": -1}}, RequestError, "tau: input should be greater than or equal to 1"),
        ({"method": "cmlora", "loras": []}, RequestError, "'cmlora' composes LoRAs, but the request names none"),
        ({"method": "composite", "options": {"always": "x"}}, RequestError, "'always' names 'x'"),
        ({"loras": [("a", float("nan"))]}, RequestError, "must be a finite number"),
        ({"loras": ["a", "a:2"]}, RequestError, "LoRA 'a' is named twice"),
    ],
)
def test_what_cannot_be_is_said_before_sampling(
    quick: dict[str, Any], three: list[str], fields: dict[str, Any], error: type[Exception], why: str
) -> None:
    with pytest.raises(error, match=why):
        generate("a cat", **{"loras": three, **quick, **fields}, on_step=lambda event: pytest.fail("sampled"))
