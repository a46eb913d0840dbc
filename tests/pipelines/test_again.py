"""Pictures again: renamed and changed files, other programs' texts."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import pipelines.again
from pipelines import generate, rerun
from studio.errors import FileError, RequestError, UnknownNameError
from studio.hashes import auto_v3, sha256_of
from studio.lora.model import Lora
from studio.lora.write import save_lora

MakeLora = Callable[..., Lora]


@pytest.fixture
def loras(tmp_path: Path, make_lora: MakeLora) -> Path:
    folder = tmp_path / "loras"
    save_lora(folder / "cat.safetensors", make_lora(1, "attn1 attn2 text_encoder", size=0.5))
    save_lora(folder / "other.safetensors", make_lora(2, "attn1"))
    return folder


@pytest.fixture
def made(tmp_path: Path, tiny_base: Path, loras: Path) -> Path:
    """A picture with the LoRA ``cat``."""
    result = generate("a cat", base=str(tiny_base), steps=3, size=(32, 32), seed=7, loras=["cat:0.6"], lora_dirs=[loras])
    (path,) = result.save(tmp_path / "x.png")
    return path


def same(path: Path, image: Image.Image) -> bool:
    return np.array_equal(np.asarray(Image.open(path)), np.asarray(image))


def test_nothing_is_said_when_nothing_differs(made: Path, loras: Path) -> None:
    again = rerun(made, lora_dirs=[loras])
    assert again.notes == []
    assert same(made, again.images[0])


def test_a_renamed_lora_is_found_by_its_hash(made: Path, loras: Path) -> None:
    (loras / "cat.safetensors").rename(loras / "renamed.safetensors")
    again = rerun(made, lora_dirs=[loras])
    assert again.notes == [f"LoRA 'cat' is '{loras / 'renamed.safetensors'}' now: found by its hash"]
    assert same(made, again.images[0])
    assert again.request.loras[0].name == "cat"
    # Another file has taken its name meanwhile.
    shutil.copy(loras / "other.safetensors", loras / "cat.safetensors")
    assert same(made, rerun(made, lora_dirs=[loras]).images[0])


def test_a_changed_lora_is_said(made: Path, loras: Path, make_lora: MakeLora) -> None:
    save_lora(loras / "cat.safetensors", make_lora(3, "attn1 attn2", size=0.5))
    notes = rerun(made, lora_dirs=[loras]).notes
    assert notes[0] == "LoRA 'cat' has changed since x.png was made: the picture differs"
    assert "the picture differs from x.png by up to" in notes[1]


def test_a_lora_that_is_nowhere_is_one_sentence(made: Path, loras: Path) -> None:
    (loras / "cat.safetensors").unlink()
    with pytest.raises(UnknownNameError, match=r"unknown LoRA 'cat'.*nor is there any with its contents, sha256 "):
        rerun(made, lora_dirs=[loras])


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    with Image.open(path) as image:
        told = json.loads(image.text["studio"])
        change(told)
        texts = PngInfo()
        texts.add_text("studio", json.dumps(told))
        image.save(path, pnginfo=texts)
    return path


def test_other_weights_programs_and_pixels_are_said(made: Path, loras: Path) -> None:
    def change(told: dict[str, Any]) -> None:
        told["base"]["sha256"] = "0" * 64
        told["made_with"] |= {"torch": "2.0", "device": "cuda:0"}
        told["studio"] = "0.0"
        told["request"]["prompt"] = "a dog"

    notes = rerun(rewritten(made, change), lora_dirs=[loras]).notes
    assert "the base 'tiny' has other weights than when x.png was made: the picture differs" in notes
    assert any(note.startswith("x.png was made with studio 0.0 (now ") and "device cuda:0 (now cpu)" in note for note in notes)
    assert any("the picture differs from x.png by up to" in note for note in notes)


def test_fields_may_be_changed(made: Path, loras: Path) -> None:
    again = rerun(made, lora_dirs=[loras], seed=8, loras=())
    assert again.seeds == [8]
    assert again.request.loras == ()


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("loras", [{"name": "a"}]),
        ("loras", ["a"]),
        ("loras", "a"),
        ("base", "x"),
        ("vae", {"name": "v", "sha256": 3}),
        ("embeddings", [None]),
        ("pictures", {"name": "p"}),
        ("made_with", "torch"),
    ],
)
def test_a_forged_record_is_one_sentence_before_anything_is_loaded(
    made: Path, loras: Path, monkeypatch: pytest.MonkeyPatch, place: str, value: object
) -> None:
    monkeypatch.setattr(pipelines.again, "generate", lambda *_, **__: pytest.fail("something was drawn"))
    with pytest.raises(
        FileError, match=rf"the record in x\.png is damaged: '{place}[\w.]*' is (missing|of another form)"
    ) as caught:
        rerun(rewritten(made, lambda told: told.update({place: value})), lora_dirs=[loras])
    assert "\n" not in str(caught.value)


def test_a_record_without_what_older_ones_lack_is_taken(made: Path, loras: Path) -> None:
    def change(told: dict[str, Any]) -> None:
        for key in ("base", "loras", "made_with", "notes", "batch"):
            told.pop(key)

    assert same(made, rerun(rewritten(made, change), lora_dirs=[loras]).images[0])


@pytest.fixture
def placed(tmp_path: Path, tiny_base: Path, make_lora: MakeLora) -> tuple[Path, Path]:
    """A picture with two LoRAs, each in its region and with no word in the prompt, and their folder."""
    folder = tmp_path / "two"
    for seed, word in enumerate(("cat", "dog")):
        save_lora(folder / f"{word}.safetensors", make_lora(seed, trigger=f"sks{seed}", class_word=word, size=0.5))
    result = generate(
        "on the grass",
        base=str(tiny_base),
        steps=2,
        size=(32, 32),
        seed=7,
        loras=["cat", "dog"],
        lora_dirs=[folder],
        method="regional",
        regions=["cat@0,0,0.5,1", "dog@0.5,0,1,1"],
    )
    (path,) = result.save(tmp_path / "placed.png")
    assert result.request.prompt == "on the grass"
    return path, folder


def test_a_method_without_regions_leaves_them_out(placed: tuple[Path, Path]) -> None:
    path, folder = placed
    again = rerun(path, method="composite", options={}, lora_dirs=[folder])
    assert again.request.regions == ()
    assert again.notes[0] == "method 'composite' takes no regions: those of placed.png are left out"
    # The regions said the triggers; now the prompt must.
    assert "sks0 cat" in again.request.prompt
    assert "sks1 dog" in again.request.prompt


def test_a_method_around_one_without_regions_leaves_them_out_too(placed: tuple[Path, Path]) -> None:
    path, folder = placed
    again = rerun(path, method="attend", options={"step": 0}, lora_dirs=[folder])
    assert again.request.regions == ()


def test_other_regions_may_be_given(placed: tuple[Path, Path], tmp_path: Path) -> None:
    path, folder = placed
    again = rerun(path, regions=["cat@0,0,1,0.5"], lora_dirs=[folder])
    assert [region.place for region in again.request.regions] == ["0,0,1,0.5"]
    assert "sks1 dog" in again.request.prompt
    assert "sks0" not in again.request.prompt
    with pytest.raises(RequestError, match="method 'merge' takes no regions: leave them out"):
        rerun(path, method="merge", regions=["cat@0,0,1,0.5"], lora_dirs=[folder])
    plain = rerun(path, method="merge", lora_dirs=[folder])
    (flat,) = plain.save(tmp_path / "flat.png")
    with pytest.raises(RequestError, match="method 'regional' needs to know where each LoRA acts: give regions"):
        rerun(flat, method="regional", lora_dirs=[folder])


def test_what_was_done_can_be_shown(made: Path, loras: Path, tmp_path: Path) -> None:
    rerun(made, lora_dirs=[loras], explain=tmp_path / "why")
    assert (tmp_path / "why" / "index.html").is_file()


def test_a_base_that_moved_is_found_by_name(made: Path, loras: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = rewritten(made, lambda told: told["request"].update(base="tiny"))
    with pytest.raises(UnknownNameError, match="unknown base 'tiny'"):
        rerun(path, lora_dirs=[loras])
    monkeypatch.setenv("STUDIO_MODEL_PATH", str(tiny_base.parent))
    assert rerun(path, lora_dirs=[loras]).notes == []


def a1111(loras: Path, **changes: str) -> str:
    settings = {
        "Steps": "3", "Sampler": "DPM++ 2M", "Schedule type": "Karras", "CFG scale": "4", "Seed": "7", "Size": "32x48",
        "Model hash": "6ce0161689", "Model": "tiny", "Clip skip": "2",
        "Lora hashes": f'"ink: {auto_v3(loras / "cat.safetensors")}"', "Version": "v1.10.1", **changes,
    }  # fmt: skip
    lines = ["a (cat:1.2) <lora:ink:0.5>", "Negative prompt: night", ", ".join(f"{k}: {v}" for k, v in settings.items())]
    return "\n".join(lines)


def test_texts_of_other_programs(loras: Path, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUDIO_MODEL_PATH", str(tiny_base.parent))
    path = tmp_path / "theirs.png"
    texts = PngInfo()
    texts.add_text("parameters", a1111(loras, **{"Hires upscale": "2", "VAE": "some.pt", "Denoising strength": "0.4"}))
    Image.new("RGB", (32, 48)).save(path, pnginfo=texts)
    result = rerun(path, lora_dirs=[loras])
    request = result.request
    assert (request.prompt, request.negative, request.steps, request.guidance) == ("a (cat:1.2)", "night", 3, 4.0)
    assert (request.seed, request.size, request.scheduler, request.clip_skip) == (7, (32, 48), "dpmpp_2m_karras", 2)
    assert request.base == "tiny"
    assert [ref.weight for ref in request.loras] == [0.5]
    assert result.notes == [
        "theirs.png was made by another program (v1.10.1): expect a picture close to it, not the same pixels",
        f"LoRA 'ink' is '{loras / 'cat.safetensors'}' here: found by its hash",
        "the VAE 'some.pt' is not here: the base's own is used, or give one with --vae",
        "not followed: Hires upscale: 2, Denoising strength: 0.4",
    ]


@pytest.mark.parametrize(
    ("sampler", "schedule", "expected", "said"),
    [
        ("DPM++ 2M SDE", "Automatic", "dpmpp_2m_sde_exponential", False),
        ("Euler a", "Automatic", "euler_a", False),
        ("DPM++ 2M Karras", "", "dpmpp_2m_karras", False),
        ("Restart", "Karras", "dpmpp_2m", True),
    ],
)
def test_samplers_of_a1111(
    loras: Path, tmp_path: Path, tiny_base: Path, sampler: str, schedule: str, expected: str, said: bool
) -> None:
    path = tmp_path / "a.txt"
    path.write_text(a1111(loras, Sampler=sampler, **{"Schedule type": schedule}))
    result = rerun(path, lora_dirs=[loras], base=str(tiny_base))
    assert result.request.scheduler == expected
    assert any("is not here, so the base's default is used" in note for note in result.notes) == said


def test_a_sampler_that_lacks_its_package_is_one_that_is_not_here(
    loras: Path, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compose.schedulers.find_spec", lambda name: None)
    path = tmp_path / "a.txt"
    path.write_text(a1111(loras, Sampler="LMS"))
    result = rerun(path, lora_dirs=[loras], base=str(tiny_base))
    assert result.request.scheduler == "dpmpp_2m"
    assert any("needs the package scipy: install it, or choose 'euler'" in note for note in result.notes)


def test_what_a_foreign_text_needs_and_is_not_here_is_one_sentence(loras: Path, tmp_path: Path, tiny_base: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(a1111(loras))
    with pytest.raises(UnknownNameError, match=r"unknown base 'tiny'.*its hash is 6ce0161689\): give its file with --base"):
        rerun(path, lora_dirs=[loras])
    path.write_text(a1111(loras, **{"Lora hashes": '"ink: 0123456789ab"'}))
    with pytest.raises(UnknownNameError, match=r"unknown LoRA 'ink'.*nor is there any with its hash 0123456789ab"):
        rerun(path, lora_dirs=[loras], base=str(tiny_base))
    path.write_text("just words")
    with pytest.raises(RequestError, match="a text without settings"):
        rerun(path)
    path.write_text(a1111(loras, Steps="many"))
    with pytest.raises(RequestError, match="steps"):
        rerun(path, lora_dirs=[loras], base=str(tiny_base))
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    with pytest.raises(FileError, match="carries nothing of how it was made"):
        rerun(tmp_path / "plain.png")


def test_a_lora_of_the_same_name_but_other_contents(loras: Path, tmp_path: Path, tiny_base: Path) -> None:
    path = tmp_path / "a.txt"
    shutil.copy(loras / "other.safetensors", loras / "ink.safetensors")
    path.write_text(a1111(loras))
    result = rerun(path, lora_dirs=[loras], base=str(tiny_base))
    assert f"LoRA 'ink' is '{loras / 'cat.safetensors'}' here: found by its hash" in result.notes
    assert result.sidecars[0]["loras"][0]["autov3"] == auto_v3(loras / "cat.safetensors")
    said = "LoRA 'ink' has other contents than when a.txt was made: the picture differs"
    path.write_text(a1111(loras, **{"Lora hashes": '"ink: 0123456789ab"'}))
    assert said in rerun(path, lora_dirs=[loras], base=str(tiny_base)).notes
    # By either hash it is the same; none says nothing.
    for digest in (auto_v3(loras / "ink.safetensors"), sha256_of([loras / "ink.safetensors"])[0][:12], ""):
        path.write_text(a1111(loras, **{"Lora hashes": f'"ink: {digest}"'}))
        assert not [note for note in rerun(path, lora_dirs=[loras], base=str(tiny_base)).notes if "'ink'" in note]


def test_our_own_text_runs_without_our_record(
    made: Path, loras: Path, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Image.open(made) as image:
        (tmp_path / "ours.txt").write_text(image.text["parameters"])
    again = rerun(tmp_path / "ours.txt", lora_dirs=[loras], base=str(tiny_base))
    assert again.notes == []
    assert same(made, again.images[0])
    monkeypatch.setenv("STUDIO_MODEL_PATH", str(tiny_base.parent))
    assert rerun(tmp_path / "ours.txt", lora_dirs=[loras]).notes == []
    text = (tmp_path / "ours.txt").read_text()
    (tmp_path / "ours.txt").write_text(re.sub("Model hash: [0-9a-f]+", "Model hash: 0123456789", text))
    said = "the base 'tiny' has other contents than when ours.txt was made: the picture differs"
    assert rerun(tmp_path / "ours.txt", lora_dirs=[loras]).notes == [said]
