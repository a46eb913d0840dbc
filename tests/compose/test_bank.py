from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compose.bank import Adapter, LoraBank
from compose.routes import Grid, Kind, Site, constant, per_row, spatial
from studio.base import Base
from studio.errors import LoraFileError, RequestError, WrongBaseError
from studio.lora.dense import dense
from studio.lora.model import DoraDelta, LohaDelta, LokrDelta, Lora, LoraDelta
from tests.compose.test_routes import OneLayer, low_rank

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
    """Everything that could be left behind: attributes, hooks and processors of every module, and the bits of every tensor."""
    facts: list[Any] = []
    for part, model in models.items():
        for name, module in model.named_modules():
            facts.append((part, name, type(module), sorted(module.__dict__), module.__dict__.get("forward")))
            facts.append([len(v) for k, v in sorted(module.__dict__.items()) if k.endswith("_hooks")])
            processor = getattr(module, "processor", None)
            facts.append((type(processor), processor))
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
        (conv, LoraDelta(some(2, 4, 3, 3), some(6, 2, 1, 1), 1.0, magnitude=torch.rand(6, generator=generator) + 1)),
        (conv, LokrDelta(w1=some(2, 2), w2=some(3, 2, 3, 3), scale=0.5)),
        (conv, DoraDelta(LokrDelta(some(2, 2), some(3, 2, 3, 3), 0.5), torch.rand(4, generator=generator) + 1, axis=1)),
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


@torch.no_grad()
def test_dora_and_lokr_on_a_strided_convolution_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    layer = nn.Conv2d(4, 6, 3, stride=2, padding=1)
    down, up, magnitude = some(2, 4, 3, 3), some(6, 2, 1, 1), torch.rand(6, generator=generator) + 1
    directed = layer.weight + 1.5 / 2 * torch.einsum("or,rihw->oihw", up[:, :, 0, 0], down)
    norms = torch.stack([channel.norm() for channel in directed])
    decomposed = directed * (magnitude / norms).view(6, 1, 1, 1) - layer.weight
    small, large = some(2, 2), some(3, 2, 3, 3)
    blocks = torch.cat([torch.cat([small[a, b] * large for b in range(2)], 1) for a in range(2)], 0)
    cases = [
        (LoraDelta(down, up, 1.5, magnitude=magnitude), decomposed),
        (LokrDelta(small, large, scale=0.5), 0.5 * blocks),
    ]
    model, x = OneLayer("a.conv", layer), some(3, 4, 9, 8)
    for delta, change in cases:
        oracle = copy.deepcopy(layer)
        oracle.weight += 0.7 * change
        with LoraBank({"unet": model}, [Adapter("x", Lora(layers={"unet.a.conv": delta}), 0.7)]):
            torch.testing.assert_close(model(x), oracle(x), atol=1e-5, rtol=1e-4)


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
