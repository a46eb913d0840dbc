"""The typed requests that every door and every sidecar use. Unknown keys are refused; errors are one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator, model_validator

from studio.errors import RequestError, UnknownNameError
from studio.family import Family

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
    def of(cls, **fields: Any) -> Self:
        """A checked request.

        Raises:
            UnknownNameError: a key is unknown; the near ones are offered.
            RequestError: a value does not fit.
        """
        try:
            return cls(**fields)
        except ValidationError as error:
            raise _sentence(cls, error) from error

    def with_(self, **changes: Any) -> Self:
        """A copy with ``changes``, checked like a new one."""
        return type(self).of(**{**{name: getattr(self, name) for name in type(self).model_fields}, **changes})


def _sentence(model: type[BaseModel], error: ValidationError) -> RequestError:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
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
        if colon and name:
            try:
                return cls.of(name=name, weight=float(tail))
            except ValueError:
                pass
        return cls.of(name=text)


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
    ``options`` are its own settings (:data:`compose.METHODS`).
    """

    kind: Literal["generate"] = "generate"
    version: Literal[1] = 1
    prompt: str
    negative: str = ""
    loras: tuple[LoraRef, ...] = ()
    embeddings: tuple[str, ...] = ()
    base: str = "embedded"
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

    @field_validator("loras", mode="before")
    @classmethod
    def _lora_forms(cls, value: object) -> object:
        """LoRAs may also be written ``"name:0.8"`` or ``("name", 0.8)``."""
        if isinstance(value, str | LoraRef):
            value = (value,)
        if isinstance(value, Sequence):
            return tuple(_lora_form(item) for item in value)
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
        seen: set[str] = set()
        for lora in self.loras:
            if lora.name in seen:
                raise ValueError(f"LoRA '{lora.name}' is named twice: name it once, with the weight you want")
            seen.add(lora.name)
        return self

    def sampling(self, family: Family, seed: int) -> Sampling:
        """What the request leaves open filled in: the family's defaults, and ``seed``."""
        return Sampling(
            steps=self.steps if self.steps is not None else family.steps,
            guidance=self.guidance if self.guidance is not None else family.guidance,
            size=self.size or family.size,
            scheduler=self.scheduler or family.scheduler,
            seed=self.seed if self.seed is not None else seed,
        )


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
