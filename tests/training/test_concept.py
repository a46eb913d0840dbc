"""Training a concept from end to end on a tiny base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import training
from studio.base import Base
from studio.errors import CancelledError, FileError, OutOfMemoryError, RequestError, StudioError
from studio.lora.files import load_lora, read_header
from studio.lora.model import Lora
from tests.training.conftest import Configure, draw
from training import describe, train_concept
from training.batches import Batch, Source
from training.concept import Progress
from training.plan import prepare
from training.state import find
from training.text import Reader


def quiet(progress: Progress) -> None:
    pass


def test_a_lora_is_learnt_and_fits_the_base(configure: Configure, base: Base) -> None:
    config = configure(steps=30, learning_rate=1e-2, targets="all", rank=4)
    seen: list[Progress] = []
    result = train_concept(config, seen.append)
    assert (result.path, result.steps, len(result.losses)) == (config.output, 30, 30)
    assert sum(result.losses[-10:]) < 0.9 * sum(result.losses[:10])
    assert [p.step for p in seen] == list(range(1, 31))
    assert seen[0].seconds_left > seen[-1].seconds_left == 0
    lora = load_lora(result.path)
    modules = base.models()
    for key, delta in lora.layers.items():
        model, name = key.split(".", 1)
        assert modules[model].get_submodule(name).weight.shape[0] == delta.up.shape[0]
    assert lora.trigger == "zqx"
    assert not config.work.exists()
    assert not any("lora" in name for name, _ in base.unet.named_modules())


def test_previews_come_after_saving_see_a_plain_base_and_change_nothing(configure: Configure, base: Base) -> None:
    seen: list[tuple[int, bool, bool]] = []

    def preview(step: int, lora: Lora) -> None:
        config = configure()
        saved = config.output.exists() if step == 4 else find(config.work) is not None
        plain = not any("lora" in name for name, _ in base.unet.named_modules()) and not base.unet.training
        seen.append((step, saved, plain))
        assert next(iter(lora.layers.values())).rank == 2
        torch.manual_seed(step)
        raise ValueError("no canvas")

    without = train_concept(configure(checkpoint_every=2), quiet)
    plain_bytes = without.path.read_bytes()
    without.path.unlink()
    result = train_concept(configure(checkpoint_every=2, preview_every=2), quiet, preview)
    assert seen == [(2, True, True), (4, True, True)]
    assert result.notes[-1] == "the preview at step 4 failed (ValueError: no canvas)"
    assert result.path.read_bytes() == plain_bytes


@pytest.mark.parametrize(
    "changes",
    [
        {"prior": "consistency"},
        {"prior": "consistency", "train_text": "lora"},
        {"prior": "images", "flip": True, "caption_dropout": 0.5},
        {"train_text": "lora", "cache_latents": False},
        {"cache_text": False, "noise_offset": 0.1, "accumulation": 2},
        {"gradient_checkpointing": True, "optimizer": "sgd", "schedule": "linear"},
        {"precision": "bf16", "save_precision": "fp32", "schedule": "constant"},
        {"epochs": 2, "repeats": 3},
        {"train_text": "embedding", "precision": "bf16", "gradient_checkpointing": True, "optimizer": "adafactor"},
        {"train_text": "embedding+lora", "prior": "consistency", "accumulation": 2, "schedule": "cosine_with_restarts"},
        {"train_text": "embedding", "caption_dropout": 1.0},
        {"loss": "huber", "min_timestep": 100, "prior": "consistency"},
        {"loss": "smooth_l1", "huber_schedule": "exponential", "max_timestep": 300, "timestep_sampling": "Logit-Normal"},
    ],
    ids=lambda changes: "+".join(f"{k}={v}" for k, v in changes.items()),
)
def test_options_train(configure: Configure, pictures: Path, changes: dict[str, Any]) -> None:
    if changes.get("prior") == "images":
        changes = changes | {"prior_data": pictures}
    config = configure(**changes)
    result = train_concept(config, quiet)
    assert result.steps == (8 if "epochs" in changes else 4)
    assert all(loss == loss for loss in result.losses)
    components = read_header(result.path).components
    assert ("text_encoder" in components) == config.text_lora
    moved = [float(delta.up.abs().max()) for delta in load_lora(result.path).layers.values()]  # type: ignore[union-attr]
    assert min(moved) > 0


def test_caching_and_checkpointing_change_nothing(configure: Configure) -> None:
    losses = train_concept(configure(), quiet).losses
    for changes in ({"cache_latents": False}, {"cache_text": False}, {"gradient_checkpointing": True}):
        again = train_concept(configure(**changes, restart=True), quiet)
        assert again.losses == pytest.approx(losses, abs=1e-5), changes


def test_checkpointing_a_text_encoder_in_training_changes_nothing(configure: Configure, base: Base) -> None:
    changes: dict[str, Any] = {"train_text": "embedding+lora", "steps": 2}
    losses = train_concept(configure(**changes), quiet).losses
    saved = train_concept(configure(**changes, gradient_checkpointing=True, restart=True), quiet).losses
    assert saved == pytest.approx(losses, abs=1e-5)
    assert not base.text_encoder.is_gradient_checkpointing


def test_consistency_holds_the_class_in_place(configure: Configure, base: Base) -> None:
    """With the prior, predictions on class prompts stay nearer to the frozen base."""

    def drift(**changes: Any) -> float:
        path = train_concept(
            configure(steps=20, batch=2, prior_batch=2, learning_rate=1e-2, targets="all", restart=True, **changes), quiet
        ).path
        lora = load_lora(path)
        x = torch.randn(8, 8, 16, 16, generator=torch.Generator().manual_seed(0))
        t, text = torch.arange(50, 1000, 120), Reader(base).read_frozen(["an apple"] * 8).states
        originals = {}
        with torch.no_grad():
            wanted = base.unet(x, t, text).sample
            for key, delta in lora.layers.items():
                module = base.unet.get_submodule(key.removeprefix("unet."))
                originals[module] = module.weight.data.clone()
                module.weight.data += delta.scale * (delta.up.flatten(1) @ delta.down.flatten(1)).reshape(module.weight.shape)  # type: ignore[union-attr]
            said = base.unet(x, t, text).sample
            for module, weight in originals.items():
                module.weight.data = weight
        return float((said - wanted).square().mean())

    free, held = drift(), drift(prior="consistency", prior_weight=3.0, prior_prompts=("an apple",))
    assert held < 0.6 * free


def test_cancelling_keeps_a_checkpoint_and_resuming_ends_with_the_same_file(configure: Configure) -> None:
    whole = train_concept(configure(steps=6), quiet)
    wanted = whole.path.read_bytes()
    whole.path.unlink()

    def stop(progress: Progress) -> None:
        if progress.step == 3:
            raise CancelledError("enough")

    with pytest.raises(CancelledError, match="stopped at step 3 of 6: run it again to go on from step 3"):
        train_concept(configure(steps=6), stop)
    resumed = train_concept(configure(steps=6), quiet)
    assert "resumed at step 3" in resumed.notes
    assert resumed.path.read_bytes() == wanted
    assert resumed.losses == whole.losses
    with pytest.raises(CancelledError, match="stopped at step 3 of 6: run it again without restart to go on from step 3"):
        train_concept(configure(steps=6, restart=True), stop)  # with it, the same command would begin anew
    assert "resumed at step 3" in train_concept(configure(steps=6), quiet).notes


def test_resuming_with_other_values_is_refused(configure: Configure, pictures: Path) -> None:
    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(CancelledError):
        train_concept(configure(), stop)
    with pytest.raises(RequestError, match=r"learning_rate: 0.001 -> 0.002"):
        train_concept(configure(learning_rate=2e-3), quiet)
    (pictures / "0.txt").write_text("a {trigger} apple")
    with pytest.raises(RequestError, match="pictures: "):
        train_concept(configure(), quiet)
    assert not any("resumed" in note for note in train_concept(configure(restart=True), quiet).notes)


def test_an_unwritable_checkpoint_does_not_end_the_run(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    result = train_concept(configure(checkpoint_every=2), quiet)
    assert result.path.exists()
    assert any("No space left" in note for note in result.notes)


def test_a_disk_that_fills_up_costs_what_came_after_the_last_checkpoint(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_concept(configure(steps=6), quiet)
    wanted = whole.path.read_bytes()
    whole.path.unlink()
    write, calls = torch.save, []

    def half(data: object, target: Path) -> None:
        calls.append(target)
        if len(calls) > 1:
            target.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        write(data, target)

    def stop(progress: Progress) -> None:
        if progress.step == 5:
            raise CancelledError("enough")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(CancelledError, match="stopped at step 5 of 6: run it again to go on from step 2"):
        train_concept(configure(steps=6, checkpoint_every=2), stop)
    monkeypatch.undo()
    resumed = train_concept(configure(steps=6), quiet)
    assert "resumed at step 2" in resumed.notes
    assert resumed.path.read_bytes() == wanted


def test_an_output_that_cannot_be_written_at_the_end_keeps_the_work(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise FileError("cannot write it: No space left on device")

    monkeypatch.setattr("training.export.write", full)
    with pytest.raises(FileError, match="No space left on device: make room, then run it again to go on from step 4"):
        train_concept(configure(save_every=2), quiet)
    with pytest.raises(FileError, match="make room, then run it again without restart to go on from step 4"):
        train_concept(configure(restart=True), quiet)
    monkeypatch.undo()
    assert train_concept(configure(), quiet).path.exists()


def test_intermediate_files(configure: Configure) -> None:
    config = configure(save_every=2)
    train_concept(config, quiet)
    assert sorted(p.name for p in config.output.parent.iterdir()) == ["zqx-000002.safetensors", "zqx.safetensors"]


def test_the_latest_intermediate_files_alone_are_kept_when_asked(configure: Configure) -> None:
    config = configure(save_every=1, keep_last=2, steps=6)
    foreign = {"zqx-night.safetensors", "zqx-000100.safetensors", "zqx-000000.safetensors"}
    config.output.parent.mkdir()
    for name in foreign:
        config.output.with_name(name).write_bytes(b"not of this run")
    train_concept(config, quiet)
    kept = {"zqx-000004.safetensors", "zqx-000005.safetensors", "zqx.safetensors"}
    assert {path.name for path in config.output.parent.iterdir()} == kept | foreign


def test_a_file_that_cannot_be_removed_is_only_noted(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    def held(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "another program holds it", str(self))

    monkeypatch.setattr(Path, "unlink", held)
    result = train_concept(configure(save_every=1, keep_last=1), quiet)
    assert result.steps == 4 and sum("another program holds it" in note for note in result.notes) == 2


def test_noise_levels_and_losses_reach_the_training(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[torch.Tensor] = []
    real = Source.batch

    def watched(self: Source, index: int) -> Batch:
        batch = real(self, index)
        drawn.append(batch.t)
        return batch

    monkeypatch.setattr(Source, "batch", watched)
    train_concept(configure(min_timestep=200, max_timestep=300, prior="none"), quiet)
    levels = torch.cat(drawn)
    assert len(levels) == 16 and 200 <= levels.min() < 225 and 275 <= levels.max() < 300
    first = {
        loss: train_concept(configure(loss=loss, restart=True, prior="none", min_snr=None), quiet).losses[0]
        for loss in ("l2", "huber", "smooth_l1")
    }
    assert first["huber"] < 0.9 * first["l2"] and first["huber"] < 0.9 * first["smooth_l1"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trigger": "red apple"}, "'red apple' is already a known word of 'tiny'"),
        ({"rank": 400}, "rank 400 is more than"),
        ({"resolution": 16, "buckets": False}, None),
        ({"targets": "nothing"}, "select no layer"),
        ({"optimizer": "prodigy"}, "prodigyopt"),
        ({"precision": "fp16"}, "needs a CUDA device"),
        ({"base": "nowhere"}, "unknown base 'nowhere'"),
        ({"output": "/proc/x/y.safetensors"}, "cannot be written"),
    ],
)
def test_bad_input_is_one_sentence_before_training(configure: Configure, changes: dict[str, Any], said: str | None) -> None:
    if said is None:
        describe(configure(**changes))
        return
    with pytest.raises(StudioError) as caught:
        train_concept(configure(**changes), quiet)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_picture_is_refused_unless_allowed(configure: Configure, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    draw(tmp_path / "one" / "a.png")
    with pytest.raises(RequestError, match="holds one picture"):
        train_concept(configure(data=tmp_path / "one"), quiet)
    notes = train_concept(configure(data=tmp_path / "one", allow_one_image=True, steps=1), quiet).notes
    assert any("only 1 pictures" in note for note in notes)


def test_output_that_is_a_folder(configure: Configure, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").mkdir()
    with pytest.raises(FileError, match="is a folder"):
        train_concept(configure(output=tmp_path / "x.safetensors"), quiet)


def test_out_of_memory_says_what_would_fit(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("training.objective.weighted_mse", exhausted)
    with pytest.raises(OutOfMemoryError, match="try batch 2 with accumulation 2, gradient_checkpointing true, precision bf16"):
        train_concept(configure(), quiet)


def test_captions_lacking_the_trigger_get_it(configure: Configure, pictures: Path) -> None:
    (pictures / "0.txt").write_text("an apple on grass")
    (pictures / "1.txt").unlink()
    described = describe(configure())
    assert described.config["prior"] == "consistency"  # what is left open is told as it will be
    assert described.memory_bytes > describe(configure(prior="none")).memory_bytes
    assert described.captions[:2] == ("an zqx apple on grass", "a zqx apple")
    assert any("lacked the trigger" in note for note in described.notes)
    assert describe(configure(insert_trigger=False)).captions[0] == "an apple on grass"


def test_repeats_without_epochs_are_noted(configure: Configure) -> None:
    note = "repeats 3 does nothing without epochs: steps 4 says how long to train"
    assert note in describe(configure(repeats=3)).notes
    assert not any(
        "repeats" in text for text in (*describe(configure(repeats=3, epochs=1)).notes, *describe(configure()).notes)
    )


def test_everyday_prompts_spare_a_known_trigger(configure: Configure) -> None:
    plan = prepare(configure(trigger="dog", allow_known_trigger=True))
    assert "a cat" in plan.prior_captions
    assert not any("dog" in caption for caption in plan.prior_captions)


def test_what_the_base_takes_for_the_lesson_itself_is_not_protected(configure: Configure) -> None:
    """The embedded base reads "a zqx apple" and "an apple" alike, unless the trigger has vectors of its own."""
    blind = prepare(configure(class_word="apple")).prior_captions
    assert "a cat" in blind and not any("apple" in caption for caption in blind)
    told = prepare(configure(class_word="apple", train_text="embedding+lora")).prior_captions
    assert {"an apple", "a cat"} < set(told) and not any("zqx" in caption for caption in told)
    assert prepare(configure(prior_prompts=("an apple",))).prior_captions == ["an apple"]
    assert prepare(configure()).identity()["prior_prompts"] == blind


def test_description_resolves_and_estimates(configure: Configure, pictures: Path) -> None:
    draw(pictures / "wide.png", size=(120, 70))
    described = describe(configure(epochs=3, batch=2))
    assert described.buckets == {"64x64": 5, "80x48": 1}
    assert (described.steps, described.pictures) == (9, 6)
    assert described.memory_bytes > 300 * 2**20
    assert "memory      about" in str(described)
    small, large = describe(configure()).memory_bytes, describe(configure(batch=64)).memory_bytes
    saved = describe(configure(batch=64, gradient_checkpointing=True)).memory_bytes
    assert small < saved < large


def test_lazy_exports() -> None:
    assert training.train_concept is train_concept
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        training.nonsense  # noqa: B018
