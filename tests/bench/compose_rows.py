"""The rows of the table of composition methods: what each is, which request it makes of a combination, what it costs.

A row is a method with options, and whether it is told the boxes. Adding one is a line in :data:`ROWS`. A row with candidates
stands in the table at the one that is best on the development half, for each kind of combination.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from studio.errors import UnknownNameError
from studio.requests import GenerateRequest, LoraRef
from tests.bench.combinations import ROLES, Case, Role, prompt_of, stand_ins

Source = Literal["method", "base", "known", "truth"]
Options = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        method, options: of the requests. boxes: give the regions too.
        source: "method"; "base": without LoRAs; "known": without LoRAs, named concepts standing in for the subjects;
            "truth": the art's own picture through the VAE, which shows what the judge can see.
        kinds: of combinations it is made on.
        candidates: options to choose from on the development half; :data:`WEIGHT` and :data:`GROW` are of the request.
        like: the row whose computing time this one gets, by taking fewer steps.
        part_of: the row that this one is but for its options, which are laid over those chosen for it. Such a row shows what
            a part of a method is worth, and stands in a table of its own.
        lone: only the LoRA of this role acts, on the prompt of the whole combination: what a method could keep of it at best.
            Such rows make up one line of the table of roles.
    """

    name: str
    method: str = "merge"
    options: Options = field(default_factory=dict)
    boxes: bool = False
    source: Source = "method"
    kinds: tuple[str, ...] = ("subjects", "others")
    candidates: tuple[Options, ...] = ()
    like: str = ""
    part_of: str = ""
    lone: Role | None = None

    def at(self, options: Options) -> Row:
        """This row with one of its candidates, under a name of its own."""
        name = ", ".join(f"{key} {value}" for key, value in options.items()) or "as it is"
        return replace(self, name=f"{self.name} ({name})", options={**self.options, **options}, candidates=())


WEIGHT = "lora weight"
"""No option of a method, but what stands behind the colon of each LoRA of the request."""
GROW = "grow"
"""No option of a method, but how far regions reach beyond the drawings they are of, as a share of the picture. The boxes of the
testbed are tight; a base that cannot draw to a pixel needs some room."""
NEAR: Options = {GROW: 0.1}
PLACED: Options = {"prompt": "placed"}
"""What regions said before they said where the others are, and say on other bases than the embedded one."""
MERGE_WEIGHTS: tuple[Options, ...] = tuple({"weight": weight} for weight in (0.4, 0.55, 0.7, 0.85, 1.0, "1/K"))
WEIGHTS: tuple[Options, ...] = tuple({WEIGHT: weight} for weight in (1, 1.5, 2))
"""For a method in which each LoRA acts for a part of the steps."""
AMPLIFIED: tuple[Options, ...] = ({}, {"amplify": 1.5}, {"amplify": 2}, {"amplify": 3})
"""For methods that take a mean of what each LoRA alone predicts."""
FOUND: Options = {"masks": "winner", "threshold": 0.4}
"""CLoRA's masks where the maps of a small base overlap: each place to the subject that is loudest there."""
STAYING: Options = {"masks": "alike", "threshold": 0.5, "find": 0.3}
"""Masks found once, as ``masked`` finds its own."""
UNIT: Options = {"unit": "noise"}
FEW: tuple[Literal["subjects", "others"], ...] = ("subjects",)


def _part(name: str, of: Row, **options: Any) -> Row:
    return Row(name, of.method, options, of.boxes, kinds=of.kinds, part_of=of.name)


_CMLORA = Row(
    "cmlora",
    "cmlora",
    candidates=(
        *AMPLIFIED,
        {"amplify": 2, "dominance": 2},
        {"amplify": 2, "dominance": 1},
        {"amplify": 2, "dominance": 1, "max_age": 2},
    ),
)
_CMLORA_PAPER = Row("cmlora-paper", "cmlora")
_CLORA = Row(
    "clora",
    "clora",
    kinds=FEW,
    candidates=(
        {},
        FOUND,
        {**FOUND, **UNIT, "step": 0.03},
        {**STAYING, **UNIT, "step": 0.03},
        {**STAYING, "step": 0},
        {**STAYING, "step": 0, "find": 0.5},
        {**STAYING, "step": 0, "find": 0.8},
    ),
)
_COMPOSER = Row(
    "lora-composer",
    "lora-composer",
    boxes=True,
    kinds=FEW,
    candidates=({}, NEAR, {**NEAR, **PLACED}, {**NEAR, "prompt": "whole"}, {**NEAR, WEIGHT: 1.25}),
)

ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        Row("truth", source="truth", kinds=("subjects", "others", "single")),
        Row("known", source="known", kinds=("subjects",)),
        Row("floor", source="base", kinds=("subjects", "others", "single")),
        Row("single", kinds=("single",)),
        Row("merge", candidates=MERGE_WEIGHTS),
        Row("gradient", options={"how": "gradient"}),
        Row("zip", options={"how": "zip"}),
        Row("switch", "switch", candidates=WEIGHTS),
        Row("switch-paper", "switch"),
        Row("composite", "composite", candidates=AMPLIFIED),
        Row("composite-short", "composite", candidates=AMPLIFIED, like="cmlora"),
        Row("composite-paper", "composite"),
        Row("composite-paper-short", "composite", like="cmlora-paper"),
        _CMLORA_PAPER,
        _CMLORA,
        Row(
            "attend",
            "attend",
            kinds=FEW,
            candidates=(
                {},
                {"step": 5},
                {**UNIT, "step": 0.03},
                {**UNIT, "step": 0.1},
            ),
        ),
        Row("clora-paper", "clora", kinds=FEW),
        _CLORA,
        Row(
            "masked-found",
            "masked",
            kinds=FEW,
            candidates=({}, {"threshold": 0}, {"isolation": True}, {"isolation": True, "prompt": "arranged"}),
        ),
        Row(
            "masked",
            "masked",
            boxes=True,
            kinds=FEW,
            candidates=(
                {},
                NEAR,
                {**NEAR, **PLACED},
                {**NEAR, "prompt": "whole"},
                {**NEAR, "prompt": "whole", "isolation": True},
            ),
        ),
        Row(
            "regional",
            "regional",
            boxes=True,
            kinds=FEW,
            candidates=({}, NEAR, {**NEAR, **PLACED}, {**NEAR, "prompt": "whole"}),
        ),
        Row("lora-composer-paper", "lora-composer", {"step": 20, "injection": "cross_kv_out"}, boxes=True, kinds=FEW),
        _COMPOSER,
        *(Row(f"lone-{role}", kinds=("others",), lone=role) for role in ROLES),
        # With the paper's own dominance: at 1, which may be chosen above, the order only decides who is renewed.
        _part("cmlora-paper-reversed", _CMLORA_PAPER, order="reversed"),
        _part("cmlora-paper-random", _CMLORA_PAPER, order="random"),
        _part("cmlora-paper-rotation", _CMLORA_PAPER, order="rotation"),
        _part("cmlora-reversed", _CMLORA, order="reversed"),
        _part("cmlora-random", _CMLORA, order="random"),
        _part("cmlora-rotation", _CMLORA, order="rotation"),
        _part("cmlora-equal", _CMLORA, dominance=1),
        _part("cmlora-uncached", _CMLORA, cache=False),
        _part("cmlora-renewed", _CMLORA, max_age=3),
        _part("clora-unguided", _CLORA, step=0),
        _part("clora-unmasked", _CLORA, mask_after=1),
        _part("clora-anew", _CLORA, find=0),
        _part("composer-unguided", _COMPOSER, step=0),
        _part("composer-open", _COMPOSER, isolation=False),
        _part("composer-own-noise", _COMPOSER, reinit=False),
        _part("composer-cross-only", _COMPOSER, injection="cross_kv_out"),
        _part("composer-leaky", _COMPOSER, leak=0),
        _part("composer-unfilled", _COMPOSER, fill=0),
    )
}

USUAL = tuple(name for name, row in ROWS.items() if not row.part_of)
"""The rows of a run that names none."""
GROUPS = {"usual": USUAL, "parts": tuple(name for name, row in ROWS.items() if row.part_of)}
"""Names for several rows."""
PAIRS = (
    ("cmlora", "composite"),
    ("cmlora", "composite-paper"),
    ("cmlora", "switch"),
    ("cmlora", "composite-short"),
    ("cmlora-paper", "composite"),
    ("cmlora-paper", "composite-paper"),
    ("cmlora-paper", "switch"),
    ("cmlora-paper", "switch-paper"),
    ("cmlora-paper", "composite-paper-short"),
    ("clora", "attend"),
    ("clora", "masked-found"),
    ("lora-composer", "masked"),
    ("lora-composer", "regional"),
)
"""Differences that get a table of their own, beside each method's to the merge."""
REFERENCE = "merge"


def rows_named(names: Sequence[str]) -> list[Row]:
    """The rows called so, or in the groups called so, in the order of the table; none: the usual ones.

    Raises:
        UnknownNameError: no such row.
    """
    wanted = [row for name in names or ("usual",) for row in GROUPS.get(name, (name,))]
    for name in wanted:
        if name not in ROWS:
            raise UnknownNameError("row", name, (*GROUPS, *ROWS))
    return [row for row in ROWS.values() if row.name in wanted]


def request_of(row: Row, case: Case, base: str, seed: int, steps: int | None = None) -> GenerateRequest:
    """What is asked of the product. Pictures are made one seed at a time."""
    known = dict(zip(case.things, stand_ins(case), strict=True)) if row.source == "known" else None
    named = row.source == "method"
    options = dict(row.options) if named else {}
    weight, grow = float(options.pop(WEIGHT, 1)), float(options.pop(GROW, 0))
    return GenerateRequest.of(
        prompt=prompt_of(case, known),
        base=base,
        loras=tuple(LoraRef.of(name=taught.name, weight=weight) for taught in case.of(*acting(row))) if named else (),
        method=row.method,
        options=options,
        seed=seed,
        steps=steps,
        **({"regions": regions_of(case, grow)} if row.boxes and named else {}),
    )


def acting(row: Row) -> tuple[Role, ...]:
    """The roles whose LoRAs act."""
    return ROLES if row.lone is None else (row.lone,)


def regions_of(case: Case, grow: float = 0) -> tuple[str, ...]:
    """``NAME@x0,y0,x1,y1`` of each thing that is drawn, ``grow`` larger on every side as far as the picture reaches."""
    drawn = case.of("subject", "object")
    boxes = [[max(side - grow, 0) for side in box[:2]] + [min(side + grow, 1) for side in box[2:]] for box in case.boxes]
    return tuple(f"{t.name}@{','.join(f'{side:g}' for side in box)}" for t, box in zip(drawn, boxes, strict=True))


def things_of(row: Row, case: Case) -> tuple[str, ...]:
    """The concepts to look for."""
    return stand_ins(case) if row.source == "known" else case.things


def fits(row: Row, case: Case) -> bool:
    """Whether a row is made on a combination. A merge of one LoRA is that LoRA; singles have a row of their own."""
    return case.kind in row.kinds and bool(case.of(*acting(row)))


def differs(row: Row, other: Row) -> bool:
    """Whether two rows of one method ask for different things: an option of the method at its default is no difference."""
    from compose import method_named

    told, others = ({k: v for k, v in each.options.items() if k not in (WEIGHT, GROW)} for each in (row, other))
    same = method_named(row.method, **told).options == method_named(other.method, **others).options
    return not same or any(row.options.get(key) != other.options.get(key) for key in (WEIGHT, GROW))


def key_of(row: Row, request: GenerateRequest, base_sha256: str, loras: Mapping[str, str]) -> str:
    """Identity of one picture: row, request, and the hashes of base and LoRAs. The name of the base does not matter."""
    told = request.model_dump(mode="json", exclude={"base"}, exclude_defaults=True)
    files = [loras.get(ref.name, "") for ref in request.loras]
    return hashlib.sha256(json.dumps([row.name, row.source, told, base_sha256, files]).encode()).hexdigest()[:20]


def best_candidate(row: Row, rates: Sequence[tuple[float, float]]) -> Options:
    """The candidate with the most pictures that pass, then with the most LoRAs present; of equals the first."""
    return row.candidates[max(range(len(rates)), key=lambda index: (rates[index], -index))]


@contextmanager
def counted() -> Iterator[Callable[[], int]]:
    """Floating-point operations of matrix products, convolutions and attention made meanwhile, forwards and backwards."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    ops = torch.ops.aten
    attend = ops._scaled_dot_product_flash_attention_for_cpu
    mapping = {attend: _attention, ops._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward}
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    counter.mod_tracker = _Untracked()  # type: ignore[assignment]
    with counter:
        yield counter.get_total_flops


class _Untracked:
    """Counts for no module by itself: torch's tracker of modules cannot bear ``autograd.grad`` to what a module was given."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        """Nothing to begin."""

    def __exit__(self, *_: object) -> None:
        """Nothing to end."""


Shape = Sequence[int]


def _attention(q: Shape, k: Shape, v: Shape, *args: Any, **kwargs: Any) -> int:
    """``2 N M (d + e)`` for each head: the counter of torch leaves out the CPU's fused kernel."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


def _attention_backward(grad: Shape, q: Shape, k: Shape, v: Shape, *args: Any, **kwargs: Any) -> int:
    """Scores again, and the gradients of scores, queries, keys and values."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (3 * q[3] + 2 * v[3])


Count = Callable[[GenerateRequest], int]


def equivalents(count: Count, request: GenerateRequest) -> float:
    """What a request computes, in guided forwards of the stock UNet for one picture (conditional and unconditional rows).

    The prompt's encoding and the decoding of the picture are taken off: they follow from two stock runs of different length.
    """
    stock = GenerateRequest.of(prompt=request.prompt, base=request.base, seed=request.seed)
    short, long = count(stock.with_(steps=2)), count(stock.with_(steps=4))
    one = (long - short) / 2
    return (count(request) - (short - 2 * one)) / one


def short_steps(steps: int, mine: float, theirs: float) -> int:
    """Steps that cost no more than another method's run: ``mine`` and ``theirs`` are what both cost with ``steps``."""
    return max(1, int(steps * min(theirs / mine, 1.0)))
