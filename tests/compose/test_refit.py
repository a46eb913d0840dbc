"""Merges that look at the inputs of layers, against what they minimise."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor, nn

from compose.bank import Adapter, LoraBank
from compose.fuse import Recipe, fused
from compose.inputs import moments, reads_tokens
from compose.merge import Merge
from compose.profile import prompts_for, solos
from compose.refit import OVERLAP, Thin, gradient, merged_columns, mergers, overlap, zipped
from compose.routes import constant
from studio.base import Base
from studio.errors import OutOfMemoryError, RequestError
from studio.lora.dense import dense
from studio.lora.model import LohaDelta, Lora, LoraDelta

WIDE, OUT = 12, 10


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def part(seed: int, weight: float = 1.0, rank: int = 3) -> Thin:
    return weight, LoraDelta(some(rank, WIDE, seed=seed), some(OUT, rank, seed=seed + 50), alpha=2.0)


def change(parts: list[Thin], deltas: list[LoraDelta] | None = None) -> Tensor:
    """``sum_k w_k dW_k``, of the parts or of what was made of them."""
    found = [delta for _, delta in parts] if deltas is None else deltas
    return sum((w * d.scale * d.up @ d.down for (w, _), d in zip(parts, found, strict=True)), torch.zeros(OUT, WIDE))


def seconds(inputs: list[Tensor]) -> Tensor:
    return torch.stack([x @ x.T for x in inputs])


def test_with_few_tokens_gradient_fusion_keeps_what_every_lora_does() -> None:
    parts = [part(1), part(2, -0.5), part(3, 0.8)]
    inputs = [some(WIDE, 4, seed=seed) for seed in (7, 8, 9)]
    every = seconds(inputs)
    whole = change(parts, gradient(parts, every, every.sum(0)))
    for (weight, delta), x in zip(parts, inputs, strict=True):
        wanted = weight * delta.scale * delta.up @ delta.down @ x
        torch.testing.assert_close(whole @ x, wanted, atol=2e-3, rtol=2e-3)
        assert (change(parts) @ x - wanted).norm() > 0.5 * wanted.norm()


def test_one_lora_alone_stays_what_it_is() -> None:
    one = [part(1, 0.7)]
    every = seconds([some(WIDE, 5)])
    for refit in (gradient, zipped):
        torch.testing.assert_close(change(one, refit(one, every, every.sum(0))), change(one), atol=1e-5, rtol=1e-5)


def test_with_many_tokens_no_other_change_fits_the_inputs_better() -> None:
    parts = [part(1), part(2, 0.6)]
    every = seconds([some(WIDE, 40, seed=7), some(WIDE, 60, seed=8)])
    fitted = change(parts, gradient(parts, every, every.sum(0)))

    def error(whole: Tensor) -> float:
        apart = [weight * d.scale * d.up @ d.down - whole for (weight, d) in parts]
        return float(sum((a @ g * a).sum() for a, g in zip(apart, every, strict=True)))

    best = error(fitted)
    assert best < error(change(parts))
    assert all(best < error(fitted + 0.01 * some(OUT, WIDE, seed=seed)) for seed in range(20))


def test_inputs_of_a_lora_that_leaves_the_layer_alone_stay_as_they_are() -> None:
    parts = [part(1)]
    mine, others = some(WIDE, 4, seed=7), some(WIDE, 4, seed=8)
    own = seconds([mine])
    whole = change(parts, gradient(parts, own, seconds([mine, others]).sum(0)))
    torch.testing.assert_close(whole @ mine, change(parts) @ mine, atol=2e-3, rtol=2e-3)
    assert (whole @ others).norm() < 0.01 * (change(parts) @ others).norm()


def test_mergers_of_one_and_none_are_one_lora() -> None:
    parts = [part(1, 0.9), part(2)]
    chosen = merged_columns(parts, torch.stack([torch.ones(WIDE), torch.zeros(WIDE)]))
    torch.testing.assert_close(change(parts, chosen), change(parts[:1]))


def test_mergers_part_columns_that_only_one_lora_hears() -> None:
    parts = [part(1), part(2)]
    low, high = torch.zeros(WIDE, 1), torch.zeros(WIDE, 1)
    low[: WIDE // 2], high[WIDE // 2 :] = 1.0, 1.0
    every = seconds([low * some(WIDE, 30, seed=7), high * some(WIDE, 30, seed=8)])
    found = mergers(parts, every, every.sum(0))
    wanted = torch.cat([low, high], 1).T
    torch.testing.assert_close(found, wanted, atol=0.1, rtol=0)
    assert overlap(found) < 0.1 * overlap(torch.ones(2, WIDE))


def test_a_weight_that_is_lowered_lowers_no_other() -> None:
    wide = 40
    up = torch.linalg.qr(some(OUT, 6))[0]
    one, other = (LoraDelta(some(3, wide, seed=seed), up[:, 3 * seed : 3 * seed + 3], alpha=3.0) for seed in (0, 1))
    shared = some(wide, 400, seed=5)
    every = seconds([torch.cat([shared, some(wide, 100, seed=seed)], 1) for seed in (7, 8)])
    kept = [float(mergers([(1.0, one), (weight, other)], every, every.sum(0))[0].mean()) for weight in (1.0, 0.5, 0.1)]
    assert min(kept) > 0.4
    assert max(kept) - min(kept) < 0.1


@pytest.mark.parametrize("size", [0.0, 1e-20, 1e-6])
def test_a_part_that_changes_next_to_nothing_leaves_the_other_alone(size: float) -> None:
    one, (_, delta) = part(1), part(2)
    faint = (1.0, LoraDelta(delta.down, delta.up * size, delta.alpha))
    every = seconds([some(WIDE, 40, seed=7), torch.zeros(WIDE, 1)])
    found = mergers([one, faint], every, every.sum(0))
    torch.testing.assert_close(found[0], torch.ones(WIDE), atol=0.1, rtol=0)
    assert found.isfinite().all()
    assert torch.equal(mergers([faint, faint], every * 0, every[0] * 0), torch.ones(2, WIDE))


def test_no_other_factors_fit_the_inputs_better() -> None:
    parts = [part(1), part(2, -0.6)]
    inputs = [some(WIDE, 30, seed=7), some(WIDE, 30, seed=8)]
    every = seconds(inputs)
    wanted = [change([one]) @ x for one, x in zip(parts, inputs, strict=True)]
    size = sum(float(target.square().sum()) for target in wanted)

    def loss(factors: Tensor) -> float:
        whole = sum((change([one]) * row for one, row in zip(parts, factors, strict=True)), torch.zeros(OUT, WIDE))
        error = sum(float((whole @ x - target).square().sum()) for x, target in zip(inputs, wanted, strict=True))
        return error / size + OVERLAP * float(overlap(factors))

    found = mergers(parts, every, every.sum(0))
    best = loss(found)
    assert best < 0.9 * loss(torch.ones(2, WIDE))
    assert all(best <= loss(found + 0.05 * some(2, WIDE, seed=seed)) for seed in range(40))


def test_the_overlap_is_counted_once_for_every_pair() -> None:
    assert float(overlap(torch.ones(3, WIDE))) == pytest.approx(3.0)
    assert float(overlap(torch.tensor([[1.0, -2.0], [3.0, 0.5]]))) == pytest.approx((3 + 1) / 2)


@pytest.mark.parametrize("how", ["gradient", "zip"])
def test_layers_nobody_listened_to_get_the_sum(how: str) -> None:
    loha = LohaDelta(some(OUT, 2), some(2, WIDE), some(OUT, 2, seed=1), some(2, WIDE, seed=1), alpha=1.0)
    loras = [(0.8, Lora({"unet.a": part(1)[1], "unet.b": part(2)[1]})), (0.5, Lora({"unet.a": loha}))]
    weights = {"unet.a": some(OUT, WIDE), "unet.b": some(OUT, WIDE)}
    every = seconds([some(WIDE, 4, seed=7), some(WIDE, 4, seed=8)])
    summed = fused(loras, weights, Recipe(how="cat"))
    one = fused(loras, weights, Recipe(how=how), moments={"unet.a": every})
    told = {name: dense(one.layers[name], weights[name]) for name in weights}
    torch.testing.assert_close(told["unet.b"], dense(summed.layers["unet.b"], weights["unet.b"]))
    assert (told["unet.a"] - dense(summed.layers["unet.a"], weights["unet.a"])).norm() > 0.1
    short = fused(loras, weights, Recipe(how=how, rank=2), moments={"unet.a": every}).layers["unet.a"]
    assert isinstance(short, LoraDelta)
    assert short.rank == 2


def test_moments_are_those_of_what_flows_in_while_each_draws_alone(base: Base, make_lora: Callable[..., Lora]) -> None:
    adapters = [
        Adapter("one", make_lora(1, "attn2 ff.net proj_in conv1", rank=2, size=0.1), 0.8),
        Adapter("two", make_lora(2, "attn2")),
    ]
    layers = {f"unet.{path}": m for path, m in base.unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    heard: list[tuple[int, int]] = []
    found = moments(base, adapters, layers, steps=2, on_step=lambda done, total: heard.append((done, total)))
    assert heard == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert not any("conv1" in name for name in found)
    read = [
        next(name for name in found if name.endswith(end)) for end in ("ff.net.2", "attn2.to_q", "attn2.to_k", "attn2.to_v")
    ]
    seen: dict[str, list[Tensor]] = {name: [] for name in read}
    with LoraBank.on(base, adapters[:1]) as bank, ExitStack() as stack:
        for name in read:
            hook = layers[name].register_forward_pre_hook(
                lambda layer, args, name=name: seen[name].append(args[0].flatten(0, 1))
            )
            stack.callback(hook.remove)
        list(solos(base, bank, constant([1.0]), prompts_for(adapters[0]), (0,), 2))
    for name in read:
        x = torch.cat(seen[name])
        assert found[name].shape == (2, x.shape[1], x.shape[1])
        torch.testing.assert_close(found[name][0], x.T @ x / len(x), atol=1e-4, rtol=1e-3)
    assert not any(m._forward_pre_hooks for m in layers.values())


def test_which_layers_read_tokens() -> None:
    assert reads_tokens(nn.Linear(2, 3))
    assert reads_tokens(nn.Conv2d(2, 3, 1))
    for odd in (nn.Conv2d(2, 3, 3), nn.Conv2d(2, 4, 1, groups=2), nn.Conv2d(2, 3, 1, stride=2), nn.Conv2d(2, 3, 1, padding=1)):
        assert not reads_tokens(odd)


def test_inputs_that_main_memory_does_not_hold_are_refused_first(
    base: Base, make_lora: Callable[..., Lora], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compose.inputs.free_bytes", lambda device: 1000)
    layers = {f"unet.{path}": m for path, m in base.unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    with pytest.raises(OutOfMemoryError, match=r"layers of 2 LoRAs takes .* GB of main memory.*merge fewer LoRAs"):
        moments(base, [Adapter("one", make_lora(1)), Adapter("two", make_lora(2))], layers)


def test_a_lora_that_does_not_say_what_it_draws_is_told(base: Base, make_lora: Callable[..., Lora]) -> None:
    layers = {f"unet.{path}": m for path, m in base.unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    made = [make_lora(seed, "mid_block") for seed in (1, 2)]
    silent = Adapter("silent", Lora(made[0].layers, {}))
    tagged = Adapter("tagged", Lora(made[1].layers, {"ss_tag_frequency": '{"10_x": {"zqx dog": 9, "grass": 2}}'}))
    assert prompts_for(tagged)[1] == "a zqx dog"
    method = Merge.of(how="gradient")
    assert method.survey(base, [silent, tagged], layers) == [
        "LoRA 'silent' does not say what it draws: how='gradient' saw it without a prompt"
    ]
    assert method.survey(base, [silent], layers) == ()


def test_merging_without_having_looked_is_refused(base: Base, make_lora: Callable[..., Lora]) -> None:
    method = Merge.of(how="gradient")
    pair = [Adapter("one", make_lora(1)), Adapter("two", make_lora(2))]
    with pytest.raises(RequestError, match="looks at the base first"), LoraBank.on(base, pair, fuse=method.fuse):
        pass
