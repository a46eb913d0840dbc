"""From records to numbers: rates with intervals, paired differences, the markdown section of a results page, sheets."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median

import numpy as np
from PIL import Image

from tests.bench.combinations import LORAS, ROLES, Case, Role, slot_of
from tests.bench.compose_layouts import touching
from tests.bench.compose_rows import PAIRS, REFERENCE, ROWS
from tests.bench.compose_store import Record, Store
from tests.bench.sheets import contact_sheet
from tests.bench.statistics import Difference, Rate, paired_bootstrap, rate

FEW = 16
"""Fewer pairs than this prove nothing, whatever their interval."""
KINDS = ("present", "confused", "vanished", "other")
TITLES = {
    "subjects": "Two or three subjects",
    "others": "One subject and one to four others (object, accessory, look, background)",
}

Rows = Mapping[str, Sequence[Record]]
"""Records of one kind of combination, by row."""


def single_rates(records: Sequence[Record], cases: Mapping[str, Case]) -> dict[tuple[str, str], Rate]:
    """How often each LoRA alone is present, by LoRA and slot."""
    found: dict[tuple[str, str], list[bool]] = {}
    for record in records:
        case = cases[record.case]
        found.setdefault(slot_of(case, case.loras[0]), []).append(record.passes())
    return {slot: rate(outcomes) for slot, outcomes in found.items()}


def ceiling(case: Case, singles: Mapping[tuple[str, str], Rate]) -> tuple[float, float]:
    """What perfect composition of these LoRAs would reach: (all present, mean share present); nan where a single is missing.

    All present: the product of the single rates in those slots.
    """
    values = [singles[slot].value if (slot := slot_of(case, name)) in singles else math.nan for name in case.loras]
    return math.prod(values), fmean(values)


def paired(
    a: Sequence[Record], b: Sequence[Record], value: Callable[[Record], float], counts: Sequence[int] = ()
) -> Difference | None:
    """Mean of ``value(a) - value(b)`` over pictures of the same combination and seed; combinations are resampled.

    ``counts``: numbers of LoRAs to look at; none: all. None where no pair exists.
    """
    theirs = {(record.case, record.seed): record for record in b}
    pairs = [
        (record, theirs[record.case, record.seed])
        for record in a
        if (record.case, record.seed) in theirs and (not counts or record.count in counts)
    ]
    if not pairs:
        return None
    mine, other = ([float(value(pair[side])) for pair in pairs] for side in (0, 1))
    return paired_bootstrap(mine, other, [pair[0].case for pair in pairs])


def points(difference: Difference | None) -> str:
    """In percentage points; bold where the interval excludes 0."""
    if difference is None:
        return ""
    text = f"{100 * difference.mean:+.1f} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"
    return f"**{text}**" if difference.sure and difference.n >= FEW else text


def short(value: Rate) -> str:
    """``82.0 [73.3, 88.3]``, in per cent."""
    return f"{100 * value.value:.1f} [{100 * value.low:.1f}, {100 * value.high:.1f}]" if value.n else ""


def present(record: Record) -> float:
    return record.present()


def passes(record: Record) -> float:
    return float(record.passes())


def cell(records: Sequence[Record], reading: str = "words") -> dict[str, Rate]:
    """Rates of each verdict over all LoRAs, and of pictures that fail."""
    kinds = [kind for record in records for kind in record.kinds(reading)]
    found = {kind: rate([one == kind for one in kinds]) for kind in KINDS}
    return found | {"fails": rate([not record.passes(reading) for record in records])}


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines)] + [""]


def main_table(rows: Rows, cases: Mapping[str, Case], singles: Mapping[tuple[str, str], Rate]) -> list[str]:
    """All rows: what became of the LoRAs, how often pictures fail, against the reference, and what it costs."""
    lines = []
    for name, records in rows.items():
        found = cell(records)
        against = paired(records, rows.get(REFERENCE, ()), present) if name != REFERENCE else None
        failing = paired(rows.get(REFERENCE, ()), records, passes) if name != REFERENCE else None
        seconds = [record.seconds for record in records if record.seconds > 0]
        forwards = [record.forwards for record in records if record.forwards > 0]
        lines.append(
            [
                name,
                short(found["fails"]),
                *(short(found[kind]) for kind in KINDS),
                points(against),
                points(failing),
                f"{median(seconds):.2f}" if seconds else "",
                f"{fmean(forwards):.1f}" if forwards else "",
            ]
        )
    met = {record.case for records in rows.values() for record in records}
    top = [ceiling(cases[name], singles) for name in met]
    if top and not any(math.isnan(share) for share, _ in top):
        both = [fmean(column) for column in zip(*top, strict=True)]
        lines.append(["*ceiling*", f"{100 * (1 - both[0]):.1f}", f"{100 * both[1]:.1f}", *[""] * 7])
    header = [
        "", "pictures that fail, %", *(f"{kind}, %" for kind in KINDS), f"present: minus {REFERENCE}, points",
        f"failing: minus {REFERENCE}, points", "s / picture", "forwards / picture",
    ]  # fmt: skip
    return table(header, lines)


Group = tuple[str, Callable[[Case], bool]]


def groups(kind: str, rows: Rows, cases: Mapping[str, Case]) -> list[Group]:
    """The parts in which rates are given again: by K, and what makes subjects hard."""
    counts = sorted({record.count for records in rows.values() for record in records})
    found: list[Group] = [(f"K = {count}", lambda case, count=count: len(case.loras) == count) for count in counts]  # type: ignore[misc]
    if kind == "subjects":
        found += [("one noun", lambda case: case.one_noun), ("different nouns", lambda case: not case.one_noun)]
        found += [("boxes touch or nest", lambda case: touching(case.boxes)), ("apart", lambda case: not touching(case.boxes))]
    else:
        roles: tuple[Role, ...] = ("accessory", "object", "look", "background")
        found += [(f"with {role}", lambda case, role=role: case.one(role) is not None) for role in roles]  # type: ignore[misc]
    return found


def group_table(kind: str, rows: Rows, cases: Mapping[str, Case], value: str) -> list[str]:
    """``value`` ("present" or "fails") in each group."""
    parts = groups(kind, rows, cases)
    lines = []
    for name, records in rows.items():
        rates = [cell([r for r in records if member(cases[r.case])])[value] for _, member in parts]
        lines.append([name, *(short(one) for one in rates)])
    return table([f"{value}, %", *(name for name, _ in parts)], lines)


def role_table(rows: Rows, every: Rows) -> list[str]:
    """Present by what the LoRA is; and, of ``every`` row, what each LoRA does alone on the prompt of the whole combination."""

    def told(records: Sequence[Record], role: Role) -> str:
        return short(rate([s.words == "present" for r in records for s in r.seen if LORAS[s.lora].role == role]))

    lines = [[name, *(told(records, role) for role in ROLES)] for name, records in rows.items()]
    lone = [told(every.get(f"lone-{role}", ()), role) for role in ROLES]
    if any(lone):
        lines.append(["*each alone, same prompt*", *lone])
    return table(["present, %", *ROLES], lines)


def place_table(rows: Rows) -> list[str]:
    """Present under each reading of "in its place"."""
    lines = [
        [name, *(short(cell(records, r)["present"]) for r in ("words", "box", "anywhere"))] for name, records in rows.items()
    ]
    return table(["present, %", "on the side the words say", "in its box (overlap >= .3)", "anywhere"], lines)


def pair_table(rows: Rows) -> list[str]:
    """The differences asked for, at few and at many LoRAs."""
    counts = sorted({record.count for records in rows.values() for record in records})
    parts = [([c for c in counts if c <= 3], "K = 2, 3"), ([c for c in counts if c >= 4], "K = 4, 5")]
    parts = [part for part in parts if part[0]]
    lines = []
    for a, b in PAIRS:
        if a in rows and b in rows:
            lines.append([f"{a} - {b}", *(points(paired(rows[a], rows[b], present, part[0])) for part in parts)])
    return table(["present, points", *(name for _, name in parts)], lines) if lines else []


def parts_table(rows: Rows) -> list[str]:
    """What each part of a method is worth: the method with that part changed, minus the method."""
    lines = []
    for name, records in rows.items():
        whole = ROWS[name].part_of
        if whole in rows:
            against, passing = paired(records, rows[whole], present), paired(records, rows[whole], passes)
            cost = [fmean(r.forwards for r in side) for side in (records, rows[whole])]
            told = ", ".join(f"{key} {value}" for key, value in ROWS[name].options.items())
            lines.append([f"{whole}, {told}", points(against), points(passing), f"{cost[0]:.1f} / {cost[1]:.1f}"])
    header = [
        "changed part",
        "present: minus the whole, points",
        "pictures that pass: minus the whole, points",
        "forwards: it / the whole",
    ]
    return table(header, lines) if lines else []


def gap_closed(
    method: Sequence[Record],
    reference: Sequence[Record],
    top: Mapping[str, float],
    value: Callable[[Record], float] = passes,
    resamples: int = 4000,
) -> str:
    """Share of the way from the reference to the ceiling in the mean of ``value``, with a bootstrap over combinations.

    ``top``: the ceiling of each combination.
    """
    names = sorted({r.case for r in method} & {r.case for r in reference})
    if not names or any(math.isnan(top[name]) for name in names):
        return ""
    mine, theirs = ([fmean(value(r) for r in side if r.case == name) for name in names] for side in (method, reference))
    most = [top[name] for name in names]
    drawn = np.random.default_rng(0).integers(0, len(names), (resamples, len(names)))
    a, b, c = (np.asarray(values)[drawn].mean(1) for values in (mine, theirs, most))
    room = c - b
    if fmean(most) <= fmean(theirs) or bool((room <= 0).mean() > 0.025):
        return "gap too small to tell"
    closed = (fmean(mine) - fmean(theirs)) / (fmean(most) - fmean(theirs))
    low, high = np.quantile((a - b)[room > 0] / room[room > 0], [0.025, 0.975])
    return f"{100 * closed:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"


def gap_table(rows: Rows, cases: Mapping[str, Case], singles: Mapping[tuple[str, str], Rate]) -> list[str]:
    """Every method's share of the gap between the reference and the ceiling, at K = 2, 3, and at K = 2 alone: in pictures that
    pass, and in LoRAs that are present."""
    tops = {r.case: ceiling(cases[r.case], singles) for records in rows.values() for r in records}
    lines: dict[str, list[str]] = {name: [] for name in rows if name not in ("truth", "known", "floor", REFERENCE)}
    header = []
    for what, value, top in (
        ("pictures that pass", passes, {case: every for case, (every, _) in tops.items()}),
        ("present", present, {case: share for case, (_, share) in tops.items()}),
    ):
        for counts in ((2, 3), (2,)):
            header.append(f"{what}, K = {', '.join(map(str, counts))}")
            few = {name: [r for r in records if r.count in counts] for name, records in rows.items()}
            for name, told in lines.items():
                told.append(gap_closed(few[name], few.get(REFERENCE, ()), top, value))
    if not any(text for told in lines.values() for text in told):
        return []
    return table([f"of the gap from {REFERENCE} to the ceiling", *header], [[name, *told] for name, told in lines.items()])


def single_table(singles: Mapping[tuple[str, str], Rate], base: Sequence[Record], truth: Sequence[Record]) -> list[str]:
    """Each LoRA alone, by slot; without it; and what the judge makes of the art's own pictures."""

    def told(records: Sequence[Record], name: str) -> str:
        return short(rate([r.passes() for r in records if r.case.startswith(f"{name}-")]))

    lines = []
    for name in dict.fromkeys(name for name, _ in singles):
        slots = [f"{slot} {short(value)}" for (one, slot), value in singles.items() if one == name]
        lines.append([name, LORAS[name].role, "; ".join(slots), told(base, name), told(truth, name)])
    return table(["LoRA", "is a", "alone: present, %", "base without it", "the true picture"], lines)


def sheet(store: Store, rows: Rows, cases: Sequence[Case], title: str, enlarge: int = 2) -> Image.Image | None:
    """One line of pictures a combination, one column a row, first seed, unselected."""
    pictures, labels, bad = [], [], []
    for case in cases:
        found = {name: next((r for r in records if r.case == case.id), None) for name, records in rows.items()}
        if not any(found.values()):
            continue
        for name, record in found.items():
            pictures.append(store.open(record.key) if record else Image.new("RGB", (64, 64), (255, 255, 255)))
            labels.append(
                [name, f"{case.id} {case.layout}", *(_verdict(s.lora, s.words) for s in (record.seen if record else ()))]
            )
            bad.append(record is not None and not record.passes())
    return contact_sheet(pictures, labels, len(rows), enlarge, title, bad) if pictures else None


def _verdict(lora: str, kind: str) -> str:
    return f"{lora}: {kind}"


def worst(rows: Rows, count: int = 8) -> list[Record]:
    """The worst failures of the methods: fewest LoRAs present, then most confused; one a combination."""
    failing = [r for name, rs in rows.items() if name not in ("truth", "known", "floor") for r in rs if not r.passes()]
    failing.sort(key=lambda r: (r.present(), -sum(kind == "confused" for kind in r.kinds()), r.case, r.seed))
    first: dict[str, Record] = {}
    for record in failing:
        first.setdefault(record.case, record)
    return list(first.values())[:count]


def worst_sheet(store: Store, records: Sequence[Record], title: str) -> Image.Image | None:
    if not records:
        return None
    labels = [[r.row, r.case, *(f"{s.lora}: {s.words}" for s in r.seen)] for r in records]
    return contact_sheet([store.open(r.key) for r in records], labels, 8, 2, title, [True] * len(records))


def save_webp(image: Image.Image | None, path: Path) -> Path | None:
    """A small file; None for nothing."""
    if image is None:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=70, method=6)
    return path
