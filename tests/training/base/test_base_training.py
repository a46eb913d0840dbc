"""The trainers of the embedded base: resumable, deterministic, and their data as the splits say."""

from __future__ import annotations

import contextlib
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from studio.art import captions
from studio.art.atlas import concepts, splits
from studio.art.looks import SEEN
from studio.paths import assets
from studio.prompts import article
from training.base import assemble, checkpoint
from training.base.data import Mixture, sample
from training.base.loop import Run, rate_at, train
from training.base.muon import Muon, orthogonalise, parameter_groups


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1))

    def forward(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"loss": (self.net(batch[0]).float() - batch[1]).square().mean()}


def line_batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
    return x, x.sum(1, keepdim=True)


def a_run(folder: Path, items: int = 4800) -> Run:
    return Run(work=folder, name="line", items=items, batch=16, rate=5e-2, warmup=5)


def test_a_run_learns_and_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole = train(Line(), line_batch, a_run(tmp_path / "whole"))
    calls = []

    def stopping(step: int, rank: int) -> tuple[Tensor, Tensor]:
        calls.append(step)
        if len(calls) == 18:
            raise KeyboardInterrupt
        return line_batch(step, rank)

    import training.base.loop as loop

    run = Run(work=tmp_path / "cut", name="line", items=4800, batch=16, rate=5e-2, warmup=5, save_minutes=0.0)
    with contextlib.suppress(KeyboardInterrupt):
        train(Line(), stopping, run)
    assert checkpoint.load(run.folder)[1]["items"] == 17 * 16
    again = loop.train(Line(), line_batch, run)
    assert all(torch.equal(whole[k], again[k]) for k in whole)
    model = Line()
    model.load_state_dict(whole)
    assert model(line_batch(999, 0))["loss"] < 0.5 * Line()(line_batch(999, 0))["loss"]


def test_rate_warms_up_and_falls() -> None:
    run = Run(work=Path("."), name="x", items=1, batch=1, rate=1.0, warmup=10, final_rate=0.1)
    rates = [rate_at(step, 110, run) for step in range(110)]
    assert rates[0] == 0.1 and max(rates) == 1.0 and rates[-1] < 0.11
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_newton_schulz_comes_near_the_orthogonal_factor() -> None:
    matrix = torch.randn(24, 80, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonalise(matrix)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6 and values.max() < 1.3
    assert torch.nn.functional.cosine_similarity(found.flatten(), (u @ vh).flatten(), dim=0) > 0.97
    assert torch.allclose(orthogonalise(matrix.T), found.T, atol=1e-5)


def test_every_parameter_is_stepped_once() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3))
    groups = parameter_groups(model, 1e-3)
    listed = [p for g in groups for p in g["params"]]  # type: ignore[attr-defined]
    assert len(listed) == len(set(map(id, listed))) == len(list(model.parameters()))
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(2, 3, 9, 9)).square().mean().backward()
    Muon(groups, lr=1e-3).step()
    assert all(not torch.equal(b, p) for b, p in zip(before, model.parameters(), strict=True))


def test_checkpoint_is_sharded_and_survives_a_cut_replacement(tmp_path: Path, monkeypatch: object) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 100)  # type: ignore[attr-defined]
    tensors = {f"t{i}": torch.arange(10.0) + i for i in range(5)}
    checkpoint.save(tmp_path / "c", {"model": tensors}, {"items": 1})
    assert len(list((tmp_path / "c").glob("*.safetensors"))) == 3
    groups, facts = checkpoint.load(tmp_path / "c")
    assert facts == {"items": 1} and all(torch.equal(groups["model"][k], v) for k, v in tensors.items())
    (tmp_path / "c").rename(tmp_path / "c.old")  # killed between the two renames
    assert checkpoint.exists(tmp_path / "c")


def test_base_data_never_shows_a_held_out_subject() -> None:
    rng = np.random.default_rng(0)
    heldout = {name for part in splits().heldout.values() for name in part}
    counts = {"a": 0, "b": 0, "class": 0}
    for _ in range(600):
        scene, text = sample(rng, Mixture())
        assert text and len({i.style for i in scene.items}) == 1
        for item in scene.items:
            assert item.concept not in heldout
            counts["a" if item.concept in splits().named_a else "b" if item.concept in splits().named_b else "class"] += 1
    total = sum(counts.values())
    assert abs(counts["a"] / total - 0.55) < 0.06 and abs(counts["b"] / total - 0.25) < 0.06


def test_a_mixture_with_triples_and_looks() -> None:
    rng = np.random.default_rng(1)
    drawn = [sample(rng, Mixture(pairs=0.3, triples=0.4, looks=0.25)) for _ in range(400)]
    counts = np.bincount([len(scene.items) for scene, _ in drawn], minlength=4) / len(drawn)
    assert np.abs(counts[1:] - (0.3, 0.3, 0.4)).max() < 0.07
    assert all(len({item.concept for item in scene.items}) == len(scene.items) for scene, _ in drawn)
    redrawn = [(scene.look, text) for scene, text in drawn if scene.look]
    assert abs(len(redrawn) / len(drawn) - 0.25) < 0.07 and {look for look, _ in redrawn} == set(SEEN)
    assert any(SEEN[look] in text for look, text in redrawn)
    assert not any(scene.look for scene, _ in [sample(rng, Mixture()) for _ in range(50)])


def test_nouns_stand_behind_words_that_mean_nothing() -> None:
    rng = np.random.default_rng(2)
    unnamed = Mixture(named_a=0, named_b=0, pairs=0, drop=0)
    for scene, text in [sample(rng, replace(unnamed, made_up=1)) for _ in range(60)]:
        class_word = concepts()[scene.items[0].concept].class_word
        word = text.split(f" {class_word}")[0].split()[-1]
        assert word not in captions.words() and f"{word} {class_word}" in text
    bare = [sample(rng, unnamed) for _ in range(20)]
    assert all(article(concepts()[scene.items[0].concept].class_word) in text for scene, text in bare)
    named = [sample(rng, Mixture(named_a=1, pairs=0, drop=0, made_up=1)) for _ in range(20)]
    assert not any(re.search(rf"\b{article(scene.items[0].concept)}\b", text) for scene, text in named)


def test_the_third_subject_is_said_to_be_at_the_top_or_the_bottom_half_the_time() -> None:
    rng = np.random.default_rng(3)
    said = 0
    for _ in range(200):
        scene, text = sample(rng, Mixture(pairs=0, triples=1, named_a=1))
        third, row = scene.items[2], scene.items[0]
        place = "at the top" if third.y < row.y else "at the bottom"
        other = "at the bottom" if third.y < row.y else "at the top"
        assert other not in text and "on the left" in text and "on the right" in text
        said += place in text
    assert 70 < said < 130


def test_a_base_taught_on_takes_the_parts_of_its_own_run_first(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        assemble.finished(tmp_path, None)
    folder = assets() / "base"
    taken = assemble.finished(tmp_path, folder)
    kept = assemble.saved_vae(folder), assemble.saved_text(folder)
    for part, other in zip(taken, kept, strict=True):
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in part.state_dict().items())
    groups = {"ema": {f"text.{k}": v + 1 for k, v in kept[1].state_dict().items()}}
    checkpoint.save(tmp_path / "text", groups, {"items": 1})
    changed = assemble.finished(tmp_path, folder)[1].state_dict()
    assert all(torch.equal(changed[name], value + 1) for name, value in kept[1].state_dict().items())
