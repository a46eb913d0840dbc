"""A comparison of methods on a tiny base: what is decided, made, resumed and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import pipelines.bench
import pipelines.image
from pipelines.bench import Comparison, compare
from pipelines.bench_numbers import threshold_of
from pipelines.bench_plan import all_tasks, boxes_for, draw_combinations, make_plan, parted, rows_of
from pipelines.bench_report import page, warnings, write_page
from pipelines.bench_request import BenchRequest
from pipelines.bench_store import Record, Store, parse, picture_name, timings
from studio.errors import FileError, LoraFileError, NumericsError, RequestError, StudioError, UnknownNameError
from studio.lora.model import Lora
from studio.lora.write import save_lora
from studio.requests import LoraRef

MakeLora = Callable[..., Lora]


@pytest.fixture
def folder(make_lora: MakeLora, tmp_path: Path) -> Path:
    """Three LoRAs with subjects, and a style."""
    root = tmp_path / "loras"
    root.mkdir()
    for seed, (name, trigger, noun) in enumerate((("one", "red", "cat"), ("two", "green", "dog"), ("three", "sks", "apple"))):
        told = {"trigger": trigger, "class_word": noun, "kind": "concept", "family": "embedded"}
        save_lora(root / f"{name}.safetensors", make_lora(seed, "attn2", **told))
    save_lora(root / "ink.safetensors", make_lora(9, "attn2", trigger="night", kind="style", family="embedded"))
    return root


@pytest.fixture
def asked(tiny_base: Path, folder: Path) -> Callable[..., BenchRequest]:
    def make(**fields: Any) -> BenchRequest:
        quick = {"base": str(tiny_base), "folder": folder, "methods": ("merge", "regional"), "combinations": 1, "seeds": 1,
                 "references": 2, "steps": 1, "size": "32x32", "guidance": 1, "suffix": ""}  # fmt: skip
        return BenchRequest.of(**{**quick, **fields})

    return make


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text("utf-8").splitlines()]


def shape(comparison: Comparison) -> list[tuple[Any, ...]]:
    return [(r.label, r.pictures, r.kept, r.least, r.mean, r.most) for rows in comparison.numbers.values() for r in rows]


def test_boxes_are_equal_columns() -> None:
    left, right = boxes_for(2, (512, 512))
    assert left == (0.03, 0.192, 0.47, 0.808)
    assert right[0] == 0.53 and right[1::2] == left[1::2]
    assert [box[3] - box[1] for box in boxes_for(2, (1024, 256))] == pytest.approx([0.94, 0.94]), "no taller than the picture"
    for count in (1, 2, 3):
        boxes = boxes_for(count, (768, 512))
        assert all(a[2] < b[0] for a, b in pairwise(boxes))
        assert len({round(box[2] - box[0], 3) for box in boxes}) == 1


def test_combinations_are_different_and_follow_from_the_seed() -> None:
    names = [f"l{index}" for index in range(9)]
    drawn = draw_combinations(names, 3, 20, 1)
    assert len({frozenset(one) for one in drawn}) == 20
    assert all(len(set(one)) == 3 for one in drawn)
    assert drawn == draw_combinations(names[::-1], 3, 20, 1) != draw_combinations(names, 3, 20, 2)
    assert {frozenset(one) for one in draw_combinations(names[:3], 2, 9, 0)} == {
        frozenset(pair) for pair in (("l0", "l1"), ("l0", "l2"), ("l1", "l2"))
    }


def test_methods_with_options_in_one_text() -> None:
    text = "merge,clora:unit=noise,step=.05,attend:words=cat,dog,unit=noise,switch"
    assert parted(text) == [
        ("merge", {}),
        ("clora", {"unit": "noise", "step": ".05"}),
        ("attend", {"words": "cat,dog", "unit": "noise"}),
        ("switch", {}),
    ]
    rows = rows_of(["merge,masked,masked:regions=no", "regional:feather=0.2"])
    assert [(row.label, row.regions) for row in rows] == [
        ("merge", False), ("masked", True), ("masked:regions=no", False), ("regional:feather=0.2", True)
    ]  # fmt: skip
    assert rows[2].options == {}


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("merge,swich", UnknownNameError, "did you mean 'switch'"),
        ("clora:stp=1", UnknownNameError, "unknown option of method 'clora' 'stp': did you mean 'step'"),
        ("switch:tau=soon", RequestError, "method 'switch': option tau"),
        ("merge,merge", RequestError, "names 'merge' twice"),
        ("step=1", RequestError, "begins with an option"),
        ("clora:noise", RequestError, "'noise' is not OPTION=VALUE"),
        ("regional:regions=no", RequestError, "method 'regional': regions=no does not fit"),
        ("merge:regions=no", RequestError, "method 'merge': regions=no does not fit"),
    ],
)
def test_methods_that_do_not_fit(text: str, error: type[StudioError], said: str) -> None:
    with pytest.raises(error, match=said.replace("(", r"\(")):
        rows_of([text])


def test_a_plan_says_the_place_first_and_keeps_seeds_apart(asked: Callable[..., BenchRequest]) -> None:
    plan = make_plan(asked(sizes=(2, 3), combinations=9, seeds=2, prefix="photo, ", suffix=", on grass"))
    assert plan.notes == (
        "LoRA 'ink' is left out: it was taught a style, which has no place (--style ink puts it everywhere)",
        "3 LoRAs make 3 combinations of 2, not 9: all are used",
        "3 LoRAs make 1 combinations of 3, not 9: all are used",
    )
    a, b, c = (one.phrase for one in plan.combinations[3][0].subjects)
    assert plan.prompt(plan.combinations[3][0].subjects) == (
        f"photo, on the left a {a}, in the middle a {b} and on the right a {c}, on grass"
    )
    assert next(plan.reference_tasks()).request.prompt == "photo, on the left a red cat, on grass"
    assert {a, b, c} == {"red cat", "green dog", "sks apple"}
    tasks = all_tasks(plan)
    seeds = {kind: {task.request.seed for task in tasks if task.row.kind == kind} for kind in ("reference", "single", "method")}
    assert not seeds["reference"] & (seeds["single"] | seeds["method"])
    pair = [task for task in tasks if task.combination == plan.combinations[2][0].name and task.index == 0]
    assert len({task.request.seed for task in pair}) == 1, "all methods and the floor"
    floor, merge, regional = pair
    assert floor.request.loras == ()
    assert floor.request.prompt == merge.request.prompt == regional.request.prompt
    assert [region.box for region in regional.request.regions] == [box for _, box in merge.spots]
    assert merge.request.regions == ()


def test_words_of_the_user_reach_methods_that_look_for_them(
    asked: Callable[..., BenchRequest], folder: Path, make_lora: MakeLora
) -> None:
    (folder / "one.safetensors").unlink()
    save_lora(folder / "one.safetensors", make_lora(1, "attn2"))
    with pytest.raises(RequestError, match=r"record no trigger: .* with --words one=.zqx cat"):
        make_plan(asked())
    assert "a cat \\(old\\)" in next(make_plan(asked(words={"one": "cat (old)"})).reference_tasks()).request.prompt
    plan = make_plan(asked(words={"one": "sks cat"}, combinations=9, methods=("clora", "attend", "regional")))
    pair = next(one for one in plan.combinations[2] if "one" in one.name)
    clora, attend, regional = (plan.method_task(row, pair, 0).request for row in plan.rows)
    assert clora.options == {"triggers": {"one": "sks"}, "nouns": {"one": "cat"}}
    assert attend.options == {"words": [one.phrase for one in pair.subjects]}
    assert {region.loras[0].name: region.prompt for region in regional.regions}["one"] == "a sks cat"
    other = next(one for one in plan.combinations[2] if "one" not in one.name)
    assert plan.method_task(plan.rows[0], other, 0).request.options == {}


def test_a_style_is_in_every_picture(asked: Callable[..., BenchRequest]) -> None:
    plan = make_plan(asked(styles=("ink",), methods=("merge", "switch")))
    pair = plan.combinations[2][0]
    assert "ink" not in pair.name
    for task in all_tasks(plan):
        names = [ref.name for ref in task.request.loras]
        assert task.request.prompt.endswith(", night")
        assert names[-1:] == ([] if task.row.kind == "floor" else ["ink"])
    assert plan.method_task(plan.rows[1], pair, 0).request.options == {"always": ["ink"]}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"folder": Path("nowhere")}, "--loras nowhere is no folder"),
        ({"sizes": (4,)}, "sizes.0: input should be less than or equal to 3"),
        ({"folder": None, "loras": ()}, "combinations of 2 need as many LoRAs with a subject, and there are 0"),
        ({"base": "nobody"}, "unknown base 'nobody'"),
        ({"prompt": "a picture of {1}"}, "must say where the subjects stand"),
        ({"prompt": "{1} and {2}", "sizes": (3,)}, "lacks {3}, but 3 LoRAs are combined"),
        ({"prompt": "{1}, {2}, {3}"}, "has {3}, but 2 LoRAs are combined"),
        ({"encoder": "nowhere"}, "--encoder 'nowhere' is neither 'base' nor a folder"),
        ({"words": {"five": "x"}}, "unknown LoRA of --words 'five'"),
        ({"size": "wide"}, "size: must be WIDTHxHEIGHT"),
        ({"scheduler": "eular"}, "'eular'"),
        ({"sizes": ()}, "sizes: must name at least one, 2 or 3"),
        ({"references": 1}, "references: input should be greater than or equal to 2"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_made(
    asked: Callable[..., BenchRequest], tmp_path: Path, fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(StudioError) as caught:
        compare(asked(**fields), tmp_path / "out")
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_files_that_do_not_fit(asked: Callable[..., BenchRequest], folder: Path, tmp_path: Path, make_lora: MakeLora) -> None:
    (tmp_path / "pictures" / "one").mkdir(parents=True)
    with pytest.raises(FileError, match=r"pictures.(one|two|three) holds no picture of LoRA '(one|two|three)'"):
        make_plan(asked(reference_images=tmp_path / "pictures"))
    (folder / "more").mkdir()
    save_lora(folder / "more" / "one.safetensors", make_lora(5, "attn2", trigger="x", family="embedded"))
    with pytest.raises(RequestError, match="two LoRAs are called 'one'"):
        make_plan(asked())


def test_a_lora_of_another_base_is_refused_before_the_first_picture(
    asked: Callable[..., BenchRequest], folder: Path, tmp_path: Path, make_lora: MakeLora
) -> None:
    lora = make_lora(3, "attn2", trigger="x", family="embedded")
    odd = Lora(layers={name.replace("mid_block", "mid_blck"): delta for name, delta in lora.layers.items()},
               metadata=lora.metadata)  # fmt: skip
    for name in ("one", "two", "three"):
        save_lora(folder / f"{name}.safetensors", odd)
    with pytest.raises(LoraFileError, match="does not fit the base: 24 of 28 layers matched"):
        compare(asked(), tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.png"))


def test_a_comparison_is_made_once(asked: Callable[..., BenchRequest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    said: list[str] = []
    first = compare(asked(), out, say=said.append)
    names = [name for name, _ in all_tasks(first.plan)[-1].spots]
    assert said == [f"note: {note}" for note in first.plan.notes]
    # references of three LoRAs (of which one combination uses two) x 2, floor, two singles, two methods
    assert first.made == len(lines(out)) == 2 * 2 + 1 + 2 + 2
    assert [row.label for row in first.numbers[2]] == ["floor", "single", "merge", "regional"]
    merge = next(line for line in lines(out) if line["row"] == "merge")
    assert set(merge["likeness"]) == set(merge["likeness"][names[0]]) == set(names)
    assert all(-1.001 <= value <= 1.001 for told in merge["likeness"].values() for value in told.values())
    assert merge["forwards"] == 1, "one step, not guided"
    with Image.open(out / merge["file"]) as picture:
        assert json.loads(picture.text["studio"])["request"]["seed"] == merge["request"]["seed"]  # type: ignore[attr-defined]
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*.png")}
    monkeypatch.setattr(pipelines.image, "generate", lambda *args, **fields: pytest.fail("made again"))
    again = compare(asked(), out)
    assert again.made == 0
    assert shape(again) == shape(first)
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*.png")} == before


def test_a_killed_run_loses_one_picture_and_ends_alike(
    asked: Callable[..., BenchRequest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compare(asked(), tmp_path / "whole")
    real, left = pipelines.image.generate, [9]

    def dying(*args: Any, **fields: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(*args, **fields)

    monkeypatch.setattr(pipelines.image, "generate", dying)
    with pytest.raises(KeyboardInterrupt):
        compare(asked(), tmp_path / "out")
    made = len(lines(tmp_path / "out"))
    assert made == 9 - 2, "two were rehearsals"
    with (tmp_path / "out" / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"key": "torn')
    left[0] = 99
    rest = compare(asked(), tmp_path / "out")
    assert rest.made == whole.made - made
    assert shape(rest) == shape(whole)


def test_other_steps_other_loras_and_lost_pictures_are_made_anew(
    asked: Callable[..., BenchRequest], tmp_path: Path, folder: Path, make_lora: MakeLora
) -> None:
    out = tmp_path / "out"
    first = compare(asked(methods=("merge",)), out)
    (out / first.records["merge", first.plan.combinations[2][0].name, 0].file).unlink()
    assert compare(asked(methods=("merge",)), out).made == 1
    assert compare(asked(methods=("merge", "switch")), out).made == 1
    changed = first.plan.combinations[2][0].subjects[0]
    save_lora(changed.file, make_lora(77, "attn2", trigger=changed.trigger, class_word=changed.noun, family="embedded"))
    # its references, its single and the picture of both; the floor and the other LoRA stay
    assert compare(asked(methods=("merge",)), out).made == 2 + 1 + 1
    assert compare(asked(methods=("merge",), steps=2), out).made == first.made


def test_a_method_that_cannot_is_refused_or_left_out(
    asked: Callable[..., BenchRequest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"size": "16x16", "sizes": (3,)}  # lora-composer needs regions of some cells
    with pytest.raises(RequestError, match=r"method 'lora-composer' cannot make .*: region .* too small"):
        compare(asked(methods=("lora-composer",), **small), tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.png"))
    monkeypatch.setattr("pipelines.bench_plan.METHODS", {"merge": None, "lora-composer": None})
    told = compare(asked(methods=(), **small), tmp_path / "out")
    assert [row.label for row in told.numbers[3]] == ["floor", "single", "merge"]
    assert told.notes[-1].startswith("method 'lora-composer' is left out: region")


def test_one_bad_picture_costs_only_itself(
    asked: Callable[..., BenchRequest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = pipelines.image.generate, []

    def sick(request: Any, **fields: Any) -> Any:
        seen.append(request)
        if request.method == "regional" and sum(one.method == "regional" for one in seen) > 1:
            raise NumericsError("NaN")
        return real(request, **fields)

    monkeypatch.setattr(pipelines.image, "generate", sick)
    told = compare(asked(), tmp_path / "out")
    assert [row.label for row in told.numbers[2]] == ["floor", "single", "merge"]
    assert told.failed == (f"regional, {told.plan.combinations[2][0].name}, picture 1: NaN",)
    assert "failed: regional" in warnings(told)[-1]
    monkeypatch.setattr(pipelines.image, "generate", real)
    assert compare(asked(), tmp_path / "out").made == 1


def test_own_reference_pictures(asked: Callable[..., BenchRequest], tmp_path: Path) -> None:
    for index, name in enumerate(("one", "two", "three")):
        (tmp_path / "own" / name).mkdir(parents=True)
        for shade in (0, 40):
            Image.new("RGB", (30, 20), (80 * index, 200 - shade, 90)).save(tmp_path / "own" / name / f"{shade}.webp")
    told = compare(asked(reference_images=tmp_path / "own"), tmp_path / "out")
    assert not any(line["row"] == "reference" for line in lines(tmp_path / "out"))
    owns = {
        row: [
            similar[name]
            for line in lines(tmp_path / "out")
            if line["row"] == row
            for name, similar in line["likeness"].items()
        ]
        for row in ("single", "floor")
    }
    assert len(owns["single"]) == len(owns["floor"]) == 2
    assert told.threshold == pytest.approx(threshold_of(owns["single"], owns["floor"]), abs=1e-6)
    # Other references: pictures stay, similarities do not.
    Image.new("RGB", (30, 20), "blue").save(tmp_path / "own" / told.plan.used[0].name / "more.png")
    again = compare(asked(reference_images=tmp_path / "own"), tmp_path / "out")
    assert again.made == 0
    assert {record.by for record in again.records.values()}.isdisjoint({record.by for record in told.records.values()})


def test_the_page_says_what_was_done(asked: Callable[..., BenchRequest], tmp_path: Path) -> None:
    told = compare(asked(), tmp_path / "out")
    text = write_page(told).read_text("utf-8")
    assert text == page(told)
    merge = next(row for row in told.numbers[2] if row.label == "merge")
    assert f"| merge | 1 | {merge.kept} |".replace("[", "\\[").replace("]", "\\]") in text
    assert told.plan.prompt(told.plan.combinations[2][0].subjects) in text
    assert "fewer than 5 combinations of 2" in text
    assert f"at least {told.threshold:.3f}" in text


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    with Store(tmp_path), pytest.raises(FileError, match="another 'studio bench' is at work"):
        Store(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot write to the folder"):
        Store(tmp_path / "file")


def test_records_of_any_words_are_read_again(tmp_path: Path) -> None:
    record = Record(key="a", row="merge", combination="x", index=0, file="a.png", seconds=1.0, forwards=2,
                    request={"prompt": "a \u2028 b \x85 \u732b"})  # fmt: skip
    (tmp_path / "a.png").write_bytes(b"")
    with Store(tmp_path) as store:
        store.add(record)
    (tmp_path / "results.jsonl").open("ab").write(b'{"key": "\xe7\x8c')
    with Store(tmp_path) as store:
        assert store.get("a") == record
        store.add(record)
    assert list(parse((tmp_path / "results.jsonl").read_bytes())) == ["a"]


def test_a_lora_named_twice_is_refused(asked: Callable[..., BenchRequest], folder: Path) -> None:
    with pytest.raises(RequestError, match="LoRA 'one' is named twice"):
        make_plan(asked(loras=tuple(map(LoraRef.parse, ("one:0.5", "one:1")))))


def test_lines_that_are_none_are_left_out(tmp_path: Path) -> None:
    assert parse(b'[]\n{"key": 1}\nx\n\xff\n') == {}
    assert timings(tmp_path) == {}
    assert picture_name("clora:unit=noise", "../a + b c", 0, "0123456789") == "pictures/clora-unit=noise/a+b-c-1-01234567.png"
