"""LoRA layers come, train and go without a trace."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from studio.base import Base
from studio.errors import NumericsError, RequestError
from tests.training.conftest import Configure
from training.adapters import attached, chosen_layers, rate_factor, target_names


def forward(base: Base) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(1, 8, 16, 16, generator=generator), torch.randn(1, 16, 32, generator=generator)
    with torch.no_grad():
        return base.unet(x, torch.tensor([5]), text).sample


def traces(base: Base) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, model in base.models().items():
        found |= {f"{key}.{n}": (id(m), m.training) for n, m in model.named_modules()}
        found |= {f"{key}.{n}": (id(p), p.requires_grad, p.dtype) for n, p in model.named_parameters()}
        found[f"{key} attributes"] = sorted(vars(model))
    return found


def test_the_text_encoder_tells_its_layers_as_before(configure: Configure, base: Base) -> None:
    """Read for the first time while it is trained, it is not hooked again afterwards: SDXL reads the last layer but one."""
    own = replace(base, text_encoder=copy.deepcopy(base.text_encoder))
    for module in own.text_encoder.modules():
        module._forward_hooks.clear()
        vars(module).pop("_output_capturing_hooks_installed", None)
    with attached(own, configure(train_text="embedding+lora")):
        own.text_encoder(torch.tensor([[1, 2]]), output_hidden_states=True)
    layers = own.text_encoder(torch.tensor([[1, 2]]), output_hidden_states=True).hidden_states
    assert len(layers) == own.text_encoder.config.num_hidden_layers + 1


def test_named_targets(base: Base) -> None:
    attention = target_names(base.unet, "attn", {})
    assert attention
    assert all(name.rpartition(".attn")[2][2:] in ("to_q", "to_k", "to_v", "to_out.0") for name in attention)
    both, every = set(target_names(base.unet, "attn+ff", {})), set(target_names(base.unet, "all", {}))
    assert set(attention) < both < every
    assert any(name.endswith("ff.net.2") for name in both)
    assert any(isinstance(base.unet.get_submodule(name), nn.Conv2d) and "conv1" in name for name in every)
    assert all("attn2" in name for name in target_names(base.unet, ("attn2",), {}))
    image = set(target_names(base.unet, "image", {}))
    assert image < every
    assert {"attn1.to_q", "ff.net.2", "conv1"} <= {".".join(name.split(".")[-k:]) for name in image for k in (1, 2, 3)}
    assert not any("attn2" in name for name in image)


def test_patterns_select_rates_and_leave_out(base: Base) -> None:
    rates = {r"^mid_block": 0.0, "up_blocks": 0.5}
    assert [rate_factor(name, rates) for name in ("mid_block.x", "up_blocks.1", "down")] == [0.0, 0.5, 1.0]
    assert not any(name.startswith("mid_block") for name in target_names(base.unet, "attn", rates))
    with pytest.raises(RequestError, match="targets 'nonsense' select no layer"):
        target_names(base.unet, "nonsense", {})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"targets": ("attn2", "input_blocks")}, "targets holds 'input_blocks', which is in the name of no layer of this base"),
        (
            {"block_rates": {"up_blocks": 0.5, "ouput_blocks": 0}},
            "block_rates holds 'ouput_blocks', which is in the name of no",
        ),
        ({"targets": "attn", "block_rates": {"conv_in": 0.5}}, "of no layer that targets select: names are diffusers'"),
    ],
)
def test_a_pattern_that_matches_nothing_is_named(
    base: Base, configure: Configure, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(RequestError) as caught:
        chosen_layers(base, configure(**changes))
    assert said in str(caught.value)
    chosen_layers(base, configure(targets=("attn2", "conv_in"), block_rates={"attn2": 0, "mid_block": 2.0}))


def test_a_rank_no_layer_can_use_is_refused(base: Base, configure: Configure) -> None:
    with pytest.raises(RequestError, match=r"rank 500 is more than .* at most 48"):
        chosen_layers(base, configure(rank=500))


@pytest.mark.parametrize("text", ["none", "lora"])
def test_the_base_is_as_before(base: Base, configure: Configure, text: str) -> None:
    before, output = traces(base), forward(base)
    with attached(base, configure(targets="all", train_text=text)) as adapters:
        torch.testing.assert_close(forward(base), output)  # up is zero at first
        for key, weight in adapters.weights().items():
            weight.data.fill_(0.02 if key.endswith("up") else 0.1)
        changed = forward(base)
        assert not torch.equal(changed, output)
        with adapters.absent():
            assert torch.equal(forward(base), output)
        assert torch.equal(forward(base), changed)
        assert any(key.startswith("text_encoder.") for key in adapters.layers) == (text == "lora")
    assert traces(base) == before
    assert torch.equal(forward(base), output)


def test_the_base_is_as_before_after_an_error(base: Base, configure: Configure) -> None:
    before = traces(base)
    with pytest.raises(KeyboardInterrupt), attached(base, configure()):
        raise KeyboardInterrupt
    assert traces(base) == before


def test_exported_deltas_do_what_the_layers_did(base: Base, configure: Configure) -> None:
    """y = W x + alpha / r * up(down(x)), for linear layers and convolutions alike."""
    with attached(base, configure(targets="all", rank=3, alpha=1.5)) as adapters:
        for weight in adapters.weights().values():
            weight.data.normal_(generator=torch.Generator().manual_seed(3), std=0.1)
        wanted, deltas = forward(base), adapters.deltas()
    originals = {}
    for key, delta in deltas.items():
        module = base.unet.get_submodule(key.removeprefix("unet."))
        originals[module] = module.weight.detach().clone()
        change = (delta.up.flatten(1) @ delta.down.flatten(1)).reshape(module.weight.shape)
        module.weight.data += delta.scale * change
    try:
        torch.testing.assert_close(forward(base), wanted, atol=1e-4, rtol=1e-4)
    finally:
        for module, weight in originals.items():
            module.weight.data = weight


def test_start_depends_on_the_seed_alone(base: Base, configure: Configure) -> None:
    def start(seed: int) -> torch.Tensor:
        torch.randn(7)
        with attached(base, configure(seed=seed)) as adapters:
            return torch.cat([w.detach().flatten() for w in adapters.weights().values()])

    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))


def test_rates_by_block_and_text(base: Base, configure: Configure) -> None:
    config = configure(train_text="lora", learning_rate=1e-3, text_learning_rate=1e-5, block_rates={"up_blocks": 0.5})
    with attached(base, config) as adapters:
        groups = adapters.groups(config)
        assert sorted(group["lr"] for group in groups) == [1e-5, 5e-4, 1e-3]
        assert sum(len(group["params"]) for group in groups) == len(adapters.weights())


def test_broken_numbers_are_not_exported(base: Base, configure: Configure) -> None:
    with attached(base, configure()) as adapters:
        next(iter(adapters.weights().values())).data[0, 0] = float("nan")
        with pytest.raises(NumericsError, match="lower learning_rate"):
            adapters.deltas()
