"""Ways to make one LoRA of several against their definitions, and merge's weights by block and by step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compose import method_named
from compose.bank import Adapter, LoraBank
from compose.denoise import denoise
from compose.fuse import HOWS, Recipe, drop, elect, fused, trim
from compose.lego import clustered, distances, units
from compose.merge import Merge, at, block_weight
from compose.text import encode_pair
from studio.base import Base
from studio.errors import LoraFileError, RequestError
from studio.lora.dense import dense
from studio.lora.model import LohaDelta, Lora, LoraDelta

Sample = Callable[..., Tensor]


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def delta(seed: int, rank: int = 3, shape: tuple[int, ...] = (10, 8)) -> LoraDelta:
    up = some(shape[0], rank, *(1,) * (len(shape) - 2), seed=seed + 100)
    return LoraDelta(some(rank, *shape[1:], seed=seed), up, alpha=2.0)


def change(how: str, parts: list[tuple[float, Any]], shape: tuple[int, ...] = (10, 8), **recipe: Any) -> Tensor:
    """The ``dW`` of parts made one."""
    loras = [(weight, Lora({"unet.x": part})) for weight, part in parts]
    one = fused(loras, {"unet.x": torch.zeros(shape)}, Recipe(how=how, **recipe))
    return dense(one.layers["unet.x"], torch.zeros(shape))


@pytest.mark.parametrize("shape", [(10, 8), (6, 4, 3, 3)])
def test_cat_is_the_exact_sum_of_any_kinds(shape: tuple[int, ...]) -> None:
    width = shape[1:].numel() if isinstance(shape[1:], torch.Size) else int(torch.tensor(shape[1:]).prod())
    hadamard = LohaDelta(some(shape[0], 2), some(2, width), some(shape[0], 2, seed=1), some(2, width, seed=1), alpha=1.0)
    decomposed = LoraDelta(delta(4, 2, shape).down, delta(4, 2, shape).up, 2.0, magnitude=torch.rand(shape[0]) + 1)
    parts = [(0.8, delta(1, 3, shape)), (-0.5, delta(2, 2, shape)), (0.7, hadamard), (0.3, decomposed)]
    base = some(*shape, seed=9)
    loras = [(weight, Lora({"unet.x": part})) for weight, part in parts]
    one = fused(loras, {"unet.x": base}, Recipe(how="cat")).layers["unet.x"]
    expected = sum(weight * dense(part, base).reshape(shape) for weight, part in parts)
    assert isinstance(one, LoraDelta)
    torch.testing.assert_close(dense(one, base), expected, atol=1e-4, rtol=1e-4)


def test_svd_is_the_best_of_its_rank() -> None:
    parts = [(0.8, delta(1)), (-0.5, delta(2))]
    exact = change("cat", parts)
    left, values, right = torch.linalg.svd(exact)
    best = left[:, :4] * values[:4] @ right[:4]
    torch.testing.assert_close(change("svd", parts, rank=4), best, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(change("svd", parts, rank=6), exact, atol=1e-4, rtol=1e-4)
    assert torch.linalg.matrix_rank(change("svd", parts), atol=1e-4) == 3


def test_trim_elect_and_drop_by_hand() -> None:
    assert trim(torch.tensor([[1.0, -4.0], [3.0, 2.0]]), 0.5).tolist() == [[0, -4], [3, 0]]
    parts = torch.tensor([[2.0, 1.0, 0.0, 1.0], [-1.0, 3.0, 0.0, -1.0], [-0.5, 0.0, 0.0, 1.0]])
    assert elect(parts).tolist() == [2, 2, 0, 1]
    dropped = drop(torch.ones(200, 200), 0.25, torch.Generator().manual_seed(0))
    assert sorted(set(dropped.flatten().tolist())) == [0, 4]
    assert float(dropped.mean()) == pytest.approx(1, abs=0.03)


def test_ties_and_dare_at_full_density() -> None:
    """With nothing left out, TIES is the mean where the LoRAs agree and DARE the sum."""
    parts = [(0.8, delta(1)), (0.5, delta(2))]
    one, two = 0.8 * dense(delta(1)), 0.5 * dense(delta(2))
    agree = one.sign() == two.sign()
    larger = torch.where(one.abs() > two.abs(), one, two)
    expected = torch.where(agree, (one + two) / 2, larger)
    torch.testing.assert_close(change("ties", parts, density=1.0, rank=8), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(change("dare_ties", parts, density=1.0, rank=8), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(change("dare", parts, density=1.0), one + two, atol=1e-4, rtol=1e-4)
    one_alone = change("ties", [(1.0, delta(1))], density=0.3, rank=8)
    torch.testing.assert_close(one_alone, trim(dense(delta(1)), 0.3), atol=1e-4, rtol=1e-4)


def largest(entries: Tensor, density: float) -> Tensor:
    """The share ``density`` of entries with the largest absolute values, found by sorting them."""
    least = entries.abs().flatten().sort().values[-round(density * entries.numel())]
    return torch.where(entries.abs() >= least, entries, 0)


def agreeing(kept: Sequence[Tensor]) -> Tensor:
    """Entry by entry, the mean of those that have the sign with the larger total."""
    out = []
    for values in zip(*(each.flatten().tolist() for each in kept), strict=True):
        found = [value for value in values if value * sum(values) > 0]
        out.append(sum(found) / max(len(found), 1))
    return torch.tensor(out).view(kept[0].shape)


@pytest.mark.parametrize("shape", [(10, 8), (6, 4, 3, 3)])
@pytest.mark.parametrize("how", ["ties", "dare", "dare_ties"])
def test_three_loras_thinned_out_by_hand(how: str, shape: tuple[int, ...]) -> None:
    parts = [(0.8, delta(1, 3, shape)), (-0.5, delta(2, 3, shape)), (0.6, delta(3, 3, shape))]
    recipe = Recipe(how=how, density=0.4, rank=8)
    got = HOWS[how](parts, torch.zeros(shape), recipe, torch.Generator().manual_seed(5))
    draws = torch.rand(3, *shape, generator=torch.Generator().manual_seed(5))
    if how == "ties":
        kept = [weight * largest(dense(part), 0.4) for weight, part in parts]
    else:
        kept = [weight * dense(part) * (draw < 0.4) / 0.4 for (weight, part), draw in zip(parts, draws, strict=True)]
    expected = torch.stack(kept).sum(0) if how == "dare" else agreeing(kept)
    torch.testing.assert_close(dense(got), expected, atol=1e-4, rtol=1e-4)


def test_each_layer_drops_entries_of_its_own() -> None:
    lora = Lora({"unet.x": delta(1), "unet.y": delta(1)})
    bases = dict.fromkeys(lora.layers, torch.zeros(10, 8))
    one = fused([(1.0, lora)], bases, Recipe(how="dare", density=0.4, rank=8))
    x, y = (dense(one.layers[name]).abs() > 1e-3 for name in ("unet.x", "unet.y"))
    assert x.any() and y.any() and not torch.equal(x, y)


@pytest.mark.parametrize("how", sorted(HOWS))
def test_what_is_random_is_the_same_again_and_other_with_another_seed(how: str) -> None:
    parts = [(0.8, delta(1)), (0.5, delta(2))]
    assert torch.equal(change(how, parts), change(how, parts))
    differs = not torch.equal(change(how, parts), change(how, parts, seed=1))
    assert differs is (how in ("dare", "dare_ties", "lego")) or how == "lego"


def shuffled(given: LoraDelta, order: list[int], signs: list[float]) -> LoraDelta:
    """The same LoRA with its units in another order and gauge."""
    sign = torch.tensor(signs)
    down, up = given.down[order], given.up[:, order]
    wide = (-1, *(1,) * (down.ndim - 1))
    return LoraDelta(down * sign.view(wide) * 3, up * sign.view(1, -1, *(1,) * (up.ndim - 2)) / 3, given.alpha)


@pytest.mark.parametrize("shape", [(10, 8), (6, 4, 3, 3)])
def test_lego_of_a_lora_and_its_shuffled_copy_is_the_lora(shape: tuple[int, ...]) -> None:
    one = delta(1, 4, shape)
    other = shuffled(one, [2, 0, 3, 1], [1.0, -1.0, -1.0, 1.0])
    torch.testing.assert_close(dense(other), dense(one), atol=1e-5, rtol=1e-4)
    got = change("lego", [(1.0, one), (1.0, other)], shape)
    torch.testing.assert_close(got, dense(one), atol=1e-4, rtol=1e-4)
    # Averaging the factors, which knows nothing of units, does not give it back.
    naive = LoraDelta((one.down + other.down) / 2, (one.up + other.up) / 2, one.alpha)
    assert (dense(naive) - dense(one)).abs().max() > 0.5
    torch.testing.assert_close(change("lego", [(0.7, one)], shape), 0.7 * dense(one), atol=1e-4, rtol=1e-4)


def test_lego_with_a_cluster_for_every_unit_is_a_weighted_sum() -> None:
    parts = [(1.0, delta(1, 4)), (1.0, delta(2, 4))]
    torch.testing.assert_close(change("lego", parts, rank=8), change("cat", parts) * 0.5**0.5, atol=1e-4, rtol=1e-4)
    nothing = LoraDelta(torch.zeros(2, 8), torch.zeros(10, 2), 2.0)
    assert change("lego", [(1.0, nothing)]).abs().max() == 0


def padded(given: LoraDelta, count: int, noise: float = 0.0) -> LoraDelta:
    """The same LoRA with ``count`` units more, of the size ``noise``."""
    down = torch.cat([given.down, noise * some(count, *given.down.shape[1:], seed=7)])
    up = torch.cat([given.up, noise * some(len(given.up), count, *given.up.shape[2:], seed=8)], 1)
    return LoraDelta(down, up, given.alpha * len(down) / given.rank)


@pytest.mark.parametrize("noise", [0.0, 1e-4])
@pytest.mark.parametrize("shape", [(10, 8), (6, 4, 3, 3)])
def test_units_of_no_size_do_not_count_in_lego(shape: tuple[int, ...], noise: float) -> None:
    one = delta(1, 4, shape)
    longer = padded(one, 4, noise)
    assert longer.rank == 8
    assert len(units(1.0, longer)) == 4
    torch.testing.assert_close(change("lego", [(1.0, longer)], shape), dense(one), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(change("lego", [(1.0, longer), (1.0, longer)], shape), dense(one), atol=1e-4, rtol=1e-4)
    nothing = LoraDelta(torch.zeros_like(one.down), torch.zeros_like(one.up), 2.0)
    torch.testing.assert_close(change("lego", [(1.0, one), (1.0, nothing)], shape), dense(one), atol=1e-4, rtol=1e-4)


def test_lego_of_a_hadamard_product_alone_is_itself() -> None:
    """It enters by a singular value decomposition at the rank it can have at most, which it has not."""
    factor = some(10, 2)
    hadamard = LohaDelta(factor, some(2, 8), factor, some(2, 8, seed=1), alpha=2.0)
    assert torch.linalg.matrix_rank(dense(hadamard), rtol=1e-5) == 3
    for parts in ([(1.0, hadamard)], [(1.0, hadamard), (1.0, hadamard)]):
        torch.testing.assert_close(change("lego", parts), dense(hadamard), atol=1e-4, rtol=1e-4)


def test_clusters_of_units() -> None:
    points = units(1.0, delta(1, 3))
    a, b = points[:, :8], points[:, 8:]
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=1))
    torch.testing.assert_close(torch.einsum("ro,ri->oi", b, a), dense(delta(1, 3)))
    assert distances(points, -points).diagonal().max() < 1e-3
    centers = torch.eye(3, 20) * 10
    near = torch.cat([centers + 0.1 * some(3, 20, seed=seed) for seed in range(4)])
    member = clustered(near * torch.tensor([1.0, -1.0] * 6)[:, None], 3, torch.Generator().manual_seed(0))
    assert len(member.unique()) == 3
    assert all(torch.equal(member[:3], member[3 * i : 3 * i + 3]) for i in range(4))


@pytest.fixture(scope="module")
def pair(make_lora: Callable[..., Lora]) -> list[Adapter]:
    wanted = "attn2 conv1 text_encoder"
    return [Adapter("one", make_lora(1, wanted, size=0.2), 0.8), Adapter("two", make_lora(2, wanted, size=0.2), -0.6)]


def run(unet: nn.Module) -> Tensor:
    with torch.no_grad():
        return unet(some(1, 8, 8, 8), torch.tensor(500), encoder_hidden_states=some(1, 16, 32, seed=1)).sample


@pytest.mark.parametrize("how", sorted(HOWS))
def test_the_bank_attaches_the_one_made_of_several(base: Base, pair: list[Adapter], how: str) -> None:
    method = Merge.of(how=how, weight=0.5)
    with LoraBank.on(base, pair, fuse=method.fuse) as bank:
        got = run(base.unet)
        assert [a.name for a in bank.adapters] == ["one + two"]
        assert set(bank.matched) == {"one", "two"}
        one = bank.adapters[0].lora
    oracle = copy.deepcopy(base.unet)
    for name, part in one.layers.items():
        if name.startswith("unet."):
            weight = oracle.get_submodule(name.removeprefix("unet.")).weight
            weight.data += 0.5 * dense(part, weight.data).reshape(weight.shape)
    torch.testing.assert_close(got, run(oracle), atol=2e-5, rtol=1e-4)
    assert (got - run(base.unet)).abs().max() > 1e-3


def test_cat_equals_the_routed_sum_and_misfits_are_refused_before_merging(
    base: Base, pair: list[Adapter], sample: Sample
) -> None:
    torch.testing.assert_close(sample(Merge.of(how="cat"), pair), sample(Merge(), pair), atol=1e-4, rtol=1e-4)
    odd = Adapter("odd", Lora({"unet.nowhere": delta(1)}))
    with pytest.raises(LoraFileError, match="LoRA 'odd' does not fit"):
        sample(Merge.of(how="svd"), [pair[0], odd])
    assert torch.equal(sample(Merge.of(how="ties"), []), sample(None))


def test_one_weight_for_all(sample: Sample, pair: list[Adapter]) -> None:
    halved = [Adapter(a.name, a.lora, a.weight / 2) for a in pair]
    expected = sample(Merge(), halved)
    assert torch.equal(sample(Merge.of(weight="1/K"), pair), expected)
    assert torch.equal(sample(Merge.of(weight="0.5"), pair), expected)
    alone = [pair[0], Adapter("off", pair[1].lora, 0.0)]
    assert torch.equal(sample(Merge.of(weight="1/K"), alone), sample(Merge(), pair[:1]))


def test_weights_by_block(sample: Sample, pair: list[Adapter]) -> None:
    def only(adapter: Adapter, keep: Callable[[str], float]) -> Adapter:
        kept = {
            name: LoraDelta(part.down, part.up * keep(name), part.alpha)
            for name, part in adapter.lora.layers.items()
            if isinstance(part, LoraDelta)
        }
        return Adapter(adapter.name, Lora(kept), adapter.weight)

    blocks = '{"*": {"up": 0.5, "up_blocks.1": 0, "text_encoder": 0.3}, "two": {"down": 2}}'
    got = sample(Merge.of(blocks=blocks), pair)

    def weigh(name: str, second: bool) -> float:
        if name.startswith("text_encoder"):
            return 0.3
        if name.startswith("unet.up_blocks"):
            return 0.0 if name.startswith("unet.up_blocks.1.") else 0.5
        return 2.0 if second and name.startswith("unet.down_blocks") else 1.0

    expected = sample(Merge(), [only(pair[0], lambda n: weigh(n, False)), only(pair[1], lambda n: weigh(n, True))])
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert (got - sample(Merge(), pair)).abs().max() > 0.01
    assert torch.equal(sample(Merge.of(blocks=blocks.replace('"up', '"unet.up')), pair), got)
    with pytest.raises(RequestError, match="'blocks' names 'middle', where no LoRA"):
        sample(Merge.of(blocks={"one": {"middle": 0.0}}), pair)
    with pytest.raises(RequestError, match="blocks: is no JSON"):
        Merge.of(blocks="{")


def test_the_longest_part_counts() -> None:
    parts = {"up": 0.5, "up_blocks.1": 0.2, "up_blocks.10": 0.9}
    assert block_weight(parts, "unet.up_blocks.1.attentions.0") == 0.2
    assert block_weight(parts, "unet.up_blocks.10.attentions.0") == 0.9
    assert block_weight(parts, "unet.up_blocks.2.resnets.0") == 0.5
    assert block_weight(parts, "unet.mid_block.resnets.0") == 1
    assert block_weight({"text_encoder": 0.0}, "text_encoder_2.x") == 1
    for part in ("unet.up_blocks.1", "up_blocks.1", "unet.up_blocks.1.attentions"):
        assert block_weight({"unet.up": 0.5, part: 0.2}, "unet.up_blocks.1.attentions.0") == 0.2
    assert block_weight({"unet.up_blocks.1": 0.2}, "unet.up_blocks.10.attentions.0") == 1


@pytest.mark.parametrize(("before", "after"), [(1.0, 0.0), (0.0, 1.0)])
def test_two_points_at_one_share_are_a_step(before: float, after: float) -> None:
    points = [(0.0, before), (0.5, before), (0.5, after), (1.0, after)]
    shares = (0.0, 0.25, 0.49, 0.5, 0.75, 1.0)
    assert [at(points, share) for share in shares] == [before] * 3 + [after] * 3
    assert at([(0.5, before), (0.5, after)], 0.2) == before


def test_the_text_encoder_follows_the_schedule(
    base: Base, sample: Sample, pair: list[Adapter], make_lora: Callable[..., Lora], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With LoRAs on the text encoder alone, a factor is a weight; prompts are encoded again only where one of them changes."""
    texts = [Adapter(a.name, make_lora(seed, "text_encoder", size=0.3), a.weight) for seed, a in enumerate(pair)]
    half = sample(Merge(), [Adapter("one", texts[0].lora, 0.4), texts[1]])
    assert (half - sample(Merge(), texts)).abs().max() > 1e-3
    assert torch.equal(sample(Merge.of(schedule={"one": [(0, 0.5)]}), texts), half)
    told: list[Tensor] = []

    class Watched(Merge):
        def predict(self, run: Any, step: Any, x: Tensor) -> Any:
            told.append(run.positive.states)
            return super().predict(run, step, x)

    image_only = Adapter("two", make_lora(3, "attn2"), 1.0)
    steps = {"one": [[0, 1], [0.4, 1], [0.4, 0.5]]}
    sample(Watched.of(schedule=steps), [texts[0], image_only])
    assert all(one is told[0] for one in told[:2])
    assert all(one is told[2] for one in told[2:])
    assert (told[2] - told[0]).abs().max() > 1e-3
    told.clear()
    sample(Watched.of(schedule={"two": [[0, 0], [1, 1]]}), [texts[0], image_only])
    assert all(one is told[0] for one in told)


@pytest.mark.parametrize("options", [{"how": "svd"}, {"weight": 0.5}, {"weight": "1/K"}])
def test_a_merge_of_weights_needs_a_bank_that_makes_it(base: Base, pair: list[Adapter], options: dict[str, Any]) -> None:
    texts = encode_pair(base, ["a"], [""])
    settings: dict[str, Any] = {"seeds": [0], "size": (64, 32), "steps": 1, "guidance": 1.0, "scheduler": "ddim"}
    with (
        LoraBank.on(base, pair) as bank,
        pytest.raises(RequestError, match=r"attached without it: use LoraBank.on\(base, adapters, fuse=method.fuse\)"),
    ):
        denoise(base, *texts, bank=bank, method=Merge.of(**options), **settings)
    with LoraBank.on(base, []) as bank:
        denoise(base, *texts, bank=bank, method=Merge.of(**options), **settings)
    with LoraBank.on(base, pair) as bank:
        denoise(base, *texts, bank=bank, method=Merge(), **settings)


def test_weights_over_the_schedule(base: Base, sample: Sample, pair: list[Adapter]) -> None:
    assert [at([(0.5, 1.0), (0.0, 0.0)], share) for share in (0.0, 0.25, 0.5, 0.9)] == [0, 0.5, 1, 1]
    assert at([(0.3, 2.0)], 0.0) == 2
    routes: list[list[float]] = []

    class Watched(Merge):
        def predict(self, run: Any, step: Any, x: Tensor) -> Any:
            routes.append(run.bank.route.flatten().tolist())
            return super().predict(run, step, x)

    got = sample(Watched.of(schedule='{"two": [[0, 0], [0.4, 1]]}'), pair)
    assert [weights[0] for weights in routes] == [1] * 5
    assert [weights[1] for weights in routes] == pytest.approx([0, 0.5, 1, 1, 1])
    assert (got - sample(Merge(), pair)).abs().max() > 1e-3
    off = sample(Merge.of(schedule={"*": [(0, 0)]}), [pair[0]], prompt="a")
    assert (off - sample(Merge(), [pair[0]], prompt="a")).abs().max() > 1e-3
    for options, why in (
        ({"schedule": {"none": [(0, 1)]}}, "'schedule' names 'none', but no such LoRA"),
        ({"schedule": {"*": []}}, "holds an empty list"),
        ({"blocks": {"one": {"up": 1}}, "how": "svd"}, r"only '\*' can be meant"),
    ):
        with pytest.raises(RequestError, match=why):
            method_named("merge", **options).check(pair)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"rank": 4}, "'rank' does nothing with how='sum'"),
        ({"how": "svd", "density": 0.3}, "'density' does nothing with how='svd'"),
        ({"seed": 3}, "'seed' does nothing with how='sum'"),
        ({"how": "ties", "seed": 1}, "'seed' does nothing with how='ties'.*: take dare, dare_ties, lego"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(RequestError, match=why):
        method_named("merge", **options)
