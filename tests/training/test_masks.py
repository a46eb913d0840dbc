"""Masks: which files belong to which picture, what is learnt of it, and that a bad one is refused before training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from studio.base import Base
from studio.errors import FileError, RequestError, StudioError
from training.batches import Captions, Source
from training.concept import train_concept
from training.config import ConceptConfig, make_config
from training.config_file import load_config
from training.dataset import digest, read_folder
from training.losses import weighted_huber, weighted_mse
from training.masks import check_masks, mask_pixels, with_masks
from training.plan import prepare

SIDE = 16


def draw(path: Path, colour: str = "red", size: tuple[int, int] = (SIDE, SIDE)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def half(path: Path, side: int = SIDE) -> None:
    """White on the left half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = np.zeros((side, side), np.uint8)
    levels[:, : side // 2] = 255
    Image.fromarray(levels).save(path)


def quiet(progress: object) -> None:
    """No bar."""


def cut_out(path: Path) -> None:
    """Opaque on the left half alone."""
    rgba = np.full((SIDE, SIDE, 4), 255, np.uint8)
    rgba[:, SIDE // 2 :, 3] = 0
    Image.fromarray(rgba).save(path)


def test_masks_belong_to_the_pictures_of_their_names(tmp_path: Path) -> None:
    for name in ("a.png", "b.jpg"):
        draw(tmp_path / "pictures" / name)
    half(tmp_path / "masks" / "b.png")
    plain = read_folder(tmp_path / "pictures")
    first, second = masked = with_masks(plain, tmp_path / "masks")
    assert (first.mask, second.mask) == (None, tmp_path / "masks" / "b.png")
    learnt = mask_pixels(second, (8, 8))
    assert learnt.shape == (1, 8, 8) and (learnt[..., :4] == 1).all() and (learnt[..., 4:] == 0).all()
    assert (mask_pixels(first, (8, 4)) == torch.ones(1, 4, 8)).all()
    # A data set with another mask is another one; one without masks is called what it always was.
    Image.new("L", (SIDE, SIDE), 255).save(tmp_path / "masks" / "b.png")
    assert len({digest(plain), digest(masked), digest(with_masks(plain, tmp_path / "masks"))}) == 3
    assert digest(plain) == digest([replace(picture, mask=None, mask_digest="") for picture in masked])


def test_what_is_transparent_is_not_learnt(tmp_path: Path) -> None:
    cut_out(tmp_path / "a.png")
    draw(tmp_path / "b.png")
    first, second = with_masks(read_folder(tmp_path), Path("alpha"))
    assert first.mask == first.path and second.mask is None
    assert mask_pixels(first, (SIDE, SIDE)).mean() == 0.5
    check_masks([first, second], [(SIDE, SIDE)] * 2)
    with pytest.raises(RequestError, match="no picture is transparent"):
        with_masks([second], Path("alpha"))


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (lambda masks: None, FileError, "does not exist"),
        (lambda masks: masks.mkdir(), RequestError, "no masks in"),
        (lambda masks: half(masks / "c.png"), FileError, "no picture of the same name"),
        (lambda masks: [half(masks / name) for name in ("a.png", "a.bmp")], FileError, "one of two of that name"),
        (lambda masks: draw(masks / "a.png", "black"), RequestError, "leaves nothing"),
        (lambda masks: draw(masks / "a.png", "white", (SIDE, SIDE // 2)), FileError, "same proportions"),
        (lambda masks: (masks.mkdir(), (masks / "a.png").write_text("no picture")), FileError, "cannot read"),
    ],
)
def test_bad_masks_are_refused(tmp_path: Path, make: Callable[[Path], Any], error: type[StudioError], sentence: str) -> None:
    draw(tmp_path / "pictures" / "a.png")
    make(tmp_path / "masks")
    with pytest.raises(error, match=sentence):
        check_masks(with_masks(read_folder(tmp_path / "pictures"), tmp_path / "masks"), [(SIDE, SIDE)])


def test_only_what_a_mask_shows_counts_and_a_small_part_as_much_as_a_large_one() -> None:
    generator = torch.Generator().manual_seed(0)
    said, wanted = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    one, widths = torch.ones(2), torch.tensor([0.1, 0.5])
    masks = torch.zeros(2, 1, 8, 8)
    masks[0, :, :, :4], masks[1, :, 2, 3] = 1, 0.5
    inside = [said[0, :, :, :4] - wanted[0, :, :, :4], said[1, :, 2, 3] - wanted[1, :, 2, 3]]
    assert weighted_mse(said, wanted, one, masks).item() == pytest.approx(
        float(torch.stack([part.square().mean() for part in inside]).mean())
    )
    elsewhere = said + (masks == 0) * 100
    for smooth in (False, True):
        alone = weighted_huber(said, wanted, one, widths, masks, smooth=smooth)
        assert weighted_huber(elsewhere, wanted, one, widths, masks, smooth=smooth).item() == pytest.approx(alone.item())
    full = torch.ones(2, 1, 8, 8)
    assert weighted_mse(said, wanted, one, full).item() == pytest.approx(weighted_mse(said, wanted, one).item())


@pytest.fixture
def masked(tmp_path: Path, base: Base, configure: Callable[..., ConceptConfig]) -> Callable[..., ConceptConfig]:
    """Configurations whose first picture is learnt on its left half."""
    folder = tmp_path / "masks"
    for picture in read_folder(configure().data)[:1]:
        levels = np.zeros((picture.height, picture.width), np.uint8)
        levels[:, : picture.width // 2] = 255
        folder.mkdir()
        Image.fromarray(levels).save(folder / f"{picture.path.stem}.png")
    return lambda **changes: configure(masks=folder, **changes)


def test_batches_bring_masks_that_turn_with_their_pictures(base: Base, masked: Callable[..., ConceptConfig]) -> None:
    plan = prepare(masked(), base)
    options = {"sizes": plan.sizes, "batch": 2 * len(plan.pictures), "seed": 0, "levels": plan.levels}
    source = Source(
        base, plan.pictures, plan.captions, Captions(base, True), flip=True, unmasked=0.25, **options  # type: ignore[arg-type]
    )  # fmt: skip
    batch = source.batch(0)
    assert batch.masks is not None and batch.masks.shape == (len(batch.t), 1, *batch.latents.shape[-2:])
    width = batch.masks.shape[-1]
    sides = {(float(mask[..., : width // 2].mean()), float(mask[..., width // 2 :].mean())) for mask in batch.masks}
    assert sides <= {(1.0, 0.25), (0.25, 1.0), (1.0, 1.0)} and len(sides) >= 2
    plain = [replace(picture, mask=None, mask_digest="") for picture in plan.pictures]
    assert Source(base, plain, plan.captions, Captions(base, True), **options).batch(0).masks is None  # type: ignore[arg-type]


def test_a_run_with_masks_learns_something_else_and_says_so(
    configure: Callable[..., ConceptConfig], masked: Callable[..., ConceptConfig], base: Base
) -> None:
    plain = train_concept(configure(), quiet, base=base).losses
    result = train_concept(masked(restart=True), quiet, base=base)
    assert result.losses != plain and all(loss == loss for loss in result.losses)
    assert any("have no mask" in note for note in prepare(masked(), base).notes)
    assert prepare(configure(), base).identity().keys() == prepare(masked(), base).identity().keys() - {"masks"}
    assert prepare(masked(), base).identity()["masks"] == "masks"
    even = train_concept(masked(restart=True, unmasked_weight=1.0), quiet, base=base).losses
    assert even == pytest.approx(plain, rel=1e-5)


def test_masks_in_a_file_lie_beside_it(tmp_path: Path, configure: Callable[..., ConceptConfig]) -> None:
    (tmp_path / "a.yaml").write_text("data: d\noutput: a.safetensors\ntrigger: zqx\nmasks: m\n")
    (tmp_path / "b.yaml").write_text("data: d\noutput: a.safetensors\ntrigger: zqx\nmasks: alpha\n")
    assert load_config(tmp_path / "a.yaml").masks == tmp_path / "m"
    assert load_config(tmp_path / "b.yaml").masks == Path("alpha")
    with pytest.raises(RequestError, match="set masks"):
        make_config(data="d", output="a.safetensors", trigger="zqx", unmasked_weight=0.5)
    with pytest.raises(StudioError, match="masks"):
        make_config(data="d", output="a.safetensors", trigger="zqx", conditioning_data_dir="m")
