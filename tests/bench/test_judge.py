"""The judge on a restricted bank, so that these tests run in seconds; the full bank is measured by reliability.py."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from studio.art.atlas import ACCESSORIES, splits
from studio.art.backgrounds import PHRASES as BACKGROUNDS
from studio.art.scenes import Placement, Scene, mirrored, render
from studio.errors import FileError, RequestError
from tests.bench import gate, miniclip
from tests.bench.judge import Judge, Wanted, as_pixels, in_place, vae_roundtrip
from tests.bench.labels import __main__ as labels
from tests.bench.matching import STRONG, WEAK, Canvas, exact, find, mask_of, refine, strength, strict
from tests.bench.papers import estimate
from tests.bench.reliability import absent_samples, blurred, counterpart, presence_scores, recall, true_samples
from tests.bench.sheets import contact_sheet
from tests.bench.templates import SIZES, Key, build_bank, default_cache, equivalents, make_keys, window_side

NAMES = ("frog", "pig", "car", "apple", "rocket", "castle", "octopus", "cactus", "whale", "whale (2)", "key", "camera")
FROG = Placement("frog", "3d", 16, 33, 28)
CAR = Placement("car", "3d", 48, 30, 27)
PAIR = Scene((FROG, CAR), "blue")
ASKED = (Wanted("frog", "3d", place="left"), Wanted("car", "3d", place="right"))


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(names=NAMES, looks=("neon",))


def drawn(*items: Placement, background: str = "blue", look: str | None = None) -> Tensor:
    return torch.from_numpy(render(Scene(items, background, look)).image.copy()).float() / 255


def test_true_pair_is_present_with_exact_boxes(judge: Judge) -> None:
    rendered = render(PAIR)
    judgement = judge.verdicts(rendered.image, PAIR)
    assert judgement.kinds == ("present", "present") and not judgement.fails
    assert judgement.paper.name == "blue"
    for verdict, box, mask in zip(judgement.verdicts, rendered.boxes, rendered.masks, strict=True):
        assert verdict.finding and verdict.finding.score > 0.9
        assert np.allclose(verdict.finding.box, box, atol=2.5 / 64)
        own = mask_of(judge.bank, verdict.finding, 64, 64)
        assert float((own - torch.from_numpy(mask)).abs().sum()) < 0.15 * mask.sum()


def test_mirrored_scene_is_present_only_for_judges_that_allow_it(judge: Judge) -> None:
    scene = mirrored(Scene((replace(CAR, style="flat"),), "pink"))
    assert judge.verdicts(render(scene).image, scene).kinds == ("present",)
    strict = Judge(judge.bank, flips=False)
    mirrored_score = strict.verdicts(render(scene).image, scene).findings[0].score
    assert mirrored_score < judge.verdicts(render(scene).image, scene).findings[0].score - 0.05


def test_swapped_subjects_are_confused(judge: Judge) -> None:
    picture = drawn(replace(CAR, x=16), replace(FROG, x=48))
    assert judge.verdicts(picture, ASKED).kinds == ("confused", "confused")


def test_one_subject_twice_confuses_the_other(judge: Judge) -> None:
    picture = drawn(FROG, replace(FROG, x=48))
    assert judge.verdicts(picture, ASKED).kinds == ("present", "confused")


def test_missing_subject_vanished(judge: Judge) -> None:
    assert judge.verdicts(drawn(FROG), ASKED).kinds == ("present", "vanished")
    assert judge.verdicts(drawn(), ASKED).kinds == ("vanished", "vanished")


def test_stranger_in_the_slot_is_other(judge: Judge) -> None:
    picture = drawn(FROG, Placement("castle", "3d", 48, 32, 28))
    assert judge.verdicts(picture, ASKED).kinds == ("present", "other")


def test_right_concept_in_wrong_style_is_other(judge: Judge) -> None:
    judgement = judge.verdicts(drawn(FROG), [Wanted("frog", "flat")])
    assert judgement.kinds == ("other",)
    assert judge.again(judgement, [Wanted("frog")]).kinds == ("present",)


def test_style_of_the_other_subject_is_confused(judge: Judge) -> None:
    asked = (Wanted("frog", "3d", place="left"), Wanted("car", "flat", place="right"))
    assert judge.verdicts(drawn(FROG, CAR), asked).kinds == ("present", "confused")


def test_hybrid_is_confused(judge: Judge) -> None:
    frog, pig = drawn(replace(FROG, x=32)), drawn(Placement("pig", "3d", 32, 33, 28))
    asked = (Wanted("frog", "3d"), Wanted("pig", "3d"))
    low, high = 0.0, 1.0
    for _ in range(7):
        share = (low + high) / 2
        mixed = share * frog + (1 - share) * pig
        finding = judge.findings(mixed, asked, limit=1)[0][0]
        ahead = finding.likeness(Key("frog", "3d")) > finding.likeness(Key("pig", "3d"))
        low, high = (low, share) if ahead else (share, high)
    unsure = Judge(judge.bank, tau=finding.score + 0.01)
    judgement = unsure.verdicts(mixed, asked)
    assert judgement.kinds == ("confused", "confused")
    assert all("hybrid" in verdict.why for verdict in judgement.verdicts)


def test_look_is_judged(judge: Judge) -> None:
    picture = drawn(FROG, CAR, look="neon")
    neon = [replace(want, style=None, look="neon") for want in ASKED]
    judgement = judge.verdicts(picture, neon)
    assert judgement.kinds == ("present", "present") and judgement.paper.look == "neon"
    assert judge.verdicts(picture, ASKED).kinds == ("other", "other")
    with pytest.raises(RequestError, match="look hatch"):
        judge.verdicts(picture, [Wanted("frog", look="hatch")])


def test_twins_count_as_one() -> None:
    twins = equivalents(make_keys(("whale", "whale (2)", "frog", "locked", "unlocked"), ("cartoon",)))
    assert twins["whale", "cartoon"] == {("whale (2)", "cartoon")}
    assert twins["locked", "cartoon"] == {("unlocked", "cartoon")}
    assert ("frog", "cartoon") not in twins


def test_place_rules() -> None:
    judge = Judge(names=("frog",))
    finding = judge.findings(drawn(FROG))[0][0]
    assert in_place(finding, "left") and not in_place(finding, "right") and in_place(finding, None)
    assert in_place(finding, (0.0, 0.2, 0.5, 0.8)) and not in_place(finding, (0.3, 0.2, 0.8, 0.8))


def test_ghosts_do_not_count(judge: Judge) -> None:
    ghost = 0.2 * drawn(FROG) + 0.8 * drawn()
    assert judge.verdicts(ghost, [Wanted("frog", "3d")]).kinds == ("vanished",)


def test_soft_pictures_count_and_smears_and_blends_do_not(judge: Judge) -> None:
    pig = Placement("pig", "3d", 16, 33, 28)
    frog = drawn(FROG)
    pictures = {"soft": blurred(frog, 0.8), "smear": blurred(frog, 3.0), "blend": 0.5 * frog + 0.5 * drawn(pig)}
    found = {name: judge.findings(picture)[0][0] for name, picture in pictures.items()}
    assert found["soft"].score > 0.95 * found["soft"].rivals[0][1] > judge.tau
    for name in ("smear", "blend"):
        assert found[name].score < judge.tau < found[name].rivals[0][1], name


def test_being_a_pixel_off_costs_no_strength() -> None:
    bank = build_bank(make_keys(("frog",), ("3d",)), group=False)
    picture = drawn(FROG)
    canvas = Canvas(picture, estimate(picture).pixels)
    (best,) = refine(bank, canvas, [(0, 33.0, 16.0, 3, False)], reach=4)
    straight = strength(bank, canvas, best)
    assert straight == pytest.approx(1.0, abs=0.1)
    assert strength(bank, canvas, replace(best, left=best.left + 1)) == pytest.approx(straight, abs=0.05)
    assert strength(bank, canvas, replace(best, left=best.left + 4)) < 0.8 * straight
    assert strict(0.9, 1.0) == strict(0.9, STRONG) == 0.9 and strict(0.9, WEAK) == 0.0


def test_every_background_is_named() -> None:
    for name in BACKGROUNDS:
        assert estimate(drawn(FROG, CAR, background=name)).name == name
    for look in ("blueprint", "neon", "hatch", "halftone"):
        paper = estimate(drawn(FROG, CAR, look=look))
        assert (paper.name, paper.look) == (None, look)
    assert estimate(drawn(FROG, background="sunset", look="pastel")).look == "pastel"
    unknown = drawn(background="white").clone()
    unknown[..., 1] = torch.linspace(0, 1, 64)[:, None]
    assert estimate(unknown).name is None


def test_structured_background_hides_nothing(judge: Judge) -> None:
    for background in ("checker", "dots", "stripes", "grass", "sea"):
        scene = Scene((FROG, CAR), background)
        assert judge.verdicts(render(scene).image, scene).kinds == ("present", "present"), background


@pytest.mark.parametrize("accessory", [None, *ACCESSORIES])
def test_accessory_is_named(judge: Judge, accessory: str | None) -> None:
    picture = drawn(Placement("frog", "3d", 32, 38, 27, accessory=accessory), background="gray")
    finding = judge.findings(picture)[0][0]
    assert finding.key.concept == "frog"
    assert judge.accessory(picture, finding) == accessory


def test_two_stages_find_what_the_exhaustive_search_finds() -> None:
    bank = build_bank(make_keys(("frog", "car", "castle")), group=False)
    for item in (Placement("frog", "flat", 30, 33, 25), Placement("castle", "cartoon", 34, 31, 30)):
        picture = blurred(drawn(item, background="green"), 0.8)
        canvas = Canvas(picture, estimate(picture).pixels)
        best = (-1.0, 0)
        for size in range(len(SIZES)):
            half = window_side(SIZES[size]) // 2
            y, x = torch.meshgrid(torch.arange(29, 37), torch.arange(28, 37), indexing="ij")
            tops = (torch.stack([y, x], -1).reshape(1, -1, 2) - half).repeat(len(bank.keys), 1, 1)
            for flip in (False, True):
                scores = exact(bank, canvas, size, torch.arange(len(bank.keys)), torch.full((len(bank.keys),), flip), tops)
                best = max(best, (float(scores.max()), int(scores.amax(1).argmax())))
        found = find(bank, picture, estimate(picture))[0]
        assert bank.index[found.key] == best[1]
        assert found.score >= best[0] - 1e-4


def test_templates_through_the_vae_fit_decoded_pictures_better() -> None:
    def soften(pictures: Tensor) -> Tensor:
        return torch.stack([blurred(picture.permute(1, 2, 0), 1.0).permute(2, 0, 1) for picture in pictures])

    picture = blurred(drawn(FROG), 1.0)
    plain, through = Judge(names=("frog",)), Judge(names=("frog",), roundtrip=soften)
    assert through.findings(picture)[0][0].score > plain.findings(picture)[0][0].score + 0.02
    same = Judge(names=("frog",), roundtrip=lambda pictures: pictures)
    assert same.findings(picture)[0][0].score == pytest.approx(plain.findings(picture)[0][0].score, abs=0.01)


class Shifting(torch.nn.Module):
    """Stands in for a VAE: the latents are the picture, decoding adds a number."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift = torch.nn.Parameter(torch.tensor(shift))
        self.calls = 0

    def encode(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: x))

    def decode(self, z: Tensor) -> SimpleNamespace:
        self.calls += 1
        return SimpleNamespace(sample=z + self.shift)


def test_templates_of_one_vae_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keys = make_keys(("whale", "whale (2)"), ("cartoon",))
    first = build_bank(keys, vae_roundtrip(Shifting(0.2)))
    again = build_bank(keys, vae_roundtrip(same := Shifting(0.2)))
    assert same.calls == 0
    assert all(torch.equal(a, b) for a, b in zip(first.rgba, again.rgba, strict=True))
    assert again.equivalents == first.equivalents and len(first.equivalents) == 2
    other = build_bank(keys, vae_roundtrip(Shifting(0.0)))
    assert float(first.rgba[0].float().mean()) > float(other.rgba[0].float().mean()) + 1
    assert len(list(default_cache().glob("bank-*.npz"))) == 2
    assert default_cache().is_relative_to(tmp_path)


def test_any_picture_type_is_the_same_picture() -> None:
    array = render(PAIR).image
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 255
    for picture in (Image.fromarray(array), tensor):
        assert torch.allclose(as_pixels(picture), as_pixels(array))
    with pytest.raises(RequestError, match="square RGB"):
        as_pixels(array[:, :40])


def test_reliability_measures_both_sides(judge: Judge) -> None:
    names = ("frog", "pig", "car", "apple", "rocket")
    strict, loose, papers = recall(judge, true_samples("decoded + noise", 6, names, None, 1))
    assert strict.value >= 0.8 and loose.value >= strict.value and papers.value == 1
    for kind in ("blank", "noise", "other concepts"):
        assert max(presence_scores(judge, absent_samples(kind, 3, names, None, 1))) < 0.6, kind
    with pytest.raises(ValueError, match="unknown kind"):
        absent_samples("fog", 1, names, None, 1)


def test_gate_counts_what_the_generator_draws(tmp_path: Path) -> None:
    cases = gate.make_cases("a", 12, 3)
    assert [case.single for case in cases] == [True, False] * 6
    assert cases == gate.make_cases("a", 12, 3)
    names = {item.concept for case in cases for item in case.scene.items}
    assert names <= set(splits().named_a)
    truth = {case.prompt: case for case in cases}
    blank = [case.prompt for case in cases[:4]]

    def generator(prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        scenes = [truth[prompt].scene for prompt in prompts]
        shown = [replace(s, items=()) if p in blank else s for p, s in zip(prompts, scenes, strict=True)]
        return [Image.fromarray(render(scene).image) for scene in shown]

    rates = gate.measure(generator, Judge(names=names), cases, tmp_path, batch=5, say=lambda line: None)
    singles = rates["singles: all present, right style and place"]
    assert (singles.hits, singles.n) == (4, 6)
    assert rates["pairs: all present, right style and place"].hits == 4
    assert rates["pairs: right background"].hits == 6
    assert rates["pairs, per subject: vanished"].hits == 4
    report = json.loads((tmp_path / "gate.json").read_text())
    assert len(report["cases"]) == 12 and report["cases"][0]["kinds"] == ["vanished"]
    assert Image.open(tmp_path / "sheet.png").width > 500 and (tmp_path / "failures.png").is_file()


def test_gate_refuses_a_folder_without_pipeline(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"model_index\.json"):
        gate.stock_generator(tmp_path, 2, 1.0)


def test_blends_are_of_two_unlike_subjects_of_like_weight() -> None:
    other = counterpart(FROG, "blue", ("frog", "pig", "car", "apple", "rocket", "castle"), np.random.default_rng(0))
    assert other.concept != "frog" and replace(other, concept="frog") == FROG
    mine, layer = ((drawn(item) - drawn()).flatten() for item in (FROG, other))
    assert 0.5 <= float(layer.square().sum() / mine.square().sum()) <= 2
    assert float(torch.nn.functional.cosine_similarity(mine, layer, dim=0)) < 0.3


def test_labels_fit_their_pictures(judge: Judge) -> None:
    read = labels.read_labels()
    assert len(read) == 240 and sum(len(label.seen) for label in read) > 300
    assert sum(path.stat().st_size for path in labels.HERE.glob("*.webp")) <= 150_000
    whole = [frozenset(label.asked) for label in read]
    assert labels.agreement(read, [label.seen for label in read])[0].value == 1
    asked = labels.agreement(read, whole)
    assert 0.8 < asked[0].value < 1 and 0.8 < asked[1].value < 1
    assert labels.agreement(read, [frozenset() for _ in read])[1].value == 0
    label = replace(read[0], pixels=render(Scene((FROG, CAR), "blue")).image, asked=("frog",), seen=frozenset({"car"}))
    assert labels.judged(judge, label)[1] == {"frog", "car"}


def test_contact_sheet_frames_failures() -> None:
    pictures = [np.full((64, 64, 3), 128, np.uint8)] * 3
    labels = [["a"], ["a label far too long to fit under its picture"], []]
    sheet = np.asarray(contact_sheet(pictures, labels, columns=2, enlarge=2, bad=[False, True, False]))
    assert sheet.shape[1] == 2 * (128 + 6) + 6
    red = (sheet[..., 0] > 150) & (sheet[..., 1] < 60)
    assert red[:, 140:].any() and not red[:, :136].any()
    with pytest.raises(ValueError, match="as many labels"):
        contact_sheet(pictures, [["a"]])


def test_miniclip_learns_a_little_and_is_small(tmp_path: Path) -> None:
    model, _ = miniclip.train(0, batch=12, steps=8)
    torch.manual_seed(0)
    fresh = miniclip.MiniClip(miniclip.vocabulary())
    pictures, texts = miniclip.batch_of(0, 12, "test")
    with torch.no_grad():
        after, before = (miniclip.contrastive(m.image(pictures), m.text(texts), fresh.log_scale) for m in (model, fresh))
    assert after < before
    path = tmp_path / "clip.safetensors"
    miniclip.save(model, path)
    assert path.stat().st_size <= miniclip.MAX_BYTES
    pictures, texts = miniclip.batch_of(0, 4, "test")
    again = miniclip.load(path)
    assert torch.allclose(again.image(pictures), model.image(pictures), atol=5e-3)
    assert torch.allclose(again.text(texts), model.text(texts), atol=5e-3)
    assert not torch.equal(miniclip.batch_of(0, 4, "train")[0], pictures)
    assert all(word in model.vocabulary for text in texts for word in miniclip.words(text))
    (tmp_path / "bad").write_bytes(b"nothing")
    with pytest.raises(FileError, match="cannot read"):
        miniclip.load(tmp_path / "bad")
