"""Learnt words: textual inversion, P+ and ED-LoRA, from the first vectors to a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from compose.attention import Attention
from compose.bank import Adapter, LoraBank
from compose.layerwise import cross_layers, reading_layers
from compose.plan import AttentionPlan, Regional, Regions, RegionText
from compose.routes import Grid
from compose.text import Reading, encode
from pipelines import generate, previewer
from studio.base import _LOADED, Base
from studio.embeddings import carried_embeddings
from studio.errors import RequestError, WrongBaseError
from studio.lora.files import load_lora, read_header
from studio.lora.model import Lora
from tests.training.conftest import Configure
from training import train_concept
from training.adapters import attached
from training.progress import Progress
from training.text import Reader
from training.words import LearntWord, full_length, start

RECIPES: dict[str, dict[str, Any]] = {
    "textual inversion": {"train_text": "embedding", "train_unet": False, "tokens": 1, "layerwise": False},
    "P+": {"train_text": "embedding", "train_unet": False, "tokens": 1},
    "ED-LoRA": {"train_text": "embedding+lora"},
}


def quiet(progress: Progress) -> None:
    pass


def shapes(base: Base, recipe: str) -> tuple[int, ...]:
    layers = len(cross_layers(base.unet))
    return {"textual inversion": (1, 32), "P+": (layers, 1, 32), "ED-LoRA": (layers, 2, 32)}[recipe]


def test_vectors_start_as_spread_as_the_base_s_own_words() -> None:
    table = torch.randn(400, 64, generator=torch.Generator().manual_seed(0)) * 0.02
    rows = start(table, [3, 5], 3, torch.Generator().manual_seed(1))
    assert torch.equal(rows[2], table[[3, 5]].mean(0))
    assert float(rows[:2].std()) == pytest.approx(0.02, rel=0.2)
    assert not torch.equal(rows[0], rows[1])


def test_vectors_stop_at_their_full_length(base: Base, configure: Configure) -> None:
    word = LearntWord.of(base, configure(train_text="embedding", token_norm=1.5))
    rows, limit = word.vectors["text_encoder"], word.limits["text_encoder"]
    assert limit == pytest.approx(1.5 * float(base.text_encoder.get_input_embeddings().weight.norm(dim=-1).mean()))
    with word.held():
        rows.data += 1
    moved = rows.detach().clone()
    rows.data *= 1.01 * limit / rows.detach().norm(dim=-1).mean()
    assert full_length(rows, limit) and not full_length(rows, None)
    kept = rows.detach().clone()
    with word.held():
        rows.data += 1
    assert torch.equal(rows.detach(), kept)
    assert not torch.equal(rows.detach(), moved)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_learnt_saved_and_read(configure: Configure, base: Base, recipe: str) -> None:
    before = torch.cat([weight.detach().flatten() for weight in base.text_encoder.parameters()])
    config = configure(**RECIPES[recipe], steps=5)
    path = train_concept(config, quiet).path
    lora, header = load_lora(path), read_header(path)
    assert header.tokens == ("zqx",)
    assert lora.tokens["zqx"]["text_encoder"].shape == shapes(base, recipe)
    assert bool(lora.layers) == (recipe == "ED-LoRA")
    first = LearntWord.of(base, config).vectors["text_encoder"].detach()
    assert not torch.allclose(lora.tokens["zqx"]["text_encoder"], first)
    if recipe != "textual inversion":  # every layer has learnt its own
        assert not torch.equal(*lora.tokens["zqx"]["text_encoder"][:2])
    assert torch.equal(torch.cat([weight.detach().flatten() for weight in base.text_encoder.parameters()]), before)
    assert not any(module._forward_pre_hooks for module in base.unet.modules())


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_picture_is_made_with_the_word_and_as_the_trainer_made_it(
    configure: Configure, base: Base, tiny_base: Path, recipe: str
) -> None:
    """What the trainer's preview draws at the end is what its file draws, bit for bit; and the word itself matters."""
    config = configure(**RECIPES[recipe], preview_every=3, preview_prompts=("a {trigger} apple on grass",), preview_steps=2)
    known = len(_LOADED)
    result = train_concept(config, quiet, previewer(config))
    assert not any("preview" in note for note in result.notes)
    assert len(_LOADED) <= known + 1  # drawn on the base in training, not on a second one
    folder = config.output.with_suffix(".previews")
    assert sorted(file.name for file in folder.iterdir()) == ["000003-0.png", "000004-0.png"]
    request = {"base": str(tiny_base), "loras": [str(result.path)], "steps": 2, "seed": 0, "device": "cpu"}
    called = generate("a zqx apple on grass", **request)
    assert called.notes == []
    with Image.open(folder / "000004-0.png") as shown:
        assert np.array_equal(np.asarray(called.images[0]), np.asarray(shown))
    other = generate("a qqq apple on grass", **request)
    assert not np.array_equal(np.asarray(called.images[0]), np.asarray(other.images[0]))


def test_training_and_generation_read_a_caption_alike(configure: Configure, base: Base) -> None:
    config = configure(train_text="embedding")
    captions = ["a zqx apple on the left", "an apple", "", "a zqx apple on the left"]
    with attached(base, config) as adapters:
        assert adapters.word is not None
        read = Reader(base, [adapters.word.embedding]).read(captions)
        lora = Lora({}, tokens=adapters.word.learnt())
    said = encode(base, captions, reading=Reading(embeddings=tuple(carried_embeddings("x", lora))))
    torch.testing.assert_close(read.states, said.states, atol=1e-5, rtol=1e-5)
    assert torch.equal(read.ids, said.ids)
    plain = encode(base, ["an apple"]).states
    width = plain.shape[-1]
    torch.testing.assert_close(said.states[1:2, :, :width], plain, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(said.states[0, :, :width], plain[0], atol=1e-2)


def test_gradients_reach_every_layer_s_vectors(configure: Configure, base: Base) -> None:
    with attached(base, configure(train_text="embedding")) as adapters:
        assert adapters.word is not None
        states = Reader(base, [adapters.word.embedding]).read(["a zqx apple"]).states
        x = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0))
        base.unet(x, torch.tensor([5]), states).sample.square().mean().backward()
        gradient = adapters.word.vectors["text_encoder"].grad
    assert gradient is not None
    assert float(gradient.abs().amax((1, 2)).min()) > 0


def test_each_layer_reads_its_own_states(base: Base) -> None:
    """Side by side states act as an oracle that hands each cross-attention layer its own by hand."""
    layers = cross_layers(base.unet)
    generator = torch.Generator().manual_seed(0)
    x, own = torch.randn(2, 8, 16, 16, generator=generator), torch.randn(len(layers), 2, 16, 32, generator=generator)
    t = torch.tensor([7, 9])
    seen: list[str] = []
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, kwargs, name=name, states=states: (
                seen.append(name),
                (args, kwargs | {"encoder_hidden_states": states}),
            )[1],
            with_kwargs=True,
        )
        for (name, module), states in zip(layers.items(), own, strict=True)
    ]
    with torch.no_grad():
        wanted = base.unet(x, t, own[0]).sample
    for handle in handles:
        handle.remove()
    assert seen == list(layers)
    with torch.no_grad(), reading_layers(base.unet):
        said = base.unet(x, t, torch.cat(list(own), -1)).sample
        plain = base.unet(x, t, own[0]).sample
    torch.testing.assert_close(said, wanted, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert torch.equal(base.unet(x, t, own[0]).sample, plain)


def test_a_region_s_text_is_read_by_layer_too(base: Base) -> None:
    """A region over the whole picture whose text is layer-wise is that text as the prompt."""
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(1, 8, 16, 16, generator=generator), torch.tensor([7])
    wide = torch.randn(1, 16, 32 * len(cross_layers(base.unet)), generator=generator)
    prompt = torch.randn(1, 16, 32, generator=generator)
    with torch.no_grad(), reading_layers(base.unet):
        wanted = base.unet(x, t, wide).sample
    whole = Regional(regions=Regions(((0.0, 0.0, 1.0, 1.0),)), texts=(RegionText(wide),))
    with torch.no_grad(), Attention(base.unet) as attention:
        attention.plan = AttentionPlan(regional=whole)
        attention.at(Grid(rows=1, height=16, width=16))
        said = base.unet(x, t, prompt).sample
    torch.testing.assert_close(said, wanted, atol=1e-4, rtol=1e-4)


def test_stock_diffusers_reads_the_lora_beside_the_word(configure: Configure, tiny_base: Path, base: Base) -> None:
    from diffusers import StableDiffusionPipeline

    path = train_concept(configure(train_text="embedding+lora", learning_rate=1e-2, save_precision="fp32"), quiet).path
    assert [key for key in load_file(path) if "tokens" in key] == ["lora_tokens.0.text_encoder"]
    lora = load_lora(path)
    stock = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None, requires_safety_checker=False)
    stock.load_lora_weights(str(path.parent), weight_name=path.name)
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, 8, 16, 16, generator=generator), torch.randn(1, 16, 32, generator=generator)
    with torch.no_grad():
        theirs = stock.unet(x, torch.tensor([5]), text).sample
        with LoraBank.on(base, [Adapter(name="zqx", lora=lora)]):
            ours = base.unet(x, torch.tensor([5]), text).sample
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-4)


def test_words_of_several_loras_in_one_picture(configure: Configure, tiny_base: Path, tmp_path: Path) -> None:
    """Layer-wise and plain words together, in methods that batch, alternate and merge; one word cannot have two meanings."""
    files = [
        train_concept(configure(trigger=word, output=tmp_path / f"{word}.safetensors", steps=1, **changes), quiet).path
        for word, changes in (
            ("zqx", {"train_text": "embedding"}),
            ("kvk", {"train_text": "embedding", "layerwise": False, "tokens": 1}),
        )
    ]
    request = {"base": str(tiny_base), "loras": [str(path) for path in files], "steps": 2, "seed": 0, "device": "cpu"}
    for method in ("merge", "composite", "switch"):
        both = generate("a zqx apple and a kvk dog", method=method, **request)
        one = generate("a zqx apple and a qqq dog", method=method, **request)
        assert both.notes == []
        assert not np.array_equal(np.asarray(both.images[0]), np.asarray(one.images[0]))
    twin = files[0].rename(tmp_path / "twin.safetensors")
    again = train_concept(configure(output=files[0], train_text="embedding", steps=1), quiet).path
    with pytest.raises(RequestError, match="both teach the word 'zqx'"):
        generate("a zqx apple", **{**request, "loras": [str(twin), str(again)]})
    assert generate("a zqx apple", **{**request, "loras": [(str(twin), 0), (str(again), 1)]}).images


def test_a_base_with_other_layers_is_refused(base: Base) -> None:
    lora = Lora({}, {"studio.family": "embedded"}, tokens={"zqx": {"text_encoder": torch.zeros(16, 2, 32)}})
    with (
        pytest.raises(WrongBaseError, match=r"learnt for 16 cross-attention layers, but the base has \d+"),
        LoraBank.on(base, [Adapter(name="x", lora=lora)]),
    ):
        pass


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokens": 20}, "tokens 20 is more than the 14"),
        ({"insert_trigger": False, "caption": "an apple"}, "no caption holds the trigger"),
    ],
)
def test_words_that_could_not_be_learnt(configure: Configure, pictures: Path, changes: dict[str, Any], said: str) -> None:
    for path in pictures.glob("*.txt"):
        path.unlink()
    with pytest.raises(RequestError, match=said):
        train_concept(configure(train_text="embedding", **changes), quiet)


def test_rates_of_words(configure: Configure, base: Base) -> None:
    spread = float(base.text_encoder.get_input_embeddings().weight.std())
    for changes, rate in (({}, spread / 13), ({"token_learning_rate": 0.5}, 0.5), ({"optimizer": "prodigy"}, 1e-3)):
        config = configure(train_text="embedding", **changes)
        with attached(base, config) as adapters:
            assert adapters.word is not None
            (rows,) = adapters.word.vectors.values()
            (found,) = [group["lr"] for group in adapters.groups(config) if any(p is rows for p in group["params"])]
        assert found == pytest.approx(rate)
