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
from training.many import configs_of
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
    first, second = masked = with_masks(plain, tmp_path / "masks", tmp_path / "pictures")
    assert (first.mask, second.mask) == (None, tmp_path / "masks" / "b.png")
    learnt = mask_pixels(second, (8, 8))
    assert learnt.shape == (1, 8, 8) and (learnt[..., :4] == 1).all() and (learnt[..., 4:] == 0).all()
    assert (mask_pixels(first, (8, 4)) == torch.ones(1, 4, 8)).all()
    # A data set with another mask is another one; one without masks is called what it always was.
    Image.new("L", (SIDE, SIDE), 255).save(tmp_path / "masks" / "b.png")
    assert len({digest(plain), digest(masked), digest(with_masks(plain, tmp_path / "masks", tmp_path / "pictures"))}) == 3
    assert digest(plain) == digest([replace(picture, mask=None, mask_digest="") for picture in masked])


def test_what_is_transparent_is_not_learnt(tmp_path: Path) -> None:
    cut_out(tmp_path / "a.png")
    draw(tmp_path / "b.png")
    first, second = with_masks(read_folder(tmp_path), "alpha", tmp_path)
    assert first.mask == first.path and second.mask is None
    assert mask_pixels(first, (SIDE, SIDE)).mean() == 0.5
    check_masks([first, second], [(SIDE, SIDE)] * 2)
    with pytest.raises(RequestError, match="no picture is transparent"):
        with_masks([second], "alpha", tmp_path)


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (lambda masks: None, FileError, "does not exist"),
        (lambda masks: masks.mkdir(), RequestError, "no masks in"),
        (lambda masks: half(masks / "c.png"), FileError, "no picture of the same name"),
        (lambda masks: [half(masks / name) for name in ("a.png", "a.bmp")], FileError, "share one name"),
        (lambda masks: draw(masks / "a.png", "black"), RequestError, "dark all over"),
        (lambda masks: draw(masks / "a.png", "#010101"), RequestError, "at most 1 of 255"),
        (lambda masks: draw(masks.parent / "pictures" / "a.jpg") or half(masks / "a.png"), FileError, "share one name"),
        (lambda masks: draw(masks / "a.png", "white", (SIDE, SIDE // 2)), FileError, "same proportions"),
        (lambda masks: (masks.mkdir(), (masks / "a.png").write_text("no picture")), FileError, "cannot read"),
    ],
)
def test_bad_masks_are_refused(tmp_path: Path, make: Callable[[Path], Any], error: type[StudioError], sentence: str) -> None:
    draw(tmp_path / "pictures" / "a.png")
    make(tmp_path / "masks")
    with pytest.raises(error, match=sentence):
        check_masks(with_masks(read_folder(tmp_path / "pictures"), tmp_path / "masks", tmp_path / "pictures"), [(SIDE, SIDE)])


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
    options: dict[str, Any] = {"sizes": plan.sizes, "batch": 4 * len(plan.pictures), "seed": 0, "levels": plan.levels}
    captions = Captions(base, True)
    masked_one = Source(base, plan.pictures[:1], ["on the left"], captions, flip=True, unmasked=0.25, **options).batch(0)
    assert masked_one.masks is not None
    assert masked_one.masks.shape == (len(masked_one.t), 1, *masked_one.latents.shape[-2:])
    half_way = masked_one.masks.shape[-1] // 2
    said = captions.called(masked_one.captions)
    assert {*said} == {"on the left", "on the right"}  # both were drawn
    for mask, text in zip(masked_one.masks, said, strict=True):
        left, right = float(mask[..., :half_way].mean()), float(mask[..., half_way:].mean())
        assert (left, right) == ((1.0, 0.25) if text == "on the left" else (0.25, 1.0))
    every = Source(base, plan.pictures, plan.captions, captions, **options).batch(0).masks
    assert every is not None and {float(mask.mean()) for mask in every} == {0.5, 1.0}
    plain = [replace(picture, mask=None, mask_digest="") for picture in plan.pictures]
    assert Source(base, plain, plan.captions, captions, **options).batch(0).masks is None


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
    assert load_config(tmp_path / "b.yaml").masks == "alpha"
    with pytest.raises(RequestError, match="set masks"):
        make_config(data="d", output="a.safetensors", trigger="zqx", unmasked_weight=0.5)
    with pytest.raises(StudioError, match="masks"):
        make_config(data="d", output="a.safetensors", trigger="zqx", conditioning_data_dir="m")


def test_masks_lie_in_subfolders_where_their_pictures_do_and_their_own_holes_are_black(tmp_path: Path) -> None:
    for repeats in ("2_zqx cat", "5_zqx cat"):
        draw(tmp_path / "pictures" / repeats / "a.png")
    (tmp_path / "masks" / "5_zqx cat").mkdir(parents=True)
    cut_out(tmp_path / "masks" / "5_zqx cat" / "a.png")
    first, second = with_masks(read_folder(tmp_path / "pictures"), tmp_path / "masks", tmp_path / "pictures")
    assert first.mask is None and mask_pixels(second, (SIDE, SIDE)).mean() == 0.5
    with pytest.raises(FileError, match="the pictures themselves"):
        with_masks([first], tmp_path / "pictures", tmp_path / "pictures")


def test_masks_are_cropped_as_their_pictures_are(tmp_path: Path) -> None:
    draw(tmp_path / "pictures" / "a.png", size=(2 * SIDE, SIDE))
    levels = np.zeros((SIDE // 2, SIDE), np.uint8)  # of half the size
    levels[:, : SIDE // 4] = 255  # the part that a square crop leaves out
    levels[:, SIDE // 2 : SIDE // 4 * 3] = 255  # the right half of what it keeps
    (tmp_path / "masks").mkdir()
    Image.fromarray(levels).save(tmp_path / "masks" / "a.png")
    (picture,) = with_masks(read_folder(tmp_path / "pictures"), tmp_path / "masks", tmp_path / "pictures")
    check_masks([picture], [(SIDE, SIDE)])
    shown = mask_pixels(picture, (SIDE, SIDE))
    assert (shown[..., : SIDE // 2] == 0).all() and (shown[..., SIDE // 2 :] == 1).all()


def test_several_trainings_do_not_share_a_folder_of_masks(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(RequestError, match="'masks' cannot be one folder"):
        configs_of(tmp_path, masks=tmp_path)
    assert configs_of(tmp_path, masks="alpha")["a"].masks == "alpha"  # type: ignore[union-attr]
