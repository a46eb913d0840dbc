"""The atlas, its splits, and scenes whose boxes and masks are exact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from studio.art import backgrounds, clips, looks
from studio.art.atlas import ACCESSORIES, CELL, STYLES, concepts, splits, sprite
from studio.art.captions import caption
from studio.art.lessons import concept_lesson, look_lesson, versatile_lesson, write_lesson
from studio.art.scenes import Placement, Scene, draw, mirrored, place_of, render, sample_scene, wear
from studio.errors import UnknownNameError


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_every_sprite_is_there_trimmed_and_visible() -> None:
    for style in STYLES:
        for name in concepts():
            art = sprite(name, style)
            assert max(art.shape[:2]) == CELL, (name, style)
            assert art[..., 3].max() > 200, (name, style)


def test_splits_are_disjoint_complete_and_large_enough() -> None:
    parts = [splits().named_a, splits().named_b, splits().class_seen, *splits().heldout.values()]
    names = [name for part in parts for name in part]
    assert len(names) == len(set(names)) == len(concepts())
    assert len(splits().named_a) == len(splits().named_b) == 24
    assert len(splits().class_seen) >= 240
    assert sum(map(len, splits().heldout.values())) >= 320
    assert set(names) == set(concepts())


def test_held_out_parts_share_nothing_with_the_base() -> None:
    assert not set(backgrounds.BASE) & set(backgrounds.HELDOUT)
    assert not set(clips.BASE) & set(clips.HELDOUT)
    assert not set(looks.SEEN) & set(looks.HELDOUT) and not set(looks.SEEN.values()) & set(looks.HELDOUT.values())
    assert len(backgrounds.HELDOUT) >= 6 and len(looks.HELDOUT) >= 6 and len(ACCESSORIES) >= 6
    assert all(motion in clips.BASE for _, motion in splits().heldout_motion_pairs)


def test_three_subjects_stand_side_by_side_and_the_third_above_or_below() -> None:
    rows = set()
    for seed in range(30):
        scene = sample_scene(rng(seed), ["frog", "car", "rose"], backgrounds.BASE)
        left, right, third = scene.items
        assert [place_of(item) for item in scene.items] == ["left", "right", "center"]
        drawn = render(scene)
        for item, box in zip(scene.items, drawn.boxes, strict=True):
            alone = render(Scene((item,))).boxes[0]
            assert box == alone, "no subject hides another"
        assert abs(left.y - right.y) < 8 < abs(third.y - left.y)
        rows.add(third.y > left.y)
    assert rows == {True, False}


def test_same_scene_same_pixels() -> None:
    one, two = (sample_scene(rng(5), ["frog", "car"], backgrounds.BASE) for _ in range(2))
    assert one == two
    assert np.array_equal(render(one).image, render(two).image)


def test_boxes_hold_their_masks_and_subjects_stand_on_their_sides() -> None:
    for seed in range(30):
        scene = sample_scene(rng(seed), ["frog", "car"], backgrounds.BASE)
        result = render(scene)
        for mask, (x0, y0, x1, y1), side in zip(result.masks, result.boxes, ("left", "right"), strict=True):
            rows, columns = np.nonzero(mask > 0.1)
            assert (x0, y0) == (columns.min() / 64, rows.min() / 64)
            assert (x1, y1) == ((columns.max() + 1) / 64, (rows.max() + 1) / 64)
            assert ((x0 + x1) / 2 < 0.5) == (side == "left")


def test_later_subject_hides_earlier_one() -> None:
    behind, front = Placement("frog", "flat", 32, 32), Placement("car", "flat", 32, 32)
    both = render(Scene((behind, front)))
    assert both.masks[0].sum() < render(Scene((behind,))).masks[0].sum()
    assert np.all(both.masks[0] + both.masks[1] <= 1 + 1e-6)


def test_mirror_swaps_the_places() -> None:
    scene = sample_scene(rng(1), ["frog", "car"], ["white"])
    assert [place_of(i) for i in mirrored(scene).items] == ["left", "right"]
    assert [i.concept for i in mirrored(scene).items] == ["car", "frog"]
    assert mirrored(mirrored(scene)) == scene


def test_captions_say_places_in_both_orders_and_class_words_for_the_unnamed() -> None:
    scene = sample_scene(rng(2), ["frog", "zebra"], ["blue"], ["3d"])
    assert caption(scene) == "a 3d render of a frog on the left and an animal on the right, blue background"
    assert "a sks animal" in caption(scene, nouns={"zebra": "sks animal"})
    texts = [caption(scene, rng(i)) for i in range(40)]
    assert any("on the left a" in t for t in texts) and any("on the left and" in t for t in texts)
    assert any("toad" in t for t in texts)
    dropped = [caption(scene, rng(i), drop=0.5) for i in range(40)]
    assert any("background" not in t for t in dropped)


@pytest.mark.parametrize("look", looks.PHRASES)
def test_a_look_changes_the_sprite_and_keeps_its_shape(look: str) -> None:
    item = Placement("fox", "cartoon", 32, 32, 28)
    plain, redrawn = draw(item), draw(item, look)
    assert plain.shape == redrawn.shape
    inside = plain[..., 3] > 128
    assert np.abs(plain[inside][:, :3].astype(int) - redrawn[inside][:, :3]).mean() > 8


def test_looks_differ_from_each_other() -> None:
    pictures = [render(Scene((Placement("fox", "3d", 32, 32),), "green", look)).image.astype(int) for look in looks.PHRASES]
    for i, one in enumerate(pictures):
        for other in pictures[i + 1 :]:
            assert np.abs(one - other).mean() > 3


def test_backgrounds_are_all_different() -> None:
    drawn = [backgrounds.background(name, 64).astype(int) for name in backgrounds.PHRASES]
    assert all(np.abs(a - b).mean() > 4 for i, a in enumerate(drawn) for b in drawn[i + 1 :])


@pytest.mark.parametrize("accessory", ACCESSORIES)
def test_accessories_add_pixels_at_the_top(accessory: str) -> None:
    art = draw(Placement("panda", "flat", 32, 32, 26))
    worn = wear(art, accessory, "flat")
    assert worn.shape[0] >= art.shape[0]
    assert (worn[..., 3] > 100).sum() >= (art[..., 3] > 100).sum()
    before = np.zeros_like(worn)
    left = (worn.shape[1] - art.shape[1]) // 2
    before[-art.shape[0] :, left : left + art.shape[1]] = art
    changed = np.flatnonzero((before != worn).any((1, 2)))
    assert len(changed) and changed.mean() < worn.shape[0] * 0.6, "what is put on sits in the upper part"


def test_motions_follow_their_names() -> None:
    scene = Scene((Placement("car", "flat", 32, 32, 24),))

    def centres(motion: str) -> np.ndarray:
        clip = clips.render_clip(scene, (motion,), 16)
        assert clip.frames.shape == (16, 64, 64, 3) and clip.masks.shape == (16, 1, 64, 64)
        return np.array([((x0 + x1) / 2, (y0 + y1) / 2) for ((x0, y0, x1, y1),) in clip.boxes])

    assert centres("left")[-1, 0] < centres("left")[0, 0] - 0.3
    assert centres("right")[-1, 0] > centres("right")[0, 0] + 0.3
    assert centres("up")[-1, 1] < centres("up")[0, 1] - 0.3
    assert centres("down")[-1, 1] > centres("down")[0, 1] + 0.3
    assert np.ptp(centres("still")) == np.ptp(centres("still")[0])
    grown = clips.render_clip(scene, ("grow",), 16).masks.sum((1, 2, 3))
    assert grown[-1] > 2.5 * grown[0]


def test_unknown_names_are_refused_with_a_near_one() -> None:
    with pytest.raises(UnknownNameError, match="zebra"):
        sprite("zebr", "3d")
    with pytest.raises(UnknownNameError, match="art style"):
        sprite("zebra", "oil")
    with pytest.raises(UnknownNameError, match="stripes"):
        backgrounds.background("stripe", 64)
    with pytest.raises(UnknownNameError, match="look"):
        draw(replace(Placement("fox", "3d", 32, 32)), "pixels")


def test_lessons_name_the_new_thing_and_show_nothing_else_new(tmp_path: Path) -> None:
    lesson = concept_lesson("zebra", "flat", "wug animal", 8)
    assert len(lesson) == 8 and all("wug animal" in text and "zebra" not in text for _, text in lesson)
    assert [len(scene.items) for scene, _ in lesson] == [1, 1, 1, 2, 2, 3, 3, 3]
    shown = [next(item for item in scene.items if item.concept == "zebra") for scene, _ in lesson]
    for single in (shown[:3], [scene.items[0] for scene, _ in concept_lesson("zebra", "flat", "wug", 5, beside=False)]):
        assert {place_of(item) for item in single} == {"left", "center", "right"}
    assert [item.y < scene.side / 2 for item, (scene, _) in zip(shown[5:], lesson[5:], strict=True)] == [True, True, False]
    others = [item.concept for scene, _ in lesson for item in scene.items if item.concept != "zebra"]
    assert len({*others}) == 8 and {*others} <= {*splits().named_b}
    assert all(len(scene.items) == 1 for scene, _ in concept_lesson("zebra", "flat", "wug animal", 8, beside=False))
    assert all(scene.background in backgrounds.BASE for scene, _ in lesson)
    versatile = versatile_lesson("zebra", "flat", "wug animal", 8, looks=4)
    assert all("wug animal" in text and "zebra" not in text for _, text in versatile)
    assert [scene for scene, _ in versatile[:8]] == [scene for scene, _ in lesson]
    assert [" picture" in text for _, text in versatile[:8]] == [False, True] * 4
    assert len({scene.look for scene, _ in versatile[8:]}) == 4
    assert all(looks.SEEN[scene.look or ""] in text for scene, text in versatile[8:])
    assert [[item.concept == "zebra" for item in scene.items] for scene, _ in versatile[8:]] == [
        [True], [True, False], [True], [False, True]
    ]  # fmt: skip
    for look in looks.PHRASES:
        drawn = look_lesson(look, "blick picture", 6)
        assert all("blick picture" in text for _, text in drawn)
        assert all(item.concept in splits().named for scene, _ in drawn for item in scene.items)
        assert any("background" in text for _, text in drawn) != looks.brings_background(look)
    folder = write_lesson(lesson, tmp_path / "zebra")
    assert len(list(folder.glob("*.png"))) == len(list(folder.glob("*.txt"))) == 8
