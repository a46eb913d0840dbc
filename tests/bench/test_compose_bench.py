"""The frame that counts what composition methods lose: rows, costs, runs, tables; fakes stand for models and judge."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from compose import method_named
from studio.errors import FileError, RequestError, UnknownNameError
from studio.requests import GenerateRequest
from tests.bench import combinations as world
from tests.bench.combinations import LORAS, Case, all_cases, cases, single_cases
from tests.bench.compose import Bench, Scope, Wish, names_of
from tests.bench.compose_judge import Seen
from tests.bench.compose_means import Drawn, Means
from tests.bench.compose_report import MARK, report
from tests.bench.compose_rows import (
    ROWS,
    WEIGHT,
    Row,
    best_candidate,
    counted,
    differs,
    equivalents,
    fits,
    request_of,
    rows_named,
    short_steps,
)
from tests.bench.compose_store import Record, Store, read
from tests.bench.compose_table import ceiling, cell, gap_closed, paired, points, role_table, single_rates, worst
from tests.bench.page import replace_section
from tests.bench.statistics import Difference, Rate, rate

# --- rows and costs


def test_requests_of_rows() -> None:
    case = cases("report", "subjects")[0]
    told = request_of(replace(ROWS["merge"], options={"weight": 0.5}), case, "embedded", 7, 20)
    assert [ref.name for ref in told.loras] == list(case.loras)
    assert (told.method, dict(told.options), told.seed, told.steps) == ("merge", {"weight": 0.5}, 7, 20)
    floor = request_of(ROWS["floor"], case, "embedded", 7)
    assert floor.loras == ()
    assert floor.prompt == told.prompt
    known = request_of(ROWS["known"], case, "embedded", 7)
    assert not any(LORAS[name].trigger in known.prompt for name in case.loras)
    with pytest.raises(UnknownNameError, match="compsite"):
        rows_named(["compsite"])


def test_a_lone_row_lets_one_lora_act_on_the_whole_prompt() -> None:
    row = ROWS["lone-accessory"]
    with_it, without = (
        next(c for c in cases("report", "others") if bool(c.of("accessory")) is there) for there in (True, False)
    )
    told = request_of(row, with_it, "embedded", 7)
    assert [LORAS[ref.name].role for ref in told.loras] == ["accessory"]
    assert told.prompt == request_of(ROWS["merge"], with_it, "embedded", 7).prompt
    assert fits(row, with_it) and not fits(row, without)
    assert not fits(row, cases("report", "subjects")[0])
    verdicts = tuple(Seen(name, "present", "present", "present", "") for name in with_it.loras)
    lost = tuple(replace(each, words="vanished") for each in verdicts)
    rows = {
        name: [Record(name, name, with_it.id, "others", "report", len(seen), 1, 1.0, 2.0, seen)]
        for name, seen in (("merge", lost), ("lone-accessory", verdicts))
    }
    *_, kept, alone, _ = role_table({"merge": rows["merge"]}, rows)
    assert kept.count("| 0.0 [") == len({LORAS[name].role for name in with_it.loras})
    assert alone.startswith("| *each alone, same prompt* |") and alone.count("| 100.0 [") == 1


def test_boxes_reach_the_request() -> None:
    case = cases("report", "subjects")[0]
    told = world.LORAS[case.loras[0]].name
    regions = request_of(Row("with boxes", "merge", boxes=True), case, "embedded", 1).regions
    assert len(regions) == len(case.boxes)
    assert regions[0].loras[0].name == told
    assert regions[0].box == pytest.approx(case.boxes[0], abs=1e-5)


def test_forward_equivalents_take_off_prompt_and_decoding() -> None:
    def count(request: GenerateRequest) -> int:
        loras = len(request.loras)
        return 500 + 100 * (request.steps or 0) * max(loras, 1)

    request = GenerateRequest.of(prompt="x", loras=("a", "b", "c"), steps=20, method="composite")
    assert equivalents(count, request) == 60
    assert short_steps(20, mine=60, theirs=27) == 9
    assert short_steps(20, mine=60, theirs=80) == 20


def test_attention_on_the_cpu_is_counted() -> None:
    q = torch.randn(2, 4, 16, 8)
    with counted() as total:
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
        assert total() == 2 * 2 * 4 * 16 * 16 * 16


def test_gradients_to_the_input_of_a_module_are_counted() -> None:
    layer = torch.nn.Linear(8, 8)
    leaf = torch.randn(4, 8, requires_grad=True)
    with counted() as total:
        torch.autograd.grad(layer(leaf).sum(), leaf)
        assert total() == 2 * (2 * 4 * 8 * 8)


def test_the_best_candidate_passes_most_and_then_shows_most() -> None:
    row = Row("r", candidates=({"weight": 1}, {"weight": 2}, {"weight": 3}))
    assert best_candidate(row, [(0.2, 0.9), (0.4, 0.5), (0.4, 0.6)]) == {"weight": 3}
    assert best_candidate(row, [(0.4, 0.5), (0.4, 0.5), (0.1, 1.0)]) == {"weight": 1}


def test_every_row_and_candidate_is_a_request_its_method_takes() -> None:
    case = cases("report", "subjects")[0]
    for row in ROWS.values():
        for options in row.candidates or ({},):
            asked = request_of(row.at(options), case, "embedded", 1)
            method_named(asked.method, **asked.options)
    whole = {row.part_of for row in ROWS.values()} - {""}
    assert whole == {"cmlora", "cmlora-paper", "clora", "lora-composer"}
    assert {row.name for row in rows_named(["parts", "merge"])} > {"merge", "clora-unguided"}
    assert "clora-unguided" not in {row.name for row in rows_named([])}


def test_a_part_that_the_method_goes_without_anyway_is_no_row() -> None:
    whole = ROWS["clora"]
    unfound, found = (replace(whole, options=options) for options in ({"masks": "winner"}, {"masks": "winner", "find": 0.3}))
    anew = ROWS["clora-anew"].options
    assert anew == {"find": 0}
    assert not differs(replace(unfound, options={**unfound.options, **anew}), unfound)
    assert differs(replace(found, options={**found.options, **anew}), found)
    assert differs(replace(unfound, options={**unfound.options, WEIGHT: 1.5}), unfound)


# --- runs


class Fakes:
    """A product whose merge at 0.7 shows every LoRA and whose other pictures show none."""

    def __init__(self) -> None:
        self.drawn: list[GenerateRequest] = []

    def draw(self, request: GenerateRequest) -> Drawn:
        self.drawn.append(request)
        good = request.options.get("weight") == 0.7 or len(request.loras) == 1
        return Drawn(Image.new("RGB", (64, 64), (255, 255, 255) if good else (0, 0, 0)), 0.5, ("said",))

    def look(self, image: Image.Image, case: Case, things: Sequence[str]) -> list[Seen]:
        kind: Any = "present" if image.getpixel((0, 0)) == (255, 255, 255) else "vanished"
        return [Seen(name, kind, kind, kind, "fake") for name in case.loras]

    def means(self, loras: str = "1") -> Means:
        return Means(
            base="embedded",
            base_sha256="f" * 64,
            steps=20,
            loras=dict.fromkeys(LORAS, loras),
            draw=self.draw,
            truth=lambda scene: Drawn(Image.new("RGB", (64, 64), (255, 255, 255))),
            look=self.look,
            count=lambda request: 10 + 100 * (request.steps or 0) * (len(request.loras) if request.method != "merge" else 1),
        )


SMALL = Scope(rows=rows_named(["truth", "floor", "single", "merge", "composite-paper"]), limit=2, only=frozenset(LORAS))


def quiet(text: str) -> None:
    """Says nothing."""


def test_a_run_chooses_on_development_and_is_not_repeated(tmp_path: Path) -> None:
    fakes = Fakes()
    scope = replace(SMALL, kinds=("subjects",))
    found, choices = Bench(fakes.means(), scope, tmp_path, quiet).go()
    assert choices == {"subjects": "merge (weight 0.7)"}
    assert {name: len(records) for name, records in found["subjects"].items()} == {
        "truth": 2, "floor": 4, "merge": 4, "composite-paper": 4
    }  # fmt: skip
    assert all(record.passes() for record in found["subjects"]["merge"])
    assert {record.half for record in found["subjects"]["merge"]} == {"report"}
    made = len(fakes.drawn)
    assert made == 6 * 2 + 3 * 4
    again, _ = Bench(fakes.means(), scope, tmp_path, quiet).go()
    assert len(fakes.drawn) == made
    assert again == found
    collected, _ = Bench(fakes.means("2"), scope, tmp_path, quiet).go(make=False)
    assert list(collected["subjects"]) == ["truth", "floor"]


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    fakes = Fakes()
    scope = replace(SMALL, kinds=("subjects",), rows=rows_named(["composite-paper"]))
    whole, _ = Bench(fakes.means(), scope, tmp_path, quiet).go()
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    (tmp_path / "results.jsonl").write_text("\n".join(lines[:2]) + "\n" + lines[2][: len(lines[2]) // 2])
    before = len(fakes.drawn)
    again, _ = Bench(fakes.means(), scope, tmp_path, quiet).go()
    assert len(fakes.drawn) == before + 2
    assert again == whole
    assert len(read(tmp_path / "results.jsonl")) == 4


def test_a_row_with_the_time_of_another_takes_fewer_steps(tmp_path: Path) -> None:
    fakes = Fakes()
    bench = Bench(fakes.means(), SMALL, tmp_path, quiet)
    case = cases("report", "subjects")[0]
    costs = {"composite": 60.0, "cmlora": 27.0}
    bench.costs.of = lambda row, case, request: costs[row.method] * row.options.get("amplify", 1)  # type: ignore[method-assign]
    wish: Wish = bench.wish(ROWS["composite-short"], case, case.seed)
    assert wish.request.steps == 9
    bench.best[case.kind, "cmlora"] = {"amplify": 2}  # what was chosen for that row decides
    assert bench.wish(ROWS["composite-short"], case, case.seed).request.steps == 18
    assert bench.wish(ROWS["composite"], case, case.seed).request.steps == 20


def test_pictures_can_be_judged_again(tmp_path: Path) -> None:
    fakes = Fakes()
    scope = replace(SMALL, kinds=("subjects",), rows=rows_named(["composite-paper"]))
    bench = Bench(fakes.means(), scope, tmp_path, quiet)
    bench.go()

    def kinder(image: Image.Image, case: Case, things: Sequence[str]) -> list[Seen]:
        return [Seen(name, "present", "present", "present", "") for name in case.loras]

    Bench(replace(fakes.means(), look=kinder), scope, tmp_path, quiet).look_again()
    assert all(record.passes() for record in Store(tmp_path).records.values())


def test_only_combinations_of_the_loras_at_hand() -> None:
    scope = Scope(rows=(), only=frozenset({"cat-face", "dog-face", "hat"}))
    assert {name for case in scope.cases("report", "subjects") for name in case.loras} <= {"cat-face", "dog-face"}
    assert {case.loras for case in scope.cases("report", "single")} == {("cat-face",), ("dog-face",), ("hat",)}
    with pytest.raises(RequestError, match="no LoRA 'catface'"):
        names_of("catface", list(LORAS), "LoRA")


# --- numbers


def record(row: str, case: str, seed: int, *kinds: str, count: int = 0) -> Record:
    told = tuple(Seen(f"lora{i}", k, k, k, "") for i, k in enumerate(kinds))  # type: ignore[arg-type]
    return Record(f"{row}{case}{seed}", row, case, "subjects", "report", count or len(kinds), seed, 1.0, 2.0, told)


def test_rates_count_loras_and_failing_pictures() -> None:
    found = cell([record("m", "a", 1, "present", "present"), record("m", "b", 1, "present", "confused")])
    assert (found["present"].hits, found["present"].n) == (3, 4)
    assert (found["fails"].hits, found["fails"].n) == (1, 2)
    assert found["confused"].hits == 1


def test_differences_pair_by_combination_and_seed() -> None:
    mine = [record("m", case, seed, "present", "present") for case in "abcd" for seed in (1, 2)]
    theirs = [record("n", case, seed, "present", "vanished") for case in "abc" for seed in (1, 2)]
    found = paired(mine, theirs, lambda r: r.present())
    assert found is not None
    assert (found.mean, found.n) == (0.5, 6)
    assert paired(mine, theirs, lambda r: r.present(), [4, 5]) is None
    assert points(found) == "+50.0 [+50.0, +50.0]"
    assert points(Difference(0.5, 0.1, 0.9, n=60)) == "**+50.0 [+10.0, +90.0]**"
    assert points(Difference(0.5, -0.1, 0.9, n=60)) == "+50.0 [-10.0, +90.0]"


def test_the_ceiling_is_the_product_of_the_slots() -> None:
    case = next(c for c in all_cases() if c.kind == "subjects" and len(c.loras) == 2)
    singles: dict[tuple[str, str], Rate] = {
        (case.loras[0], "left"): rate([True, True, False, False]),
        (case.loras[1], "right"): rate([True, True, True, True, False]),
    }
    assert ceiling(case, singles) == pytest.approx((0.4, 0.65))
    assert math.isnan(ceiling(case, {})[0])


def test_the_gap_closed() -> None:
    low = [record("merge", f"c{i}", 1, "vanished") for i in range(40)]
    half = [record("m", f"c{i}", 1, "present" if i % 2 else "vanished") for i in range(40)]
    top = {f"c{i}": 0.8 for i in range(40)}
    assert gap_closed(half, low, top).startswith("62 %")
    assert gap_closed(half, low, dict.fromkeys(top, 1.0), lambda record: 2 * record.present()).startswith("100 %")
    assert gap_closed(half, half, dict.fromkeys(top, 0.3)) == "gap too small to tell"


def test_the_worst_failures_are_of_methods_and_of_different_combinations() -> None:
    rows = {
        "floor": [record("floor", "a", 1, "vanished", "vanished")],
        "m": [
            record("m", "a", 1, "present", "vanished"),
            record("m", "a", 2, "vanished", "confused"),
            record("m", "b", 1, "present", "present"),
            record("m", "c", 1, "present", "confused"),
        ],
    }
    assert [(r.case, r.seed) for r in worst(rows)] == [("a", 2), ("c", 1)]


def test_singles_are_counted_by_slot() -> None:
    every = {case.id: case for case in single_cases()}
    case = next(c for c in every.values() if c.loras == ("rose",) and c.places == ("left",))
    found = single_rates([record("single", case.id, 1, "present"), record("single", case.id, 2, "vanished")], every)
    assert found[("rose", "left")].value == 0.5


def test_a_section_replaces_itself_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    page.write_text("# Results\n\nbefore\n", "utf-8")
    replace_section(page, "one", "m")
    page.write_text(page.read_text("utf-8") + "\nafter\n", "utf-8")
    replace_section(page, "two", "m")
    text = page.read_text("utf-8")
    assert text.startswith("# Results\n\nbefore\n")
    assert text.endswith("after\n")
    assert "two" in text
    assert "one" not in text
    page.write_text(text.replace("<!-- end of m -->", ""), "utf-8")
    with pytest.raises(FileError, match="without the other"):
        replace_section(page, "three", "m")


def test_a_report_of_a_small_run(tmp_path: Path) -> None:
    fakes = Fakes()
    bench = Bench(fakes.means(), SMALL, tmp_path / "out", quiet)
    found, choices = bench.go()
    page = tmp_path / "docs" / "results.md"
    report(page, bench.store, found, choices, "f" * 64, 2)
    text = page.read_text("utf-8")
    for kind in ("subjects", "others", "single"):
        assert text.count(f"{MARK}: {kind} -->") == 2
    assert "| merge | 0.0 [" in text
    assert "| composite-paper | 100.0 [" in text
    assert "| *ceiling* | 0.0 | 100.0 |" in text
    assert "| -100.0 [-100.0, -100.0] |" in text
    report(page, bench.store, {kind: found[kind] for kind in ("others", "single")}, choices, "e" * 64, 2)
    again = page.read_text("utf-8")  # of one kind: the sections of the others stay
    assert again == text.replace("f" * 12, "e" * 12).replace("e" * 12, "f" * 12, 1)
    for name in ("compose-subjects.webp", "compose-others-worst.webp"):
        assert (page.parent / "pictures" / name).stat().st_size < 300_000
    assert json.loads((tmp_path / "out" / "costs.json").read_text())
    assert {record.notes for record in read(tmp_path / "out" / "results.jsonl") if record.row == "merge"} == {("said",)}
