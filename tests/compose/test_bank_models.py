"""Bank and methods are not tied to one UNet: SDXL's second text encoder, and transformers that denoise."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compose.bank import Adapter, LoraBank
from compose.composite import Composite
from compose.merge import Merge
from compose.routes import per_row
from compose.run import Method, Run, Step
from compose.text import Encoded
from studio.base import load_base
from studio.errors import LoraFileError
from studio.lora.dense import dense
from studio.lora.files import check_against, load_lora, module_shapes
from studio.lora.model import Delta, LohaDelta, Lora, LoraDelta
from studio.lora.write import save_lora
from tests.compose.test_merge import agreeing, largest


def random_delta(weight: Tensor, generator: torch.Generator, rank: int = 3) -> LoraDelta:
    out, *into = weight.shape
    up = torch.randn(out, rank, *(1,) * (len(into) - 1), generator=generator) * 0.2
    return LoraDelta(torch.randn(rank, *into, generator=generator) * 0.2, up, 2.0)


def test_loras_on_the_second_text_encoder(tiny_sdxl: Path, tmp_path: Path) -> None:
    base = load_base(tiny_sdxl, device="cpu")
    second = base.text_encoder_2
    assert second is not None
    shapes = module_shapes(**base.models())
    names = [name for name in shapes if name.startswith("text_encoder_2.encoder.")]
    names += ["text_encoder_2.text_projection"]
    assert len(names) == 13
    generator = torch.Generator().manual_seed(0)
    lora = Lora({name: random_delta(torch.empty(shapes[name]), generator) for name in names})
    read = load_lora(save_lora(tmp_path / "second.safetensors", lora, "kohya"))
    assert set(read.layers) == set(names)

    oracle = copy.deepcopy(second)
    for name, delta in lora.layers.items():
        path = name.removeprefix("text_encoder_2.")
        weight = oracle.get_submodule(path if path == "text_projection" else f"text_model.{path}").weight
        weight.data += 0.7 * dense(delta, weight.data)
    ids = torch.arange(16)[None]
    with torch.no_grad():
        plain, expected = second(ids).text_embeds, oracle(ids).text_embeds
        with LoraBank.on(base, [Adapter("second", read, 0.7)]) as bank:
            assert bank.matched == {"second": 13}
            got = second(ids).text_embeds
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert (got - plain).abs().max() > 0.05


def sd3() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=24, caption_projection_dim=16, pooled_projection_dim=12, out_channels=4, pos_embed_max_size=8,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    given = {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(2, 5, 24, generator=generator),
        "pooled_projections": torch.randn(2, 12, generator=generator),
        "timestep": torch.tensor([500, 10]),
    }
    return model, given


def flux() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1, in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=12, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(4)
    given = {
        "hidden_states": torch.randn(2, 16, 8, generator=generator),
        "encoder_hidden_states": torch.randn(2, 5, 24, generator=generator),
        "pooled_projections": torch.randn(2, 12, generator=generator),
        "timestep": torch.tensor([0.5, 0.1]),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
        "txt_ids": torch.zeros(5, 3),
    }
    return model, given


@pytest.fixture(params=[sd3, flux])
def transformer(request: pytest.FixtureRequest) -> tuple[nn.Module, dict[str, Any]]:
    make: Callable[[], tuple[nn.Module, dict[str, Any]]] = request.param
    torch.manual_seed(0)
    model, given = make()
    for weight in model.parameters():  # some layers start at zero, and would hide a missing LoRA behind them
        nn.init.normal_(weight, std=0.15)
    return model.eval().requires_grad_(False), given


def test_the_sum_in_a_transformer_equals_merged_weights(transformer: tuple[nn.Module, dict[str, Any]], tmp_path: Path) -> None:
    model, given = transformer
    generator = torch.Generator().manual_seed(1)
    shapes = module_shapes(transformer=model)
    linear = [f"transformer.{path}" for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert any(".attn.add_k_proj" in name for name in linear) and any(".ff_context." in name for name in linear)
    one = Lora({name: random_delta(torch.empty(shapes[name]), generator) for name in linear})
    one = load_lora(save_lora(tmp_path / "one.safetensors", one))
    assert check_against(one, shapes).complete
    hadamard: dict[str, Delta] = {
        name: LohaDelta(
            *(torch.randn(size, generator=generator) * 0.5 for size in ((out, 2), (2, into)) * 2), alpha=1.0
        )
        for name in linear[::2]
        for out, into in [shapes[name]]
    }  # fmt: skip
    adapters = [Adapter("one", one, 0.8), Adapter("two", Lora(hadamard), -0.5)]

    oracle = copy.deepcopy(model)
    for adapter in adapters:
        for name, delta in adapter.lora.layers.items():
            weight = oracle.get_submodule(name.removeprefix("transformer.")).weight
            weight.data += adapter.weight * dense(delta, weight.data)
    with torch.no_grad():
        plain, expected = model(**given).sample, oracle(**given).sample
        with LoraBank({"transformer": model}, adapters) as bank:
            got = model(**given).sample
        assert bank.matched == {"one": len(linear), "two": len(linear[::2])}
        assert torch.equal(model(**given).sample, plain)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert (got - plain).abs().max() > 0.1


def test_a_unet_lora_does_not_fit_a_transformer() -> None:
    lora = Lora({"unet.conv_in": random_delta(torch.empty(8, 4, 3, 3), torch.Generator().manual_seed(0))})
    with pytest.raises(LoraFileError, match="0 of 1 layers matched"), LoraBank({"transformer": sd3()[0]}, [Adapter("x", lora)]):
        pass


def test_rows_with_loras_of_their_own_in_a_transformer(transformer: tuple[nn.Module, dict[str, Any]]) -> None:
    """What Composite and Switch ask for: each row as from a model with that row's LoRA merged in."""
    model, given = transformer
    shapes = module_shapes(transformer=model)
    generator = torch.Generator().manual_seed(1)
    linear = [f"transformer.{path}" for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    adapters = [
        Adapter(name, Lora({key: random_delta(torch.empty(shapes[key]), generator) for key in linear}))
        for name in ("one", "two")
    ]
    with torch.no_grad():
        plain = model(**given).sample
        with LoraBank({"transformer": model}, adapters) as bank:
            bank.route = per_row(torch.eye(2))
            got = model(**given).sample
    for row, adapter in enumerate(adapters):
        oracle = copy.deepcopy(model)
        for name, delta in adapter.lora.layers.items():
            weight = oracle.get_submodule(name.removeprefix("transformer.")).weight
            weight.data += dense(delta, weight.data)
        with torch.no_grad():
            torch.testing.assert_close(got[row], oracle(**given).sample[row], atol=1e-4, rtol=1e-4)
        assert (got[row] - plain[row]).abs().max() > 0.1


class AsUNet(nn.Module):
    """A transformer that is called as a UNet is; what else it wants follows from the text and the shape."""

    dtype = torch.float32

    def __init__(self, model: nn.Module, given: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.places = {key: value for key, value in given.items() if key.endswith("_ids")}

    def forward(self, x: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool) -> tuple[Tensor]:
        out: Tensor = self.model(
            hidden_states=x.flatten(2).mT if self.places else x,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=encoder_hidden_states.mean(1)[:, :12],
            timestep=timestep.expand(len(x)),
            return_dict=return_dict,
            **self.places,
        )[0]
        return (out.mT.reshape(x.shape) if self.places else out,)


@torch.no_grad()
def predicted(model: nn.Module, given: Mapping[str, Any], method: Method, adapters: list[Adapter]) -> Tensor:
    """What ``method`` predicts for two latents at its first step, ``[uncond or cond, n, c, h, w]``."""
    x, states = given["hidden_states"], given["encoder_hidden_states"]
    if x.ndim == 3:
        x = x.mT.unflatten(2, (4, 4))
    positive, negative = (Encoded(states=text, ids=torch.zeros(2, 5)) for text in (states, states.flip(-1)))
    base: Any = SimpleNamespace(unet=AsUNet(model, given))
    with LoraBank({"transformer": model}, adapters, fuse=method.fuse) as bank:
        run = Run(
            base=base, positive=positive, negative=negative, size=(64, 64), guidance=3.0, generators=[], scheduler=None,
            latents=x, noise=x, first=lambda noise: noise, fresh=lambda: None, bank=bank, room=4,
        )  # fmt: skip
        method.prepare(run)
        step = Step(index=0, count=1, timestep=torch.tensor(0.5))
        method.before_step(run, step)
        uncond, cond = method.predict(run, step, x)
    assert uncond is not None
    return torch.stack([uncond, cond])


def changed(model: nn.Module, changes: Mapping[str, Tensor]) -> nn.Module:
    """A copy whose weights hold ``W + dW``."""
    other = copy.deepcopy(model)
    for name, change in changes.items():
        other.get_submodule(name.removeprefix("transformer.")).weight.data += change
    return other


@pytest.fixture
def pair(transformer: tuple[nn.Module, dict[str, Any]]) -> list[Adapter]:
    """LoRAs on all linear layers."""
    weights = {f"transformer.{path}": m.weight for path, m in transformer[0].named_modules() if isinstance(m, nn.Linear)}
    generator = torch.Generator().manual_seed(1)
    return [
        Adapter(name, Lora({key: random_delta(weight, generator) for key, weight in weights.items()}), strength)
        for name, strength in (("one", 0.8), ("two", -0.5))
    ]


def best_of_rank_4(parts: list[tuple[float, Any]]) -> Tensor:
    left, values, right = torch.linalg.svd(sum(weight * dense(part) for weight, part in parts), full_matrices=False)
    return left[:, :4] * values[:4] @ right[:4]


@pytest.mark.parametrize(
    ("options", "oracle"),
    [
        ({}, lambda parts: sum(weight * dense(part) for weight, part in parts)),
        ({"how": "svd", "rank": 4}, best_of_rank_4),
        (
            {"how": "ties", "density": 0.4, "rank": 64},
            lambda parts: agreeing([weight * largest(dense(part), 0.4) for weight, part in parts]),
        ),
    ],
    ids=["sum", "svd", "ties"],
)
def test_merge_in_a_transformer_equals_truly_merged_weights(
    transformer: tuple[nn.Module, dict[str, Any]], pair: list[Adapter], options: dict[str, Any], oracle: Callable[..., Tensor]
) -> None:
    model, given = transformer
    changes = {name: oracle([(a.weight, a.lora.layers[name]) for a in pair]) for name in pair[0].lora.layers}
    expected = predicted(changed(model, changes), given, Method(), [])
    torch.testing.assert_close(predicted(model, given, Merge.of(**options), pair), expected, atol=1e-4, rtol=1e-4)
    assert (predicted(model, given, Method(), []) - expected).abs().max() > 0.1


@pytest.mark.parametrize("chunk", [None, 1])
def test_composite_in_a_transformer_is_the_mean_of_single_forwards(
    transformer: tuple[nn.Module, dict[str, Any]], pair: list[Adapter], chunk: int | None
) -> None:
    model, given = transformer
    single = [
        changed(model, {name: adapter.weight * dense(delta) for name, delta in adapter.lora.layers.items()}) for adapter in pair
    ]
    expected = torch.stack([predicted(each, given, Method(), []) for each in single]).mean(0)
    got = predicted(model, given, Composite.of(chunk=chunk), pair)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert (predicted(model, given, Merge(), pair) - expected).abs().max() > 0.05
