"""The demo's story with drawing and training replaced: what is asked for, what is written, what is said."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from studio.art.scenes import Scene, place_of, render
from training.config import ConceptConfig
from ui import cli, console, demo

METADATA = {"cat-face": ("zqx", "animal"), "pizza": ("vbn", "food")}


class World:
    """What the demo asked of the rooms behind it."""

    def __init__(self) -> None:
        self.drawn: list[tuple[str, dict[str, Any]]] = []
        self.trained: list[ConceptConfig] = []
        self.judged: list[demo.Picture] = []

    def generate(self, prompt: str, **fields: Any) -> Any:
        self.drawn.append((prompt, fields))
        images = [Image.new("RGB", (64, 64)) for _ in range(fields["count"])]
        seeds = [fields["seed"] + index for index in range(fields["count"])]
        return SimpleNamespace(images=images, seeds=seeds, save=self._save)

    @staticmethod
    def _save(path: Path) -> list[Path]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        return [path]

    def train_concept(self, config: ConceptConfig) -> Any:
        self.trained.append(config)
        config.output.touch()
        return SimpleNamespace(path=config.output, seconds=1.0)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    pipelines, concept = ModuleType("pipelines"), ModuleType("training.concept")
    pipelines.generate, concept.train_concept = world.generate, world.train_concept  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pipelines", pipelines)
    monkeypatch.setitem(sys.modules, "training.concept", concept)
    monkeypatch.setattr(demo, "SHIPPED", {"cat face": "cat-face", "pizza": "pizza"})
    monkeypatch.setattr(demo, "_noun", lambda lora: " ".join(METADATA[lora]))
    monkeypatch.setattr(demo, "find_judge", lambda checkout=None: None)
    return world


def test_the_story(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert console.run(cli.app, ["demo", "--out", str(tmp_path)]) == 0
    pair = "a 3d render, on the left a zqx animal and on the right a vbn food, blue background"
    lora = str(tmp_path / f"{demo.LIVE}.safetensors")
    asked = [(prompt, fields["loras"], fields["count"], fields.get("regions", [])) for prompt, fields in world.drawn]
    boxes = ["cat-face@0.02,0.2,0.48,0.8", "pizza@0.52,0.2,0.98,0.8"]
    assert asked[:4] == [
        (pair, ("cat-face", "pizza"), 1, boxes),
        (pair, (), demo.SEEDS, []),
        (pair, ("cat-face", "pizza"), demo.SEEDS, []),
        (pair, ("cat-face", "pizza"), demo.SEEDS, boxes),
    ]
    assert [fields["loras"] for _, fields in world.drawn[4:]] == [(lora,), (lora, "cat-face")]
    assert [region.partition("@")[0] for region in asked[-1][3]] == [demo.LIVE, "cat-face"]
    assert [fields.get("method") for _, fields in world.drawn] == [demo.METHOD, None, None, demo.METHOD, None, demo.METHOD]
    assert all(demo.TRIGGER in prompt for prompt, _ in world.drawn[4:])
    assert (tmp_path / "first.png").exists()
    printed = capsys.readouterr()
    assert "first.png" in printed.out
    assert "contact-sheet.png" in printed.out
    commands = [line.split()[:3] for line in printed.out.splitlines() if line.startswith("  studio ")]
    assert commands == [["studio", "train", "concept"], ["studio", "lora", "check"], ["studio", "generate", '"a']]
    assert printed.out.splitlines()[-1].startswith("  studio ")
    assert "no verdicts" in printed.err


def test_the_live_subject_is_taught_from_captioned_pictures_of_it(world: World, tmp_path: Path) -> None:
    demo.run_demo(tmp_path, console.Voice(sys.stdout, False))
    (config,) = world.trained
    pictures = sorted(config.data.glob("*.png"))
    assert len(pictures) == demo.PICTURES
    assert len({np.asarray(Image.open(path)).tobytes() for path in pictures}) == demo.PICTURES
    for path in pictures:
        assert f"{config.trigger} {config.class_word}" in path.with_suffix(".txt").read_text()


def test_the_live_subject_is_one_the_base_never_saw() -> None:
    from studio.art.atlas import splits

    assert {demo.LIVE, *demo.SHIPPED} <= set(splits().heldout["concept"])


def test_verdicts_stand_under_the_pictures(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sheets: list[Any] = []

    def judge(image: Image.Image, scene: Scene) -> dict[str, str]:
        return {item.concept: "vanished" if item.x < 20 else "present" for item in scene.items}

    def contact_sheet(title: str, rows: list[Any]) -> Image.Image:
        sheets.append(rows)
        return Image.new("RGB", (4, 4))

    monkeypatch.setattr(demo, "find_judge", lambda checkout=None: judge)
    monkeypatch.setattr("ui.sheet.contact_sheet", contact_sheet)
    demo.run_demo(tmp_path, console.Voice(sys.stdout, False))
    (rows,) = sheets
    assert [len(row.tiles) for row in rows] == [demo.SEEDS + 1] * 5
    assert [label.text for label in rows[0].tiles[0].labels] == ["the true art"]
    labels = [(label.text, label.tone) for label in rows[0].tiles[1].labels]
    assert labels == [("seed 1", "plain"), ("cat face: vanished", "bad"), ("pizza: present", "good")]


def test_without_a_checkout_there_is_no_judge(tmp_path: Path) -> None:
    assert demo.find_judge(tmp_path) is None


def test_what_is_asked_stands_where_the_prompt_says() -> None:
    pair = demo.asked_scene(("pizza", "helicopter"))
    assert [(item.concept, place_of(item)) for item in pair.items] == [("pizza", "left"), ("helicopter", "right")]
    (alone,) = demo.asked_scene(("pizza",)).items
    assert place_of(alone) == "center"


def test_the_judge_of_this_checkout_understands_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.bench import judge as bench

    full = bench.Judge
    monkeypatch.setattr(bench, "Judge", lambda roundtrip: full(names=["cat face", "pizza", "frog"], roundtrip=None))
    monkeypatch.setattr(bench, "vae_roundtrip", lambda vae: None)
    monkeypatch.setattr("studio.base.load_base", lambda: SimpleNamespace(vae=None))
    verdicts = demo.find_judge()
    assert verdicts is not None
    scene = demo.asked_scene(("cat face", "pizza"))
    art = Image.fromarray(render(scene).image)
    assert verdicts(art, scene) == {"cat face": "present", "pizza": "present"}
    blank = Image.new("RGB", (64, 64), (120, 170, 230))
    assert verdicts(blank, scene) == {"cat face": "vanished", "pizza": "vanished"}
