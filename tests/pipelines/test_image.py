from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import pipelines.image
import pipelines.memory
from pipelines import GenerateResult, generate, rerun
from pipelines.progress import Bar
from studio.base import Base
from studio.errors import CancelledError, NumericsError, OutOfMemoryError, RequestError, UnknownNameError, WrongBaseError
from studio.hashes import auto_v3
from studio.lora.model import Lora, LoraDelta
from studio.media import read_carried

MakeLora = Callable[..., Lora]


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.fixture
def quick(tiny_base: Path) -> dict[str, Any]:
    return {"base": str(tiny_base), "steps": 3, "size": (32, 32), "seed": 7}


def write(path: Path, lora: Lora) -> str:
    """A file in the layout diffusers writes."""
    tensors = {}
    for name, delta in lora.layers.items():
        assert isinstance(delta, LoraDelta)
        tensors[f"{name}.lora_A.weight"] = delta.down.contiguous()
        tensors[f"{name}.lora_B.weight"] = (delta.up * delta.scale).contiguous()
    save_file(tensors, path, dict(lora.metadata))
    return str(path)


@pytest.fixture
def cat(make_lora: MakeLora, tmp_path: Path) -> str:
    return write(tmp_path / "cat.safetensors", make_lora(1, "attn1 attn2 text_encoder", trigger="sks cat", family="embedded"))


def test_family_defaults_are_filled_in(tiny_base: Path) -> None:
    result = generate("a cat", base=str(tiny_base), steps=1)
    request = result.request
    assert (request.size, request.guidance, request.scheduler) == ((64, 64), 5.0, "dpmpp_2m")
    assert result.images[0].size == (64, 64)
    assert request.seed == result.seeds[0]
    assert result.seconds > 0
    assert generate("a cat", base=str(tiny_base), steps=1).seeds != result.seeds


def test_pictures_of_a_batch_are_those_made_alone(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    many = generate("a cat", **quick, count=3, scheduler="euler_a")
    assert many.seeds == [7, 8, 9]
    for image, seed in zip(many.images, many.seeds, strict=True):
        alone = generate("a cat", **{**quick, "seed": seed}, scheduler="euler_a").images[0]
        assert abs(pixels(image) - pixels(alone)).max() <= 2
    assert abs(pixels(many.images[0]) - pixels(many.images[1])).max() > 20


def test_rerun_makes_the_same_pixels(quick: dict[str, Any], tmp_path: Path, cat: str) -> None:
    many = generate("a cat", negative="night", loras=[f"{cat}:0.6"], count=2, **quick)
    paths = many.save(tmp_path / "out" / "x.png")
    assert [path.name for path in paths] == ["x-1.png", "x-2.png"]
    for index, path in enumerate(paths):
        again = rerun(path)
        assert abs(pixels(again.images[0]) - pixels(many.images[index])).max() <= 2
        assert again.seeds == [7 + index]
    single = generate("a cat", **quick)
    (path,) = single.save(tmp_path / "y.png")
    assert np.array_equal(pixels(rerun(path).images[0]), pixels(single.images[0]))


def test_png_carries_what_made_it(quick: dict[str, Any], tmp_path: Path, cat: str, base: Base) -> None:
    (path,) = generate("a cat", negative="night", loras=[(cat, 0.5)], triggers="keep", **quick).save(tmp_path / "x.png")
    with Image.open(path) as image:
        told, text = json.loads(image.text["studio"]), image.text["parameters"]
    assert told["request"]["prompt"] == "a cat"
    assert told["request"]["loras"] == [{"name": cat, "weight": 0.5}]
    assert told["base"] == {"name": "tiny", "family": "embedded", "sha256": base.sha256}
    assert len(told["loras"][0]["sha256"]) == 64
    assert told["loras"][0]["autov3"] == auto_v3(Path(cat))
    assert text.split("\n") == [
        "a cat <lora:cat:0.5>",
        "Negative prompt: night",
        f"Steps: 3, Sampler: DPM++ 2M, CFG scale: 5, Seed: 7, Size: 32x32, Model hash: {base.sha256[:10]}, Model: tiny, "
        f'Version: studio {told["studio"]}, Lora hashes: "cat: {auto_v3(Path(cat))}"',
    ]


def test_loras_change_the_picture_and_leave_nothing_behind(quick: dict[str, Any], cat: str) -> None:
    plain = pixels(generate("a cat", **quick).images[0])
    with_lora = generate("a sks cat", loras=[cat], **quick)
    assert with_lora.notes == []
    assert abs(pixels(generate("a cat", loras=[cat], **quick).images[0]) - plain).max() > 5
    off = generate("a cat", loras=[f"{cat}:0"], **quick)
    assert np.array_equal(pixels(off.images[0]), plain)
    assert off.notes == []
    assert np.array_equal(pixels(generate("a cat", **quick).images[0]), plain)


def test_loras_named_in_the_prompt_are_used(quick: dict[str, Any], cat: str, tmp_path: Path) -> None:
    plain = generate("a sks cat", loras=[f"{cat}:0.6"], **quick)
    tagged = generate("a sks cat <lora:cat:0.6>", lora_dirs=[Path(cat).parent], **quick)
    assert np.array_equal(pixels(tagged.images[0]), pixels(plain.images[0]))
    assert tagged.notes == ["LoRA 'cat' is taken from the prompt, with the weight 0.6"]
    assert tagged.request.prompt == "a sks cat"
    assert [(ref.name, ref.weight) for ref in tagged.request.loras] == [("cat", 0.6)]
    assert tagged.parameters[0].startswith("a sks cat <lora:cat:0.6>\n")
    idle = generate("a cat", negative="night <lora:none:1>", **quick)
    assert idle.notes == ["LoRA 'none' in the negative prompt does nothing: name it in the prompt"]
    assert idle.request.negative == "night"
    with pytest.raises(RequestError, match="named twice"):
        generate("a cat <lora:cat:1>", loras=["cat"], lora_dirs=[Path(cat).parent], **quick)


def test_weights_break_and_length_act(quick: dict[str, Any]) -> None:
    plain = pixels(generate("a red cat on grass", **quick).images[0])
    for prompt in ("a (red:3) cat on grass", "a red BREAK cat on grass", "a red cat on grass" + " in the night" * 8):
        result = generate(prompt, **quick)
        assert abs(pixels(result.images[0]) - plain).max() > 2, prompt
        assert result.notes == []
        assert result.request.prompt == prompt
    assert np.array_equal(pixels(generate("a (red:1) cat on grass", **quick).images[0]), plain)
    (note,) = generate("a [red:green:0.5] cat", **quick).notes
    assert "'[red:green:0.5]' changes with the step in other programs" in note


def test_embeddings_clip_skip_and_vae_are_recorded(quick: dict[str, Any], tmp_path: Path, base: Base) -> None:
    save_file({"emb_params": torch.randn(2, 32)}, tmp_path / "fluffy.safetensors")
    base.vae.save_pretrained(tmp_path / "my vae")
    more = {"embeddings": str(tmp_path / "fluffy.safetensors"), "clip_skip": 2, "vae": str(tmp_path / "my vae")}
    result = generate("a fluffy cat", **quick, **more)
    assert result.notes == []
    sidecar, text = result.sidecars[0], result.parameters[0]
    assert sidecar["embeddings"][0]["name"] == "fluffy"
    digest = sidecar["embeddings"][0]["sha256"]
    assert sidecar["vae"]["name"] == "my vae"
    assert f"VAE hash: {sidecar['vae']['sha256'][:10]}, VAE: my vae, Clip skip: 2, Version: studio" in text
    assert text.endswith(f'TI hashes: "fluffy: {digest[:12]}"')
    for change in ("embeddings", "clip_skip"):
        other = generate("a fluffy cat", **quick, **{key: value for key, value in more.items() if key != change})
        assert abs(pixels(other.images[0]) - pixels(result.images[0])).max() > 2, change
    (note,) = generate("a cat", **quick, embeddings=more["embeddings"]).notes
    assert note == "no prompt calls the embedding 'fluffy': write 'fluffy' where it should act"


def test_a_missing_trigger_is_added_and_said(quick: dict[str, Any], cat: str, tmp_path: Path) -> None:
    result = generate("a cat, sks", loras=[cat], **quick)
    (note,) = result.notes
    assert note == f"the prompt lacked the trigger 'sks cat' of LoRA '{cat}': 'sks cat' was added at its end"
    assert (result.request.prompt, result.request.triggers) == ("a cat, sks, sks cat", "keep")
    (path,) = result.save(tmp_path / "x.png")
    again = rerun(path)
    assert again.notes == []
    assert np.array_equal(pixels(again.images[0]), pixels(result.images[0]))
    kept = generate("a cat, sks", loras=[cat], triggers="keep", **quick)
    assert (kept.notes, kept.request.prompt) == ([], "a cat, sks")
    assert abs(pixels(kept.images[0]) - pixels(result.images[0])).max() > 2
    with pytest.raises(RequestError, match="lacks the trigger 'sks cat'"):
        generate("a cat, sks", loras=[cat], triggers="require", **quick, on_step=lambda event: pytest.fail("sampled"))
    assert generate("A SKS Cat, left", loras=[cat], **quick).notes == []
    assert generate("A (SKS Cat:1.1), left", loras=[cat], **quick).notes == []


def test_sizes_that_do_not_fit_name_the_nearest(quick: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"50x64 does not fit base 'tiny'.*multiples of 4 .*nearest: 48x64 or 52x64"):
        generate("a cat", **{**quick, "size": (50, 64)})
    with pytest.raises(RequestError, match=r"nearest: 16x16"):
        generate("a cat", **{**quick, "size": (3, 16)})
    assert generate("a cat", **{**quick, "size": (32, 48)}).images[0].size == (32, 48)


def test_unknown_names_and_foreign_loras_fail_before_sampling(
    quick: dict[str, Any], tmp_path: Path, make_lora: MakeLora, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("sampling began")

    monkeypatch.setattr(pipelines.image, "denoise", never)
    with pytest.raises(UnknownNameError, match="unknown scheduler"):
        generate("a cat", **quick, scheduler="dppm")
    with pytest.raises(UnknownNameError, match="unknown method 'merg': did you mean 'merge'"):
        generate("a cat", **quick, method="merg")
    with pytest.raises(UnknownNameError, match="unknown LoRA 'nothing'"):
        generate("a cat", **quick, loras=["nothing"])
    with pytest.raises(RequestError, match="named twice"):
        generate("a cat", **quick, loras=["a", "a"])
    foreign = write(tmp_path / "foreign.safetensors", make_lora(1, family="sdxl"))
    with pytest.raises(WrongBaseError, match="family 'sdxl'"):
        generate("a cat", **quick, loras=[foreign])


def test_nan_is_one_sentence(quick: dict[str, Any], tmp_path: Path, make_lora: MakeLora) -> None:
    huge = write(tmp_path / "huge.safetensors", make_lora(1, size=1e18))
    with pytest.raises(NumericsError, match="NaN or infinity at step 1 of 3"):
        generate("a cat", **quick, loras=[huge])


def test_what_can_never_fit_is_refused_with_what_would(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines.memory, "free_bytes", lambda device: 40_000_000)
    with pytest.raises(
        OutOfMemoryError, match=r"160000x160000 does not fit the memory of cpu .*: (\d+)x\1 would fit"
    ) as caught:
        generate("a cat", **{**quick, "size": (160_000, 160_000)})
    side = int(str(caught.value).rsplit(" ", 3)[1].split("x")[0])
    assert side % 16 == 0
    assert side >= 64


def test_memory_that_runs_out_is_tried_in_smaller_rounds(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    real, rounds = pipelines.image.denoise, []

    def tight(*args: Any, **settings: Any) -> torch.Tensor:
        rounds.append(len(settings["seeds"]))
        if len(settings["seeds"]) > limit:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return real(*args, **settings)

    monkeypatch.setattr(pipelines.image, "denoise", tight)
    limit = 2
    result = generate("a cat", **quick, count=5)
    assert rounds == [5, 2, 2, 1]
    assert result.notes == ["memory was short: the pictures were made 2 at a time"]
    assert len(result.images) == 5
    limit = 0
    with pytest.raises(OutOfMemoryError, match=r"32x32 does not fit the memory of cpu .*16x16 would fit"):
        generate("a cat", **quick)


def test_each_round_can_be_saved_before_the_next(
    quick: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, begun = pipelines.image.denoise, 0

    def short_of_memory(*args: Any, **settings: Any) -> torch.Tensor:
        nonlocal begun
        begun += 1
        if len(settings["seeds"]) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        if begun == stop:
            raise CancelledError("cancelled")
        return real(*args, **settings)

    monkeypatch.setattr(pipelines.image, "denoise", short_of_memory)
    stop = 0
    parts: list[GenerateResult] = []
    whole = generate("a cat", **quick, count=5, on_round=parts.append)
    assert [(part.first, len(part.images)) for part in parts] == [(0, 2), (2, 2), (4, 1)]
    for path in whole.save(tmp_path / "whole" / "x.png"):
        assert path.stat().st_size
    for part in parts:
        part.save(tmp_path / "parts" / "x.png")
    for name in (f"x-{number}.png" for number in range(1, 6)):
        one, other = (read_carried(tmp_path / folder / name) for folder in ("whole", "parts"))
        assert (one.record, one.parameters) == (other.record, other.parameters)
        assert np.array_equal(*(pixels(Image.open(tmp_path / folder / name)) for folder in ("whole", "parts")))
    begun, stop = 0, 3
    with pytest.raises(CancelledError):
        generate("a cat", **quick, count=5, on_round=lambda part: part.save(tmp_path / "kept" / "x.png"))
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["x-1.png", "x-2.png"]


@pytest.mark.parametrize(("method", "tries"), [("merge", 1), ("composite", 2)])
def test_memory_that_runs_out_lets_fewer_loras_act_at_once(
    quick: dict[str, Any], tmp_path: Path, make_lora: MakeLora, monkeypatch: pytest.MonkeyPatch, method: str, tries: int
) -> None:
    real, seen = pipelines.image.denoise, []
    loras = [write(tmp_path / f"{seed}.safetensors", make_lora(seed)) for seed in range(3)]
    with_room = generate("a cat", **quick, loras=loras, method=method)

    def tight(*args: Any, **settings: Any) -> torch.Tensor:
        seen.append(settings["room"])
        if settings["room"] > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return real(*args, **settings)

    monkeypatch.setattr(pipelines.image, "denoise", tight)
    if tries == 1:
        with pytest.raises(OutOfMemoryError):
            generate("a cat", **quick, loras=loras, method=method)
    else:
        result = generate("a cat", **quick, loras=loras, method=method)
        assert result.notes == ["memory was short: forwards had one pass at a time"]
        assert np.abs(pixels(result.images[0]) - pixels(with_room.images[0])).max() <= 1
    assert len(seen) == tries


def test_a_picture_that_does_not_fit_is_decoded_in_tiles(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = generate("a cat", **{**quick, "size": (96, 96)})
    monkeypatch.setattr(pipelines.memory, "vae_bytes", lambda base, size: 10**15 if size == (96, 96) else 0)
    tiled = generate("a cat", **{**quick, "size": (96, 96)})
    assert tiled.notes == [pipelines.memory.TILED]
    difference = abs(pixels(tiled.images[0]) - pixels(whole.images[0]))
    assert difference.max() > 0
    assert difference.mean() < 12
    low = generate("a cat", **{**quick, "size": (96, 96)}, memory="low")
    assert low.notes == []
    assert np.array_equal(pixels(low.images[0]), pixels(tiled.images[0]))
    with pytest.raises(OutOfMemoryError, match="96x96 does not fit"):
        generate("a cat", **{**quick, "size": (96, 96)}, memory="high")
    with pytest.raises(RequestError, match="unknown memory setting 'lots'"):
        generate("a cat", **quick, memory="lots")


def test_other_runtime_errors_are_not_hidden(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("shapes")

    monkeypatch.setattr(pipelines.image, "denoise", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        generate("a cat", **quick)


def test_bar_shows_on_standard_error_only_after_two_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr("pipelines.progress.time.monotonic", lambda: now[0])
    error = io.StringIO()
    monkeypatch.setattr("sys.stderr", error)
    with Bar("denoising", 10, shown=True) as bar:
        now[0] = 1.9
        bar.reach(5)
        assert bar.bar is None
        now[0] = 2.1
        bar.reach(6)
        assert bar.bar is not None
    with Bar("denoising", 10) as bar:
        now[0] = 9.0
        bar.reach(6)
        assert bar.bar is None, "standard error is no terminal here"
    assert capsys.readouterr().out == ""


def test_merging_weights_can_be_cancelled(quick: dict[str, Any], tmp_path: Path, make_lora: MakeLora) -> None:
    loras = [write(tmp_path / f"{seed}.safetensors", make_lora(seed)) for seed in range(2)]
    asked: list[bool] = []

    def cancelled() -> bool:
        asked.append(True)
        return len(asked) == 2

    with pytest.raises(CancelledError):
        generate("a cat", **quick, loras=loras, options={"how": "ties"}, cancelled=cancelled)
    assert len(asked) == 2
    assert generate("a cat", **quick, loras=loras, options={"how": "ties"}).images


@pytest.mark.parametrize("how", ["gradient", "zip"])
def test_merges_that_look_first(quick: dict[str, Any], tmp_path: Path, make_lora: MakeLora, how: str) -> None:
    loras = [write(tmp_path / f"{seed}.safetensors", make_lora(seed, "mid_block")) for seed in range(2)]
    both = generate("a cat", **quick, loras=loras)
    fitted = generate("a cat", **quick, loras=loras, options={"how": how})
    assert abs(pixels(fitted.images[0]) - pixels(both.images[0])).max() > 2
    assert [f"how='{how}' saw it without a prompt" in note for note in fitted.notes] == [True, True]
    assert rerun(fitted.save(tmp_path / "x.png")[0]).notes == fitted.notes
    alone = generate("a cat", **quick, loras=loras[:1], options={"how": how})
    assert abs(pixels(alone.images[0]) - pixels(generate("a cat", **quick, loras=loras[:1]).images[0])).max() <= 1
    assert alone.notes == []
    within = {"method": "attend", "options": {"inner": {"how": how}, "words": "cat", "until": 0}}
    assert np.array_equal(pixels(generate("a cat", **quick, loras=loras, **within).images[0]), pixels(fitted.images[0]))
    calls = 0

    def cancelled() -> bool:
        nonlocal calls
        calls += 1
        return calls == 2

    with pytest.raises(CancelledError):
        generate("a cat", **quick, loras=loras, options={"how": how}, cancelled=cancelled)
