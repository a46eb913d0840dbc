"""What is said about a request before any weight is loaded; start pictures; regions."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import pipelines.image
from compose import METHODS, method_named
from compose.denoise import denoise
from pipelines import generate, rerun
from pipelines.prepare import prepare, size_like, worded
from studio.base import Base
from studio.errors import FileError, RequestError, StudioError
from studio.lora.model import Lora
from studio.lora.write import save_lora
from studio.requests import GenerateRequest, Region

MakeLora = Callable[..., Lora]
NEEDS_REGIONS = [name for name in METHODS if type(method_named(name)).regions == "required"]


@pytest.fixture
def loras(make_lora: MakeLora, tmp_path: Path) -> list[str]:
    triggers = {"cat": "sks", "dog": "photo"}
    return [
        str(save_lora(tmp_path / f"{name}.safetensors", make_lora(seed, "attn2", trigger=trigger, class_word=name)))
        for seed, (name, trigger) in enumerate(triggers.items())
    ]


@pytest.fixture
def quick(tiny_base: Path) -> dict[str, Any]:
    return {"base": str(tiny_base), "steps": 4, "size": (32, 16), "seed": 7, "progress": False}


def picture(path: Path, colour: str = "red", size: tuple[int, int] = (64, 32)) -> str:
    Image.new("RGB", size, colour).save(path)
    return str(path)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"method": "switch", "loras": []}, "method 'switch' composes LoRAs, but the request names none"),
        ({"options": {"tau": 2}}, r"unknown option of method 'merge' 'tau'.*'switch'.*have it"),
        ({"options": {"weight": "x"}}, "method 'merge': option weight"),
        ({"regions": ["cat@0,0,1,1"]}, "method 'merge' takes no regions: leave them out, or use '"),
        ({"regions": ["frog@0,0,1,1"], "method": "regional"}, "unknown LoRA of a region 'frog'"),
        ({"regions": ["cat@none.png"], "method": "regional"}, "cannot read the mask none.png"),
        ({"method": "regional"}, "needs to know where each LoRA acts: give regions, such as cat@0,0,0.5,1"),
        ({"init_image": "none.png"}, "cannot read the picture none.png: No such file"),
    ],
)
def test_mistakes_are_said_without_a_base(loras: list[str], fields: dict[str, Any], why: str) -> None:
    with pytest.raises(StudioError, match=why) as caught:
        prepare(GenerateRequest.of(**{"prompt": "a cat", "loras": loras, "base": "nowhere", **fields}))
    assert "\n" not in str(caught.value)


def test_one_file_under_two_names_is_one_lora_too_many(loras: list[str]) -> None:
    with pytest.raises(RequestError, match=r"LoRAs '.*cat\.safetensors' and 'cat' are the same file"):
        prepare(GenerateRequest.of(prompt="a", loras=[loras[0], "cat"]), [Path(loras[0]).parent])


@pytest.mark.parametrize("name", NEEDS_REGIONS)
def test_regions_are_needed(loras: list[str], name: str) -> None:
    with pytest.raises(RequestError, match=f"method '{name}' needs to know where"):
        prepare(GenerateRequest.of(prompt="a", loras=loras, method=name))
    assert (
        prepare(GenerateRequest.of(prompt="a", loras=loras, method=name, regions=["cat@0,0,1,1"])).method.regions == "required"
    )


def test_what_a_region_says_need_not_be_said_again(loras: list[str]) -> None:
    from pipelines.prepare import load_adapters

    request = GenerateRequest.of(prompt="a red apple", loras=loras, method="regional", regions=["cat@0,0,0.5,1"])
    adapters = load_adapters(prepare(request))
    changed, notes = worded(request, adapters)
    assert changed.prompt == "a red apple, photo dog"
    assert len(notes) == 1
    whole = request.with_(options={"prompt": "whole"})
    assert worded(whole, adapters)[0].prompt == "a red apple, sks cat, photo dog"
    with pytest.raises(RequestError, match="lacks the trigger 'sks'"):
        worded(request.with_(prompt="a photo dog", regions=["cat@0,0,0.5,1=an apple"], triggers="require"), adapters)


def test_regions_reach_the_method(
    loras: list[str], quick: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def watched(*arguments: Any, **fields: Any) -> Any:
        seen.append(fields["regions"])
        return denoise(*arguments, **fields)

    monkeypatch.setattr(pipelines.image, "denoise", watched)
    Image.new("L", (8, 8), 255).save(tmp_path / "white.png")
    regions = ["cat@0,0,0.5,1", f"dog@{tmp_path / 'white.png'}=a photo dog"]
    result = generate("a red apple", loras=loras, method="regional", regions=regions, **{**quick, "size": (64, 64)})
    assert seen == [tuple(Region.parse(text) for text in regions)]
    (path,) = result.save(tmp_path / "x.png")
    assert result.sidecars[0]["pictures"][0]["name"] == str(tmp_path / "white.png")
    again = rerun(path, progress=False)
    assert again.notes == result.notes
    assert np.array_equal(np.asarray(again.images[0]), np.asarray(result.images[0]))


def test_a_start_picture_is_followed_and_recorded(quick: dict[str, Any], tmp_path: Path) -> None:
    start = picture(tmp_path / "start.png")
    noise, weak, strong = (
        generate("a cat", **quick, **({"init_image": start, "strength": s} if s else {})) for s in (None, 0.3, 1.0)
    )
    assert (weak.request.strength, weak.request.size) == (0.3, (32, 16))
    assert "Denoising strength: 0.3" in weak.parameters[0]
    assert not np.array_equal(np.asarray(weak.images[0]), np.asarray(strong.images[0]))
    assert not np.array_equal(np.asarray(weak.images[0]), np.asarray(noise.images[0]))
    (path,) = weak.save(tmp_path / "weak.png")
    assert np.array_equal(np.asarray(rerun(path).images[0]), np.asarray(weak.images[0]))
    # The start picture has moved, and lies beside the result now; then it has changed; then it is gone.
    (tmp_path / "with").mkdir()
    for name in ("weak.png", "start.png"):
        shutil.move(tmp_path / name, tmp_path / "with" / name)
    moved = rerun(tmp_path / "with" / "weak.png")
    assert moved.notes == [f"the picture '{start}' is taken from {tmp_path / 'with' / 'start.png'}"]
    assert np.array_equal(np.asarray(moved.images[0]), np.asarray(weak.images[0]))
    picture(tmp_path / "start.png", "blue")
    assert any("the picture" in note and "has changed since" in note for note in rerun(tmp_path / "with" / "weak.png").notes)
    (tmp_path / "start.png").unlink()
    (tmp_path / "with" / "start.png").unlink()
    with pytest.raises(FileError, match="cannot read the picture"):
        rerun(tmp_path / "with" / "weak.png")


def test_a_start_picture_gives_the_size_that_is_left_open(base: Base, quick: dict[str, Any], tmp_path: Path) -> None:
    assert size_like(base, (64, 64)) == (64, 64)
    assert size_like(base, (4000, 1000)) == (128, 32)
    assert size_like(base, (1, 1000)) == (16, 2016)
    fields = {key: value for key, value in quick.items() if key != "size"} | {"steps": 2}
    result = generate("a cat", init_image=picture(tmp_path / "wide.png", size=(400, 100)), **fields)
    assert (result.request.size, result.request.strength) == ((128, 32), 0.6)
    with pytest.raises(RequestError, match=r"strength 0.1 leaves none of 2 steps"):
        generate("a cat", init_image=str(tmp_path / "wide.png"), strength=0.1, **fields)


def test_pictures_open_as_people_see_them(tmp_path: Path) -> None:
    from studio.media import open_picture

    clear = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    clear.save(tmp_path / "clear.png", exif=exif)
    opened = open_picture(tmp_path / "clear.png")
    assert (opened.size, opened.mode, opened.getpixel((0, 0))) == ((2, 4), "RGB", (255, 255, 255))
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(FileError, match="cannot read the picture"):
        open_picture(tmp_path / "bad.png")
