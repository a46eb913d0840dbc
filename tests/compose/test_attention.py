"""The attention processor against the slow exact way: explicit maps, dense masks, layers computed one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compose.attention import Attention, Processor, attention_layers, from_frames, isolated, mass, read, visible
from compose.bank import Adapter, LoraBank
from compose.kernels import in_xformers_layout, sdpa
from compose.plan import (
    AttentionPlan,
    Isolation,
    KeyFrames,
    Regional,
    Regions,
    RegionText,
    Role,
    Tap,
    Where,
    columns,
)  # fmt: skip
from compose.routes import Grid, constant
from studio.base import Base
from studio.errors import RequestError
from studio.lora.dense import dense
from studio.lora.model import Lora
from tests.compose.test_kernels import in_layout

GRID = Grid(rows=2, height=8, width=12)
CROSS, SELF = Where(role=Role.CROSS), Where(role=Role.SELF)
APART = Regions(((0.0, 0.0, 0.4, 1.0), (0.5, 0.25, 1.0, 1.0)))


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 8, GRID.height, GRID.width, generator=generator)
    return x, torch.tensor(500), torch.randn(2, 16, 32, generator=generator)


def run(unet: nn.Module, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    with torch.no_grad():
        return unet(x, t, encoder_hidden_states=text, return_dict=False)[0]


def under(base: Base, plan: AttentionPlan | None, **more: Any) -> Tensor:
    with Attention(base.unet, **more) as attention:
        attention.plan = plan
        attention.at(GRID)
        return run(base.unet, *inputs())


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_nothing_planned_is_bit_equal_and_the_old_processors_come_back(base: Base) -> None:
    plain = run(base.unet, *inputs())
    before = {name: module.processor for name, module in attention_layers(base.unet)}
    assert len(before) == 14
    assert torch.equal(under(base, None), plain)
    assert torch.equal(under(base, AttentionPlan()), plain)
    with Attention(base.unet) as attention:
        assert all(isinstance(base.unet.get_submodule(name).processor, Processor) for name in before)
        with attention.lifted():
            assert all(module.processor is before[name] for name, module in attention_layers(base.unet))
    with pytest.raises(ZeroDivisionError), Attention(base.unet):
        raise ZeroDivisionError
    after = {name: module.processor for name, module in attention_layers(base.unet)}
    assert all(after[name] is before[name] for name in before)


def test_taps_change_no_bit_and_read_what_an_explicit_map_holds(base: Base) -> None:
    plain = run(base.unet, *inputs())
    sets = columns(16, [1], [2, 3])
    taps = (
        Tap(name="words", where=CROSS, sets=sets, rows=(1,)),
        Tap(name="all", where=CROSS),
        Tap(name="places", where=Where(role=Role.SELF, scale=2), sets=torch.ones(1, 8, 12)),
    )
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            q = module.to_q(args[0]).unflatten(-1, (module.heads, -1)).transpose(1, 2)
            k = module.to_k(kwargs["encoder_hidden_states"]).unflatten(-1, (module.heads, -1)).transpose(1, 2)
            seen[name] = torch.softmax(q @ k.transpose(-1, -2) * module.scale, -1).mean(1)

        return hook

    cross = [(name, module) for name, module in attention_layers(base.unet) if module.is_cross_attention]
    handles = [module.register_forward_pre_hook(watch(name), with_kwargs=True) for name, module in cross]
    try:
        with Attention(base.unet) as attention:
            attention.plan = AttentionPlan(taps=taps)
            attention.at(GRID)
            with attention.collecting() as maps:
                assert torch.equal(run(base.unet, *inputs()), plain)
            with attention.collecting() as later:
                pass
            run(base.unet, *inputs())
    finally:
        for handle in handles:
            handle.remove()
    assert later == {}
    assert [each.layer for each in maps["words"]] == list(seen)
    for word, whole in zip(maps["words"], maps["all"], strict=True):
        torch.testing.assert_close(whole.values, seen[whole.layer])
        torch.testing.assert_close(word.values, seen[word.layer][1:] @ sets.T)
        assert word.pictures().shape == (1, 2, *word.cells)
    assert {each.cells for each in maps["places"]} == {(4, 6)}
    assert len(maps["places"]) == 3
    for each in maps["places"]:
        torch.testing.assert_close(each.values, torch.ones_like(each.values))


@pytest.mark.parametrize("size", [4, 40, 64, 80, 160])
def test_sets_are_read_alike_explicitly_and_through_the_kernel(size: int) -> None:
    q, k = some(2, 3, 20, size).requires_grad_(), some(2, 3, 30, size, seed=1)
    sets = (some(7, 30, seed=2) > 0.5).float()
    explicit, fused = read(q, k, sets, None, sdpa), mass(q, k, sets, sdpa)
    torch.testing.assert_close(explicit, fused)
    weights = some(*explicit.shape, seed=3)
    (one,), (two,) = (torch.autograd.grad((got * weights).sum(), q) for got in (explicit, fused))
    torch.testing.assert_close(one, two)
    torch.testing.assert_close(read(q, k, sets.expand(2, -1, -1), None, sdpa), explicit)
    torch.testing.assert_close(mass(q, k, sets.expand(2, -1, -1), sdpa), explicit)


def test_a_map_too_large_to_write_out_is_read_by_sets_only() -> None:
    q = some(1, 1, 1100, 4)
    torch.testing.assert_close(read(q, q, torch.ones(1, 1100), None, sdpa), torch.ones(1, 1100, 1))
    with pytest.raises(RequestError, match="1100 x 1100 places are too many"):
        read(q, q, None, None, sdpa)


def dense_isolation(q: Tensor, k: Tensor, v: Tensor, covered: Tensor) -> Tensor:
    """The oracle: a mask entry by entry from the definition."""
    count = covered.shape[1]
    allowed = torch.ones(count, count, dtype=torch.bool)
    for i in range(count):
        for j in range(count):
            mine, theirs = set(covered[:, i].nonzero().flatten().tolist()), set(covered[:, j].nonzero().flatten().tolist())
            allowed[i, j] = not mine or not theirs or bool(mine & theirs)
    torch.testing.assert_close(visible(covered), allowed)
    return torch.softmax((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~allowed, float("-inf")), -1) @ v


@pytest.mark.parametrize(
    "boxes",
    [
        ((0.0, 0.0, 0.4, 1.0), (0.5, 0.25, 1.0, 1.0)),
        ((0.0, 0.0, 0.6, 1.0), (0.5, 0.0, 1.0, 1.0)),  # overlapping, together everything
        ((0.0, 0.0, 1.0, 1.0), (0.3, 0.3, 0.7, 0.7), (0.8, 0.8, 1.0, 1.0)),  # nested
        ((0.1, 0.1, 0.5, 0.5),),
    ],
)
def test_isolation_by_gather_is_the_dense_mask(boxes: Any) -> None:
    regions = Regions(boxes)
    q, k, v = (some(2, 3, 96, 8, seed=seed) for seed in range(3))
    got = isolated(q, k, v, Isolation(regions=regions), (8, 12), sdpa)
    expected = dense_isolation(q, k, v, regions.at(8, 12))
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    half = isolated(q, k, v, Isolation(regions=regions, rows=(1,)), (8, 12), sdpa)
    torch.testing.assert_close(half[1], expected[1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(half[0], sdpa(q, k, v)[0])
    assert got.half().isfinite().all()
    low = isolated(q.bfloat16(), k.bfloat16(), v.bfloat16(), Isolation(regions=regions), (8, 12), sdpa)
    assert low.isfinite().all()
    if len(boxes) == 1:
        torch.testing.assert_close(got, sdpa(q, k, v), atol=1e-6, rtol=1e-5)


def test_isolation_in_a_whole_unet_and_what_a_tap_sees_of_it(base: Base) -> None:
    plain = run(base.unet, *inputs())
    apart = APART.at(8, 12)
    sets = torch.stack([apart[1], ~apart.any(0)]).view(2, 8, 12).float()
    tap = Tap(name="leak", where=Where(role=Role.SELF, scale=1), sets=sets)
    with Attention(base.unet) as attention:
        attention.plan = AttentionPlan(isolation=Isolation(regions=APART), taps=(tap,))
        attention.at(GRID)
        with attention.collecting() as maps:
            got = run(base.unet, *inputs())
    assert (got - plain).abs().max() > 1e-4
    for each in maps["leak"]:
        assert each.values[:, apart[0], 0].abs().max() == 0
        assert each.values[:, apart[0], 1].min() > 0
        assert each.values[:, apart[1], 0].min() > 0
    one = Isolation(regions=Regions(APART.places[:1]))
    torch.testing.assert_close(under(base, AttentionPlan(isolation=one)), plain, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def pair(make_lora: Callable[..., Lora]) -> list[Adapter]:
    return [Adapter("one", make_lora(1, size=0.3), 0.8), Adapter("two", make_lora(2, size=0.3))]


class OneLayer:
    """An attention layer of the tiny base by itself, with its routed LoRAs and a plan."""

    def __init__(self, base: Base, kind: str) -> None:
        self.name = f"down_blocks.0.attentions.0.transformer_blocks.0.{kind}"
        self.module: Any = base.unet.get_submodule(self.name)
        self.x, self.text = some(2, 96, 16), some(2, 16, 32, seed=1)

    def __call__(self) -> Tensor:
        with torch.no_grad():
            return self.module(self.x, encoder_hidden_states=self.text if self.module.is_cross_attention else None)


def test_text_by_region_against_layers_computed_one_by_one(base: Base, pair: list[Adapter]) -> None:
    layer = OneLayer(base, "attn2")
    overlapping = Regions(((0.0, 0.0, 0.6, 1.0), (0.5, 0.25, 1.0, 0.8)))
    texts = (some(2, 16, 32, seed=5), some(1, 24, 32, seed=6))
    plain = layer()
    outs = []
    for adapter, text in zip(pair, texts, strict=True):
        one = copy.deepcopy(layer.module)
        for projection in ("to_k", "to_v", "to_out.0"):
            weight = one.get_submodule(projection).weight
            weight.data += adapter.weight * dense(adapter.lora.layers[f"unet.{layer.name}.{projection}"], weight.data)
        with torch.no_grad():
            outs.append(one(layer.x, encoder_hidden_states=text.expand(2, -1, -1)))
    covered = overlapping.at(8, 12)
    count = covered.sum(0)[None, :, None]
    mean = (outs[0] * covered[0][None, :, None] + outs[1] * covered[1][None, :, None]) / count.clamp(min=1)
    routes = (constant([1.0, 0.0]), constant([0.0, 1.0]))
    with LoraBank.on(base, pair) as bank, Attention(base.unet, bank=bank) as attention:
        bank.route = constant([0.0, 0.0])
        attention.at(GRID)
        for replace in (1.0, 0.3):
            spoken = tuple(RegionText(text, route) for text, route in zip(texts, routes, strict=True))
            attention.plan = AttentionPlan(regional=Regional(regions=overlapping, texts=spoken, replace=replace))
            for _ in range(2):  # the second time from remembered keys and values
                got = layer()
                expected = torch.where(count > 0, (1 - replace) * plain + replace * mean, plain)
                torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
                outside = covered.sum(0) == 0
                assert torch.equal(got[:, outside], plain[:, outside])
        assert torch.equal(bank.route, constant([0.0, 0.0]))


def test_the_order_of_regions_does_not_matter_and_equal_ones_are_one(base: Base, pair: list[Adapter]) -> None:
    layer = OneLayer(base, "attn2")
    one, two = RegionText(some(1, 16, 32, seed=5)), RegionText(some(1, 16, 32, seed=6))
    a, b = (0.0, 0.0, 0.6, 1.0), (0.5, 0.25, 1.0, 0.8)

    def said(boxes: Any, texts: Any) -> Tensor:
        with Attention(base.unet) as attention:
            attention.at(GRID)
            attention.plan = AttentionPlan(regional=Regional(regions=Regions(boxes), texts=texts))
            return layer()

    torch.testing.assert_close(said((a, b), (one, two)), said((b, a), (two, one)))
    torch.testing.assert_close(said((a, a), (one, one)), said((a,), (one,)))
    everywhere = said(((0.0, 0.0, 1.0, 1.0),), (RegionText(layer.text),))
    torch.testing.assert_close(everywhere, layer())
    with pytest.raises(ValueError, match="1 texts for 2 regions"):
        AttentionPlan(regional=Regional(regions=Regions((a, b)), texts=(one,)))


def test_a_tap_may_read_with_the_text_of_a_region(base: Base) -> None:
    layer = OneLayer(base, "attn2")
    text = some(1, 16, 32, seed=5)
    regional = Regional(regions=Regions(((0.0, 0.0, 0.5, 0.5),)), texts=(RegionText(text),))
    with Attention(base.unet) as attention:
        attention.at(GRID)
        attention.plan = AttentionPlan(regional=regional, taps=(Tap(name="own", where=CROSS, region=0),))
        with attention.collecting() as maps:
            layer()
    heads = layer.module.heads
    q, k = (p.unflatten(-1, (heads, -1)).transpose(1, 2) for p in (layer.module.to_q(layer.x), layer.module.to_k(text)))
    expected = torch.softmax(q @ k.transpose(-1, -2) * layer.module.scale, -1).mean(1)
    torch.testing.assert_close(maps["own"][0].values, expected)
    with pytest.raises(ValueError, match="reads the text of region 0"):
        AttentionPlan(taps=(Tap(name="own", where=CROSS, region=0),))


def test_key_frames_against_frames_computed_one_by_one(base: Base) -> None:
    layer = OneLayer(base, "attn1")
    layer.x = some(2 * 4, 96, 16)
    grid = Grid(rows=2, height=8, width=12, frames=4)
    assert KeyFrames().table(4).tolist() == [[0, 0], [0, 0], [0, 1], [0, 2]]
    assert KeyFrames(fixed=(-1,), beside=()).table(3).tolist() == [[2], [2], [2]]
    plain = layer()
    for plan in (KeyFrames(), KeyFrames(fixed=(0,), beside=()), KeyFrames(fixed=(), beside=(0,)), KeyFrames(beside=(-1, 0, 1))):
        with Attention(base.unet) as attention:
            attention.at(grid)
            attention.plan = AttentionPlan(key_frames=plan)
            got = layer()
        clips = layer.x.unflatten(0, (2, 4))
        for clip in range(2):
            for frame, keys in enumerate(plan.table(4).tolist()):
                context = torch.cat([clips[clip, key] for key in keys])[None]
                with torch.no_grad():
                    expected = layer.module(clips[clip, frame][None], encoder_hidden_states=context)
                torch.testing.assert_close(got[clip * 4 + frame][None], expected, atol=1e-6, rtol=1e-4)
        if plan.fixed == () and plan.beside == (0,):
            torch.testing.assert_close(got, plain)
    with pytest.raises(ValueError, match="cannot act in one plan"):
        AttentionPlan(key_frames=KeyFrames(), isolation=Isolation(regions=APART))
    assert from_frames(torch.arange(3.0).view(3, 1, 1, 1), KeyFrames().table(3)).flatten().tolist() == [0, 0, 0, 0, 0, 1]


def test_the_xformers_branch_against_the_stock_processors(base: Base) -> None:
    kernel = in_xformers_layout(in_layout)
    calls = []

    def counted(*given: Tensor) -> Tensor:
        calls.append(given)
        return kernel(*given)

    torch.testing.assert_close(under(base, None, kernel=counted), run(base.unet, *inputs()), atol=1e-5, rtol=1e-4)
    assert len(calls) == 14
    plan = AttentionPlan(isolation=Isolation(regions=APART), taps=(Tap(name="t", where=CROSS, sets=torch.ones(1, 16)),))
    torch.testing.assert_close(under(base, plan, kernel=kernel), under(base, plan), atol=1e-5, rtol=1e-4)
    mask = torch.zeros(2, 1, 5, 7)
    q, k = some(2, 3, 5, 8), some(2, 3, 7, 8, seed=1)
    torch.testing.assert_close(kernel(q, k, k, mask), sdpa(q, k, k))


def test_other_peoples_processors_are_refused(base: Base) -> None:
    unet = copy.deepcopy(base.unet)

    class IPAdapterAttnProcessor:
        pass

    unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.processor = IPAdapterAttnProcessor()
    with pytest.raises(RequestError, match=r"down_blocks\.0.*attn2' already has the processor IPAdapterAttnProcessor"):
        Attention(unet).__enter__()


class Largest(TorchDispatchMode):
    """The most elements any tensor had that was made meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


def test_no_map_of_a_large_layer_is_ever_written_out() -> None:
    """An SD1.5-shaped block, 8 heads of 40 and 4096 places (64 x 64 latents), its forward kept for gradients."""
    from diffusers.models.attention_processor import Attention as Layer

    size = 40
    model = nn.Module()
    model.attn1 = Layer(query_dim=8 * size, heads=8, dim_head=size)
    model.attn2 = Layer(query_dim=8 * size, heads=8, dim_head=size, cross_attention_dim=32)
    model.requires_grad_(False)
    texts = (RegionText(some(1, 77, 32)), RegionText(some(1, 77, 32, seed=1)))
    words = AttentionPlan(
        regional=Regional(regions=APART, texts=texts), taps=(Tap(name="words", where=CROSS, sets=columns(77, [1], [2])),)
    )
    places = AttentionPlan(taps=(Tap(name="places", where=SELF, sets=torch.ones(1, 64, 64)),))
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    x = some(1, 4096, 8 * size).requires_grad_()
    with Attention(model) as attention:
        attention.at(Grid(rows=1, height=64, width=64))
        with (
            attention.collecting() as maps,
            Largest() as largest,
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            attention.plan = words
            model.attn2(x, encoder_hidden_states=some(1, 77, 32, seed=2))
            attention.plan = places
            model.attn1(x)
            attention.plan = AttentionPlan(isolation=Isolation(regions=APART))
            model.attn1(x)
    assert {name: each[0].values.shape for name, each in maps.items()} == {"words": (1, 4096, 2), "places": (1, 4096, 1)}
    assert largest.elements <= 8 * 4096 * 77
    assert 4096 * 8 * size <= max(saved) <= 8 * 4096 * 77
