from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from compose.bank import Adapter, LoraBank
from compose.cmlora import CMLoRA
from compose.layerwise import cross_layers
from compose.profile import Profile, high_frequency, measure, places, profiled, prompts_for, radial, rings, stored
from studio.base import Base
from studio.errors import CancelledError, FileError, RequestError
from studio.lora.model import Lora

Sample = Callable[..., Tensor]


@pytest.mark.parametrize("size", [(16, 16), (64, 64), (128, 96), (128, 128), (9, 16)])
def test_profiles_are_finite_and_know_fine_from_coarse(size: tuple[int, int]) -> None:
    noise = torch.randn(*size, generator=torch.Generator().manual_seed(0))
    blurred = F.avg_pool2d(F.pad(noise[None], (2, 2, 2, 2), mode="circular"), 5, 1)[0]
    sharp, soft = high_frequency(noise), high_frequency(blurred)
    assert math.isfinite(sharp)
    assert math.isfinite(soft)
    assert sharp > soft + 0.02
    assert high_frequency(noise * 7, log=False) == pytest.approx(high_frequency(noise, log=False))
    assert len(radial(noise)) == int(rings(*size).max()) + 1


def test_a_single_wave_stands_in_its_ring() -> None:
    wave = torch.cos(2 * math.pi * 5 * torch.arange(32) / 32).expand(32, 32)
    assert int(radial(wave, log=False).argmax()) == 5


def profile_of(base: Base, lora: Lora) -> Profile:
    with LoraBank.on(base, [Adapter("other", lora), Adapter("x", lora)]) as bank:
        return measure(base, bank, 1, prompts=["a red apple"], seeds=[0, 1], steps=5)


def test_a_lora_that_does_nothing_scores_zero_and_the_score_is_of_the_lora(base: Base, make_lora: Callable[..., Lora]) -> None:
    still = profile_of(base, make_lora(1, size=0.0))
    assert still.score == pytest.approx(0, abs=1e-6)
    assert still.high is (still.score >= 0)
    lively = profile_of(base, make_lora(1, size=0.3))
    assert abs(lively.score) > 1e-5
    assert lively == profile_of(base, make_lora(1, size=0.3))
    assert len(lively.curve) == 5
    assert lively.score == pytest.approx(sum(lively.curve[:3]) / 3)


@pytest.mark.parametrize("weight", [0.3, -1.0])
def test_a_profile_is_of_the_lora_at_weight_one(base: Base, make_lora: Callable[..., Lora], weight: float) -> None:
    lora = make_lora(1, size=0.3)
    with LoraBank.on(base, [Adapter("x", lora, weight)]) as bank:
        found = measure(base, bank, 0, prompts=["a red apple"], seeds=[0, 1], steps=5)
    assert found.curve == pytest.approx(profile_of(base, lora).curve, abs=1e-5)


def test_measuring_can_be_cancelled_and_needs_a_weight(base: Base, make_lora: Callable[..., Lora]) -> None:
    asked: list[bool] = []

    def cancelled() -> bool:
        asked.append(True)
        return len(asked) == 3

    with LoraBank.on(base, [Adapter("x", make_lora(1)), Adapter("off", make_lora(2), 0.0)]) as bank:
        with pytest.raises(CancelledError):
            profiled(base, bank, 0, cancelled)
        with pytest.raises(RequestError, match="LoRA 'off' has weight 0"):
            measure(base, bank, 1)
    assert len(asked) == 3


def test_words_of_a_lora_that_is_off_are_not_read(base: Base, make_lora: Callable[..., Lora]) -> None:
    """Layer-wise words change the shape of the text, which no layer expects while their LoRA is off."""
    layers = len(cross_layers(base.unet))
    words = {"vlim": {"text_encoder": torch.ones(layers, 1, int(base.unet.config.cross_attention_dim))}}
    off = replace(make_lora(2), tokens=words)
    with LoraBank.on(base, [Adapter("x", make_lora(1)), Adapter("off", off, 0.0)]) as bank:
        assert measure(base, bank, 0, prompts=["a red apple"], seeds=[0], steps=3).curve


def test_profiles_are_kept_beside_the_file_or_in_the_cache(
    base: Base, make_lora: Callable[..., Lora], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lora = replace(make_lora(1), source=tmp_path / "look.safetensors", sha256="a" * 64)
    adapter = Adapter("look", lora)
    beside, cached = places(adapter, base)
    assert beside == tmp_path / "look.profile.json"
    assert stored(adapter, base) is None
    known = Profile(lora_sha256="a" * 64, base_sha256=base.sha256, score=-0.5, curve=(-0.5,), prompts=("x",))
    known.save(cached)
    assert stored(adapter, base) == known
    replace(known, score=0.7).save(beside)
    assert stored(adapter, base).score == 0.7
    replace(known, lora_sha256="b" * 64).save(beside)
    assert stored(adapter, base) == known
    beside.write_text("{")
    assert stored(adapter, base) == known
    assert places(Adapter("in memory", make_lora(1)), base) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot write"):
        known.save(tmp_path / "file" / "x.json")


def test_cmlora_measures_what_is_unknown_once_and_splits_by_it(
    base: Base, make_lora: Callable[..., Lora], sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("compose.profile.STEPS", 2)
    adapters = [
        Adapter(f"lora {seed}", replace(make_lora(seed, size=0.3, trigger="sks"), sha256=f"{seed}" * 64)) for seed in (1, 2)
    ]
    notes: list[str] = []
    method = CMLoRA()
    first = sample(method, adapters, notes=notes)
    assert notes == [f"LoRA 'lora {seed}' had no profile: it was measured first" for seed in (1, 2)]
    notes.clear()
    assert torch.equal(sample(CMLoRA(), adapters, notes=notes), first)
    assert notes == []
    with LoraBank.on(base, adapters) as bank:
        known = [profiled(base, bank, index) for index in range(2)]
    assert [fresh for _, fresh in known] == [False, False]
    low = replace(known[0][0], score=-1.0)
    high = replace(known[1][0], score=1.0)
    for adapter, profile in zip(adapters, (low, high), strict=True):
        profile.save(places(adapter, base)[-1])
    late = CMLoRA()
    sample(late, adapters, steps=10)
    assert [turn.dominant for turn in late.course] == [1] * 6 + [0] * 4


def test_what_a_lora_is_measured_with() -> None:
    told = Adapter("x", Lora({}, {"studio.trigger": "sks", "studio.class_word": "cat"}))
    assert prompts_for(told)[:2] == ("sks cat", "a sks cat")
    assert prompts_for(Adapter("x", Lora({}))) == ("",)
