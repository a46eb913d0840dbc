from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compose.bank import Adapter, LoraBank
from compose.routes import Grid, Kind, Site, constant, per_row, shaped, site_of, spatial
from studio.base import Base
from studio.errors import LoraFileError, RequestError, WrongBaseError
from studio.lora.dense import dense
from studio.lora.model import LohaDelta, LokrDelta, Lora, LoraDelta

EVERYWHERE = "attn1 attn2 ff.net conv1 conv2 time_emb_proj proj_in proj_out conv_shortcut downsamplers"
GRID = Grid(rows=3, height=8, width=6)


def inputs(base: Base, rows: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 8, GRID.height, GRID.width, generator=generator)
    return x, torch.tensor(500), torch.randn(rows, 16, 32, generator=generator)


def run(unet: nn.Module, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    with torch.no_grad():
        return unet(x, t, encoder_hidden_states=text, return_dict=False)[0]


def merged(model: nn.Module, part: str, adapters: list[Adapter], weights: list[float]) -> nn.Module:
    """The oracle: a copy whose weights hold ``W + sum w dW``."""
    other = copy.deepcopy(model)
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, delta in adapter.lora.layers.items():
            if name.startswith(part + "."):
                module = other.get_submodule(name.removeprefix(part + "."))
                module.weight.data += weight * adapter.weight * dense(delta, module.weight.data).reshape(module.weight.shape)
    return other


def snapshot(models: dict[str, nn.Module]) -> list[Any]:
    """Everything that could be left behind: attributes of every module, hooks, and the bits of every tensor."""
    facts: list[Any] = []
    for part, model in models.items():
        for name, module in model.named_modules():
            facts.append((part, name, type(module), sorted(module.__dict__), module.__dict__.get("forward")))
            facts.append([len(v) for k, v in sorted(module.__dict__.items()) if k.endswith("_hooks")])
        facts += [(part, key, value.dtype, value.numpy().tobytes()) for key, value in model.state_dict().items()]
    return facts


@pytest.fixture(scope="module")
def pair(make_lora: Callable[..., Lora]) -> list[Adapter]:
    return [
        Adapter("one", make_lora(1, EVERYWHERE, rank=2, size=0.1), 0.8),
        Adapter("two", make_lora(2, EVERYWHERE, rank=3, size=0.1), -0.5),
    ]


def test_constant_route_equals_merged_weights(base: Base, pair: list[Adapter]) -> None:
    given = inputs(base)
    with LoraBank.on(base, pair) as bank:
        out = run(base.unet, *given)
        bank.route = constant([0.5, 2.0])
        other = run(base.unet, *given)
        bank.route = constant([0.0, 1.0])
        only_second = run(base.unet, *given)
    plain = run(base.unet, *given)
    for got, weights in ((out, [1.0, 1.0]), (other, [0.5, 2.0]), (only_second, [0.0, 1.0])):
        torch.testing.assert_close(got, run(merged(base.unet, "unet", pair, weights), *given), atol=2e-5, rtol=1e-4)
        assert (got - plain).abs().max() > 0.05


def test_text_encoder_loras_act_while_encoding(base: Base, make_lora: Callable[..., Lora]) -> None:
    adapters = [Adapter("words", make_lora(3, "text_encoder"), 1.0)]
    ids = torch.arange(32).view(2, 16)
    with LoraBank.on(base, adapters):
        out = base.text_encoder(ids).last_hidden_state
    oracle = merged(base.text_encoder, "text_encoder", adapters, [1.0])(ids).last_hidden_state
    torch.testing.assert_close(out, oracle, atol=2e-5, rtol=1e-4)
    assert (out - base.text_encoder(ids).last_hidden_state).abs().max() > 0.05


def test_each_row_may_use_its_own_mix(base: Base, pair: list[Adapter]) -> None:
    given = inputs(base)
    mixes = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    with LoraBank.on(base, pair) as bank:
        bank.route = per_row(mixes)
        bank.at(GRID)
        out = run(base.unet, *given)
    for row, mix in enumerate(mixes.tolist()):
        oracle = run(merged(base.unet, "unet", pair, mix), *given)[row]
        torch.testing.assert_close(out[row], oracle, atol=2e-5, rtol=1e-4)


def test_rows_of_their_own_keep_the_graph_where_gradients_are_on(base: Base, pair: list[Adapter]) -> None:
    x, t, text = inputs(base)
    route = per_row(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.0]]))
    with LoraBank.on(base, pair) as bank:
        bank.route = route
        plain = run(base.unet, x, t, text)
        x.requires_grad_()
        out = base.unet(x, t, encoder_hidden_states=text).sample
        torch.testing.assert_close(out, plain, atol=1e-5, rtol=1e-4)
        (got,) = torch.autograd.grad(out[1].square().sum(), x)
    oracle = merged(base.unet, "unet", pair, [0.0, 1.0])
    (expected,) = torch.autograd.grad(oracle(x, t, encoder_hidden_states=text).sample[1].square().sum(), x)
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)
    assert got[1].abs().max() > 0 == got[0].abs().max()


def test_gains_by_layer_and_a_borrowed_route(base: Base, pair: list[Adapter]) -> None:
    given = inputs(base)

    def gains(site: Site) -> list[float]:
        return [2.0, 0.5] if site.name.startswith("unet.up_blocks") else [1.0, 0.0]

    oracle = copy.deepcopy(base.unet)
    for index, adapter in enumerate(pair):
        for name, delta in adapter.lora.layers.items():
            module = oracle.get_submodule(name.removeprefix("unet."))
            strength = adapter.weight * gains(Site(name, Kind.IMAGE))[index]
            module.weight.data += strength * dense(delta, module.weight.data).reshape(module.weight.shape)
    with LoraBank.on(base, pair) as bank:
        plain = run(base.unet, *given)
        with bank.acting(constant([1.0, 1.0])):
            bank.by_layer(gains)
            torch.testing.assert_close(run(base.unet, *given), run(oracle, *given), atol=2e-5, rtol=1e-4)
            # The same through every other way a route can take.
            same = run(base.unet, *given)
            bank.at(GRID)
            for route in (per_row(torch.tensor([[1.0, 1], [1, 1], [0, 0]])), spatial(torch.ones(2, 8, 6))):
                bank.route = route
                torch.testing.assert_close(run(base.unet, *given)[:2], same[:2], atol=2e-5, rtol=1e-4)
            bank.route = lambda out, deltas, site: torch.ones(2)
            torch.testing.assert_close(run(base.unet, *given), same, atol=2e-5, rtol=1e-4)
            with pytest.raises(ZeroDivisionError), bank.acting(constant([0.0, 0.0])):
                raise ZeroDivisionError
            torch.testing.assert_close(run(base.unet, *given), same, atol=2e-5, rtol=1e-4)
        assert torch.equal(run(base.unet, *given), plain)


def test_full_masks_are_the_constant_route(base: Base, pair: list[Adapter]) -> None:
    given = inputs(base)
    masks = torch.stack([torch.ones(8, 6), torch.zeros(8, 6)])
    with LoraBank.on(base, pair) as bank:
        bank.route = spatial(masks)
        bank.at(GRID)
        out = run(base.unet, *given)
        bank.route = constant([1.0, 0.0])
        torch.testing.assert_close(out, run(base.unet, *given), atol=2e-5, rtol=1e-4)


class OneLayer(nn.Module):
    """A model of a single layer, named so that it stands at the wanted site."""

    def __init__(self, name: str, layer: nn.Module) -> None:
        super().__init__()
        *path, last = name.split(".")
        at: nn.Module = self
        for part in path:
            at.add_module(part, nn.Module())
            at = at.get_submodule(part)
        at.add_module(last, layer)
        self.layer = [layer]

    def forward(self, x: Tensor) -> Tensor:
        return self.layer[0](x)


def low_rank(layer: nn.Linear | nn.Conv2d, seed: int) -> LoraDelta:
    generator = torch.Generator().manual_seed(seed)
    out, *into = layer.weight.shape
    up = torch.randn(out, 2, *(1,) * (len(into) - 1), generator=generator)
    return LoraDelta(down=torch.randn(2, *into, generator=generator), up=up, alpha=1.0)


def masked_oracle(layer: nn.Linear | nn.Conv2d, deltas: list[LoraDelta], weights: list[Tensor], x: Tensor) -> Tensor:
    """``W x + sum_k mask_k * (dW_k x)`` with masks in the shape of the output."""
    out = layer(x)
    for delta, weight in zip(deltas, weights, strict=True):
        bare = copy.deepcopy(layer)
        bare.weight.data = dense(delta, layer.weight.data)
        bare.bias = None
        out = out + weight * bare(x)
    return out


@torch.no_grad()
def check_masked(name: str, layer: nn.Linear | nn.Conv2d, x: Tensor, weights: list[Tensor], route: Tensor, grid: Grid) -> None:
    deltas = [low_rank(layer, seed) for seed in range(len(weights))]
    adapters = [Adapter(f"lora {i}", Lora(layers={"unet." + name: delta})) for i, delta in enumerate(deltas)]
    model = OneLayer(name, layer)
    oracle = masked_oracle(layer, deltas, weights, x)
    with LoraBank({"unet": model}, adapters) as bank:
        bank.route = route
        bank.at(grid)
        torch.testing.assert_close(model(x), oracle, atol=1e-5, rtol=1e-4)
        # A route that also has the channel axis goes the wide way and must agree.
        channels = layer.weight.shape[0]
        bank.route = route.expand(*route.shape[:4], channels, route.shape[5])
        torch.testing.assert_close(model(x), oracle, atol=1e-5, rtol=1e-4)


def test_masks_on_image_tokens() -> None:
    masks = torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(0))
    grid = Grid(rows=3, height=8, width=12)
    weights = [mask.reshape(1, 24, 1) for mask in masks]
    check_masked("a.attn1.to_q", nn.Linear(5, 7), torch.randn(3, 24, 5), weights, spatial(masks), grid)
    # The mask at latent resolution acts by its area means where the layer is coarser.
    fine = masks.repeat_interleave(2, 1).repeat_interleave(2, 2)
    check_masked("a.attn1.to_q", nn.Linear(5, 7), torch.randn(3, 24, 5), weights, spatial(fine), grid)


def test_masks_on_convolution_maps() -> None:
    masks = torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(0))
    grid = Grid(rows=3, height=8, width=12)
    layer = nn.Conv2d(5, 7, 3, stride=2, padding=1)
    weights = [mask.reshape(1, 1, 4, 6) for mask in masks]
    check_masked("a.downsamplers.0.conv", layer, torch.randn(3, 5, 8, 12), weights, spatial(masks), grid)


def test_text_tokens_and_vectors_take_the_mean_of_a_mask() -> None:
    masks = torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(0))
    grid = Grid(rows=3, height=8, width=12)
    means = [mask.mean() for mask in masks]
    check_masked("a.attn2.to_k", nn.Linear(5, 7), torch.randn(3, 9, 5), means, spatial(masks), grid)
    check_masked("a.time_emb_proj", nn.Linear(5, 7), torch.randn(3, 5), means, spatial(masks), grid)


def test_frames_on_temporal_and_on_image_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    route = torch.rand(2, 5, 2, 3, 1, 2, generator=generator)
    grid = Grid(rows=2, height=2, width=3, frames=5)
    temporal = [route[:, :, :, :, 0, k].permute(0, 2, 3, 1).reshape(12, 5, 1) for k in range(2)]
    check_masked("a.motion_modules.0.to_q", nn.Linear(5, 7), torch.randn(12, 5, 5), temporal, route, grid)
    image = [route[:, :, :, :, 0, k].reshape(10, 6, 1) for k in range(2)]
    check_masked("a.attn1.to_q", nn.Linear(5, 7), torch.randn(10, 6, 5), image, route, grid)


def test_sites_of_a_unet(base: Base) -> None:
    kinds = {name: site_of("unet." + name, module).kind for name, module in base.unet.named_modules()}
    block = "down_blocks.0.attentions.0.transformer_blocks.0."
    assert kinds[block + "attn1.to_k"] is kinds[block + "attn2.to_q"] is kinds[block + "ff.net.2"] is Kind.IMAGE
    assert kinds[block + "attn2.to_k"] is kinds[block + "attn2.to_v"] is Kind.TEXT
    assert kinds["down_blocks.0.resnets.0.time_emb_proj"] is kinds["time_embedding.linear_1"] is Kind.VECTOR
    assert kinds["down_blocks.0.resnets.0.conv1"] is kinds["conv_in"] is Kind.CONV


def test_odd_sizes_round_up_as_the_unet_does() -> None:
    site = Site("x", Kind.IMAGE)
    route = spatial(torch.rand(1, 9, 5))
    assert shaped(route, site, (1, 15, 4), Grid(rows=1, height=9, width=5)).shape == (1, 15, 1, 1)
    with pytest.raises(ValueError, match="16 tokens are no halving"):
        shaped(route, site, (1, 16, 4), Grid(rows=1, height=9, width=5))


def test_a_route_may_be_computed_from_hidden_states(base: Base, pair: list[Adapter]) -> None:
    given = inputs(base)
    seen: set[str] = set()

    def gate(out: Tensor, deltas: Tensor, site: Site) -> Tensor:
        assert deltas.shape == (*out.shape, 2)
        seen.add(site.name)
        return torch.tensor([0.5, 2.0])

    with LoraBank.on(base, pair) as bank:
        bank.route = gate
        out = run(base.unet, *given)
        bank.route = constant([0.5, 2.0])
        torch.testing.assert_close(out, run(base.unet, *given), atol=2e-5, rtol=1e-4)
    assert seen == set(pair[0].lora.layers)


def test_dora_loha_and_lokr_act_through_their_dense_change() -> None:
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    linear, conv = nn.Linear(6, 8), nn.Conv2d(4, 6, 3, padding=1)
    cases = [
        (linear, LoraDelta(down=some(2, 6), up=some(8, 2), alpha=1.0, magnitude=torch.rand(8, generator=generator) + 1)),
        (linear, LohaDelta(w1_a=some(8, 2), w1_b=some(2, 6), w2_a=some(8, 2), w2_b=some(2, 6), alpha=1.0)),
        (linear, LokrDelta(w1=some(2, 3), w2=some(4, 2), scale=0.5)),
        (conv, LohaDelta(w1_a=some(6, 2), w1_b=some(2, 36), w2_a=some(6, 2), w2_b=some(2, 36), alpha=1.0)),
    ]
    with torch.no_grad():
        for layer, delta in cases:
            model = OneLayer("a.to_q" if layer is linear else "a.conv", layer)
            name = "unet.a.to_q" if layer is linear else "unet.a.conv"
            x = some(3, 5, 6) if layer is linear else some(3, 4, 8, 8)
            oracle = copy.deepcopy(layer)
            oracle.weight.data += 0.7 * dense(delta, layer.weight.data).reshape(layer.weight.shape)
            with LoraBank({"unet": model}, [Adapter("x", Lora(layers={name: delta}), 0.7)]) as bank:
                torch.testing.assert_close(model(x), oracle(x), atol=1e-5, rtol=1e-4)
                bank.route = per_row(torch.tensor([[1.0], [0.0], [1.0]]))
                bank.at(Grid(rows=3, height=8, width=8))
                out = model(x)
            torch.testing.assert_close(out[[0, 2]], oracle(x)[[0, 2]], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(out[1], layer(x)[1])


def test_a_linear_lora_stored_as_convolution_fits_a_linear_layer() -> None:
    layer = nn.Linear(6, 8)
    flat = low_rank(layer, 0)
    stored = LoraDelta(down=flat.down[:, :, None, None], up=flat.up[:, :, None, None], alpha=flat.alpha)
    x = torch.randn(2, 3, 6)
    outs = []
    for delta in (flat, stored):
        model = OneLayer("a.to_q", layer)
        with torch.no_grad(), LoraBank({"unet": model}, [Adapter("x", Lora(layers={"unet.a.to_q": delta}))]):
            outs.append(model(x))
    assert torch.equal(*outs)


def test_zero_weight_leaves_the_base_bit_equal_and_attaches_nothing(base: Base, make_lora: Callable[..., Lora]) -> None:
    given = inputs(base)
    plain = run(base.unet, *given)
    with LoraBank.on(base, [Adapter("off", make_lora(1), 0.0)]):
        assert not any("forward" in module.__dict__ for module in base.unet.modules())
        assert torch.equal(run(base.unet, *given), plain)
    with LoraBank.on(base, [Adapter("on", make_lora(1), 1.0)]) as bank:
        assert not torch.equal(run(base.unet, *given), plain)
        bank.route = constant([0.0])
        assert torch.equal(run(base.unet, *given), plain)


def test_everything_is_as_before_on_exit_and_after_an_exception(base: Base, pair: list[Adapter]) -> None:
    models = base.models()
    models["unet"].down_blocks[0].resnets[0].conv1.forward = kept = models["unet"].down_blocks[0].resnets[0].conv1.forward
    try:
        before = snapshot(models)
        with LoraBank.on(base, pair) as bank:
            bank.route = per_row(torch.rand(3, 2))
            bank.at(GRID)
            run(base.unet, *inputs(base))
            assert snapshot(models) != before
        assert snapshot(models) == before
        with pytest.raises(ZeroDivisionError), LoraBank.on(base, pair):
            raise ZeroDivisionError
        assert snapshot(models) == before
        assert models["unet"].down_blocks[0].resnets[0].conv1.forward is kept
    finally:
        del models["unet"].down_blocks[0].resnets[0].conv1.forward


def test_all_layers_match_or_none_is_attached(base: Base, make_lora: Callable[..., Lora]) -> None:
    good = make_lora(1)
    with LoraBank.on(base, [Adapter("good", good)]) as bank:
        assert bank.matched == {"good": len(good.layers)}
        assert bank.notes == []
    before = snapshot(base.models())
    name, delta = next(iter(good.layers.items()))
    absent = Lora(layers={**good.layers, "unet.down_blocks.9.to_q": delta})
    total = len(good.layers)
    with pytest.raises(
        LoraFileError, match=rf"'bad'.*{total} of {total + 1} layers matched.*down_blocks\.9\.to_q' is not there"
    ):
        LoraBank.on(base, [Adapter("good", good), Adapter("bad", absent)]).__enter__()
    wide = Lora(layers={**good.layers, name: LoraDelta(down=torch.zeros(2, 999), up=delta.up[:, :2], alpha=1.0)})
    with pytest.raises(LoraFileError, match=rf"{total - 1} of {total} layers matched.*has another shape"):
        LoraBank.on(base, [Adapter("bad", wide)]).__enter__()
    with pytest.raises(LoraFileError, match="0 of 0 layers"):
        LoraBank.on(base, [Adapter("empty", Lora(layers={}))]).__enter__()
    assert snapshot(base.models()) == before


def test_another_family_is_refused_and_another_version_noted(base: Base, make_lora: Callable[..., Lora]) -> None:
    with pytest.raises(WrongBaseError, match="trained for the family 'sd15', but the base is of the family 'embedded'"):
        LoraBank.on(base, [Adapter("foreign", make_lora(1, family="sd15"))]).__enter__()
    attention = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    unlabelled = Lora(layers={attention: LoraDelta(down=torch.zeros(2, 768), up=torch.zeros(1280, 2), alpha=1.0)})
    with pytest.raises(WrongBaseError, match=r"0 of 1 layers matched.*looks made for the family 'sd15'"):
        LoraBank.on(base, [Adapter("foreign", unlabelled)]).__enter__()
    with LoraBank.on(base, [Adapter("old", make_lora(1, family="embedded", base_sha256="f" * 64))]) as bank:
        assert len(bank.notes) == 1
        assert "LoRA 'old' was trained on another version of the base" in bank.notes[0]
    with LoraBank.on(base, [Adapter("new", make_lora(1, family="embedded", base_sha256=base.sha256))]) as bank:
        assert bank.notes == []


def test_models_that_carry_peft_layers_are_refused(base: Base, make_lora: Callable[..., Lora]) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    unet = copy.deepcopy(base.unet)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), unet)
    with pytest.raises(RequestError, match="the unet already carries PEFT"):
        LoraBank({"unet": unet}, [Adapter("x", make_lora(1))]).__enter__()


def test_bad_routes_are_programming_errors(base: Base, pair: list[Adapter]) -> None:
    with LoraBank.on(base, pair) as bank:
        with pytest.raises(ValueError, match="k = 2"):
            bank.route = constant([1.0])
        with pytest.raises(ValueError, match="NaN"):
            bank.route = constant([1.0, float("nan")])
        bank.route = spatial(torch.rand(2, 8, 6))
        with pytest.raises(RuntimeError, match="grid"):
            run(base.unet, *inputs(base))
        bank.route = per_row(torch.rand(2, 2))
        with pytest.raises(ValueError, match="2 rows does not fit a layer with 3 rows"):
            run(base.unet, *inputs(base))
        with pytest.raises(ValueError, match="3 gains for 2 LoRAs"):
            bank.by_layer(lambda site: [1.0] * 3)
        with pytest.raises(RuntimeError, match="attached already"):
            bank.__enter__()
