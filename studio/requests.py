"""The typed requests that every door and every sidecar use. Unknown keys are refused; errors are one sentence."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator, model_validator

from studio.errors import RequestError, UnknownNameError
from studio.family import Family
from studio.paths import EMBEDDED

VERSION = 1
MAX_SEED = 2**32 - 1


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("must be a finite number")
    return value


Finite = Annotated[float, AfterValidator(_finite)]


class Request(BaseModel):
    """Base of all requests: frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def of(cls, /, **fields: Any) -> Self:
        """A checked request.

        Raises:
            UnknownNameError: a key is unknown; the near ones are offered.
            RequestError: a value does not fit.
        """
        try:
            return cls(**fields)
        except ValidationError as error:
            raise _sentence(cls, error) from error

    def with_(self, /, **changes: Any) -> Self:
        """A copy with ``changes``, checked like a new one."""
        return type(self).of(**{**{name: getattr(self, name) for name in type(self).model_fields}, **changes})


BRANCH = re.compile(r"float|int|str|bool|(function-|constrained-|literal\[|tuple\[).*")
"""How pydantic names the sides of a union, which say nothing to a user."""


def place_of(loc: Sequence[int | str]) -> str:
    """Where a value stands, as users write it, of what pydantic says of its place: ``loras.0.weight``."""
    return ".".join(str(part) for part in loc if not BRANCH.fullmatch(str(part)))


def _sentence(model: type[BaseModel], error: ValidationError) -> RequestError:
    first = error.errors()[0]
    place = place_of(first["loc"])
    if first["type"] == "extra_forbidden":
        return UnknownNameError("setting", place, list(model.model_fields))
    if first["type"] == "missing":
        return RequestError(f"'{place}' is missing from the request")
    ours = first["type"] == "value_error"
    reason = first["msg"].removeprefix("Value error, ") if ours else first["msg"][0].lower() + first["msg"][1:]
    value = "" if ours and not place else f", got {first['input']!r}"
    return RequestError(f"{place + ': ' if place else ''}{reason}{value}")


class LoraRef(Request):
    """One LoRA of a request: a name of the library or a file, and its weight (1: as trained; 0: left out; may be negative)."""

    name: str = Field(min_length=1)
    weight: Finite = 1.0

    @classmethod
    def parse(cls, text: str) -> LoraRef:
        """``NAME_OR_FILE[:WEIGHT]``; a colon that no number follows belongs to the name."""
        name, colon, tail = text.rpartition(":")
        try:
            weight = float(tail) if colon and name else None
        except ValueError:
            weight = None
        if weight is None:
            return cls.of(name=text)
        if not math.isfinite(weight):
            raise RequestError(f"LoRA '{name}' has the weight {tail}: give a finite number, such as 0.8")
        return cls.of(name=name, weight=weight)


class Region(Request):
    """A part of the picture and the LoRAs that act there.

    Args:
        loras: names of LoRAs of the request. The weight multiplies the one the request gives.
        box: ``(x0, y0, x1, y1)`` as shares of width and height, 0..1, from the top left corner; or
        mask: a picture file, white where the region is.
        prompt: what to draw there; None: the LoRAs' own trigger and class, with the words of style LoRAs.
    """

    loras: tuple[LoraRef, ...] = Field(min_length=1)
    box: tuple[Finite, Finite, Finite, Finite] | None = None
    mask: Path | None = None
    prompt: str | None = None

    @field_validator("loras", mode="before")
    @classmethod
    def _lora_forms(cls, value: object) -> object:
        return _lora_forms(value)

    @field_validator("box")
    @classmethod
    def _inside(cls, box: tuple[float, float, float, float] | None) -> tuple[float, float, float, float] | None:
        if box is not None and not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
            raise ValueError("must be x0,y0,x1,y1 with 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1, for example 0,0,0.5,1")
        return box

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.box is None) == (self.mask is None):
            raise ValueError("a region has either a box or a mask")
        _once(self.loras, "of a region ")
        return self

    @property
    def place(self) -> str:
        """Where it is, as it is written."""
        return str(self.mask) if self.box is None else ",".join(f"{side:g}" for side in self.box)

    @classmethod
    def parse(cls, text: str) -> Region:
        """``NAME[:W][+NAME2[:W]]@x0,y0,x1,y1[=local prompt]``, or a picture file in place of the four numbers.

        Raises:
            RequestError: another form, or values that do not fit.
        """
        names, at, tail = text.partition("@")
        place, equals, prompt = tail.partition("=")
        loras = [part.strip() for part in names.split("+")]
        if not at or not place.strip() or not all(loras):
            raise RequestError(
                f"region '{text}' is not NAME[:WEIGHT][+NAME...]@x0,y0,x1,y1[=prompt], for example cat-face@0,0,0.5,1"
            )
        told: dict[str, object] = {"loras": loras, "prompt": prompt.strip() or None if equals else None}
        sides = place.split(",")
        try:
            told["box"] = tuple(float(side) for side in sides)
        except ValueError:
            told["mask"] = place.strip()
        if len(sides) not in ((4,) if "box" in told else (1,)):
            raise RequestError(f"region '{text}': '{place}' is not four numbers x0,y0,x1,y1 between 0 and 1")
        try:
            return cls.of(**told)
        except RequestError as error:
            raise RequestError(f"region '{text}': {error}") from error


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The settings of a request that have defaults, with nothing left open."""

    steps: int
    guidance: float
    size: tuple[int, int]
    scheduler: str
    seed: int


class GenerateRequest(Request):
    """One prompt, ``count`` pictures; picture ``i`` uses the seed ``seed + i``.

    ``None`` for steps, guidance, size or scheduler means the default of the base's family (:meth:`sampling`), for the seed a
    random one, for the VAE the base's own. ``clip_skip`` counts as A1111 does: 1 reads the text encoder's last layer.
    ``embeddings`` are files of textual inversion; prompts call them by name. ``method`` says how several LoRAs act together,
    ``options`` are its own settings (:data:`compose.METHODS`), ``regions`` say where, for methods that ask.

    Args:
        triggers: when the prompt lacks the trigger of a LoRA: "add" it at the end, "require" it, or "keep" the prompt as it is.
        init_image: a picture to begin at. strength: how much of it may change, over 0 and up to 1; None: 0.6.
    """

    kind: Literal["generate"] = "generate"
    version: Literal[1] = 1
    prompt: str
    negative: str = ""
    loras: tuple[LoraRef, ...] = ()
    embeddings: tuple[str, ...] = ()
    base: str = EMBEDDED
    vae: str | None = None
    clip_skip: Annotated[int, Field(ge=1, le=48)] = 1
    steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    guidance: Annotated[Finite, Field(ge=1, le=100)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    size: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None
    scheduler: str | None = None
    count: Annotated[int, Field(ge=1, le=1000)] = 1
    method: str = "merge"
    options: Mapping[str, JsonValue] = Field(default_factory=dict)
    regions: tuple[Region, ...] = ()
    triggers: Literal["add", "require", "keep"] = "add"
    init_image: Path | None = None
    strength: Annotated[Finite, Field(gt=0, le=1)] | None = None

    @field_validator("loras", mode="before")
    @classmethod
    def _lora_forms(cls, value: object) -> object:
        return _lora_forms(value)

    @field_validator("regions", mode="before")
    @classmethod
    def _region_forms(cls, value: object) -> object:
        """Regions may also be written as text, see :meth:`Region.parse`."""
        if isinstance(value, str | Region):
            value = (value,)
        if isinstance(value, Sequence):
            return tuple(Region.parse(item) if isinstance(item, str) else item for item in value)
        return value

    @field_validator("embeddings", mode="before")
    @classmethod
    def _one_embedding(cls, value: object) -> object:
        """One embedding may be written without a list."""
        return (value,) if isinstance(value, str) else value

    @field_validator("size", mode="before")
    @classmethod
    def _size_forms(cls, value: object) -> object:
        """A size may also be written ``"512x768"`` or, square, ``512``."""
        if isinstance(value, int) and not isinstance(value, bool):
            return (value, value)
        if isinstance(value, str):
            sides = value.lower().replace("*", "x").split("x")
            if len(sides) == 1:
                sides = sides * 2
            try:
                return tuple(int(side) for side in sides)
            except ValueError:
                raise ValueError("must be WIDTHxHEIGHT, for example 512x768") from None
        return value

    @model_validator(mode="after")
    def _no_lora_twice(self) -> Self:
        _once(self.loras)
        return self

    @model_validator(mode="after")
    def _strength_of_a_picture(self) -> Self:
        if self.strength is not None and self.init_image is None:
            raise ValueError(f"strength {self.strength:g} is given without a picture to begin at: add init_image")
        return self

    @property
    def pictures(self) -> tuple[Path, ...]:
        """Every picture file it names: the one to begin at, and masks of regions."""
        masks = (region.mask for region in self.regions)
        return tuple(dict.fromkeys(path for path in (self.init_image, *masks) if path is not None))

    def sampling(self, family: Family, seed: int) -> Sampling:
        """What the request leaves open filled in: the family's defaults, and ``seed``."""
        return Sampling(
            steps=self.steps if self.steps is not None else family.steps,
            guidance=self.guidance if self.guidance is not None else family.guidance,
            size=self.size or family.size,
            scheduler=self.scheduler or family.scheduler,
            seed=self.seed if self.seed is not None else seed,
        )


def _lora_forms(value: object) -> object:
    """LoRAs may also be written ``"name:0.8"`` or ``("name", 0.8)``."""
    if isinstance(value, str | LoraRef):
        value = (value,)
    if isinstance(value, Sequence):
        return tuple(_lora_form(item) for item in value)
    return value


def _once(loras: Sequence[LoraRef], whose: str = "") -> None:
    seen: set[str] = set()
    for lora in loras:
        if lora.name in seen:
            raise ValueError(f"LoRA '{lora.name}' {whose}is named twice: name it once, with the weight you want")
        seen.add(lora.name)


def _lora_form(item: object) -> object:
    if isinstance(item, str):
        return LoraRef.parse(item)
    if isinstance(item, tuple | list) and len(item) == 2:
        return {"name": item[0], "weight": item[1]}
    return item


def as_request(request: GenerateRequest | Mapping[str, Any] | str, **fields: Any) -> GenerateRequest:
    """A request from a prompt and fields, from a mapping (as read from a file), or another request with changes."""
    if isinstance(request, GenerateRequest):
        return request.with_(**fields) if fields else request
    if isinstance(request, str):
        return GenerateRequest.of(prompt=request, **fields)
    return GenerateRequest.of(**{**request, **fields})
