"""The contact sheet: everything is on it, nothing overlaps."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ui.sheet import GAP, PAPER, TILE, TONES, Label, SheetRow, Tile, contact_sheet, enlarged


def test_small_pictures_are_enlarged_crisply_and_keep_their_shape() -> None:
    picture = Image.new("RGB", (64, 32), (200, 10, 10))
    picture.putpixel((0, 0), (0, 0, 250))
    big = np.asarray(enlarged(picture, 128))
    assert big.shape == (128, 128, 3)
    assert (big[0] == PAPER).all()
    assert (big[32:34, :2] == (0, 0, 250)).all()
    assert (big[34, 2] == (200, 10, 10)).all()
    assert enlarged(Image.new("RGB", (300, 200)), 128).size == (128, 128)


def test_every_tile_and_label_is_on_the_sheet() -> None:
    colours = [(250, 0, 0), (0, 200, 0), (0, 0, 250)]
    red, green, blue = (Image.new("RGB", (8, 8), colour) for colour in colours)
    rows = [
        SheetRow("first", "a prompt", (Tile(red, (Label("seed 1"), Label("cat: vanished", "bad"))), Tile(green))),
        SheetRow("second", "a long prompt " * 40, (Tile(blue, (Label("cat: present", "good"),)),)),
    ]
    sheet = np.asarray(contact_sheet("title", rows))
    for colour in colours:
        assert (sheet == colour).all(-1).sum() == TILE * TILE
    assert (sheet == TONES["bad"]).all(-1).any()
    assert (sheet == TONES["good"]).all(-1).any()
    assert (sheet[:, -GAP:] == PAPER).all()
    assert (sheet[-GAP:] == PAPER).all()
