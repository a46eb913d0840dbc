"""Job files: what ``studio render`` is to make, a line of JSON or an entry of a YAML list each.

    {"kind": "generate", "version": 1, "name": "frog", "prompt": "a photo of a frog", "loras": ["pastel:0.8"], "seed": 1}

``kind`` says what to make (:data:`pipelines.jobs.KINDS`), ``version`` in which form it is written (1, also when left out),
``name`` what the result is called; all else are the fields of that kind's request. Unknown keys are refused, with their line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studio.errors import FileError, RequestError, StudioError, UnknownNameError
from ui.arguments import NOT_PLAIN, slug

if TYPE_CHECKING:
    from pipelines.jobs import Job, Machine

JSON_LINES = (".jsonl", ".ndjson")
YAML = (".yaml", ".yml")
NAME = re.compile(r"\w[\w .+-]{0,99}")
NAME_BYTES = 200
"""File systems take names of 255 bytes; ours get a number, an ending and, while they are written, eight digits more."""
VERSION = 1
TOO_DEEP = "values lie too deep in each other: write fewer levels of [ ] and { }"


@dataclass(frozen=True, kw_only=True)
class Line:
    """What is written: values by key, and the lines they stand on, the first of which is ``number``."""

    number: int
    values: Mapping[str, Any]
    places: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Item:
    """A line that can be run. ``name``: of its result. ``digest``: the same whenever the same would be made."""

    line: int
    name: str
    job: Job
    inputs: Mapping[str, str]
    digest: str

    @property
    def outputs(self) -> list[str]:
        return self.job.outputs(self.name)

    def resolved(self) -> dict[str, Any]:
        """The line with everything in it that was left open."""
        return {"name": self.name, **self.job.request.model_dump(mode="json")}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A line that cannot be run, and why."""

    line: int
    error: StudioError

    def __str__(self) -> str:
        return f"line {self.line}: {self.error}"


def read_lines(path: Path) -> list[Line | Problem]:
    """What a job file says, line by line.

    Raises:
        FileError: it cannot be read. RequestError: another ending, or nothing in it.
    """
    suffix = path.suffix.lower()
    if suffix not in (*JSON_LINES, *YAML):
        raise RequestError(f"'{path}' is no job file: it must end in {', '.join((*JSON_LINES, *YAML))}")
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError(f"cannot read {path}: it is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error
    found = list(_yaml_lines(text) if suffix in YAML else _json_lines(text))
    if not found:
        raise RequestError(f"{path} holds no job: write one line for each")
    return found


def _json_lines(text: str) -> Iterator[Line | Problem]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line, object_pairs_hook=_pairs, parse_constant=_no_number)
        except RecursionError:
            yield Problem(line=number, error=RequestError(TOO_DEEP))
        except ValueError as error:
            yield Problem(line=number, error=RequestError(f"no JSON ({getattr(error, 'msg', error)})"))
        except RequestError as error:
            yield Problem(line=number, error=error)
        else:
            yield _line(number, value)


def _line(number: int, value: Any, places: Mapping[str, int] | None = None) -> Line | Problem:
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return Line(number=number, values=value, places=places or {})
    return Problem(
        line=number, error=RequestError('not a set of keys and values, such as {"kind": "generate", "prompt": "..."}')
    )


def _pairs(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RequestError(f"{twice!r} is given twice: give it once")
    return found


def _no_number(text: str) -> float:
    raise RequestError(f"{text} is not a number here: give a finite one")


def _yaml_lines(text: str) -> Iterator[Line | Problem]:
    """Each entry of the list, or each document that is not a list."""
    import yaml

    try:
        loader = yaml.SafeLoader(text)
        while loader.check_node():
            top = loader.get_node()
            for node in top.value if isinstance(top, yaml.SequenceNode) else [top]:
                yield _yaml_line(loader, node)
    except yaml.reader.ReaderError as error:
        place = text.count("\n", 0, error.position) + 1
        yield Problem(line=place, error=RequestError(f"no YAML (the character U+{error.character:04X} must not stand there)"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        why = RequestError(f"no YAML ({getattr(error, 'problem', None) or error})")
        yield Problem(line=mark.line + 1 if mark else 1, error=why)
    except RecursionError:
        yield Problem(line=loader.line + 1, error=RequestError(TOO_DEEP))


def _yaml_line(loader: Any, node: Any) -> Line | Problem:
    from yaml import YAMLError

    number = node.start_mark.line + 1
    pairs = node.value if node.id == "mapping" else []
    keys = [(key.value, key.start_mark.line + 1) for key, _ in pairs if key.id == "scalar"]
    places: dict[str, int] = {}
    for key, place in keys:
        if key in places:
            return Problem(line=place, error=RequestError(f"{key!r} is given twice: give it once"))
        places[key] = place
    try:
        return _line(number, loader.construct_object(node, deep=True), places)
    except RecursionError:
        return Problem(line=number, error=RequestError(TOO_DEEP))
    except (YAMLError, *NOT_PLAIN) as error:
        return Problem(line=number, error=RequestError(f"no plain YAML ({getattr(error, 'problem', None) or error})"))


def read_jobs(path: Path, machine: Machine) -> tuple[list[Item], list[Problem]]:
    """Every line of a job file, checked as far as that goes without a model; and every line that is wrong.

    Raises:
        FileError, RequestError: the file as a whole cannot be used.
    """
    items: list[Item] = []
    problems: list[Problem] = []
    digests: dict[str, int] = {}
    files: dict[str, int] = {}
    for line in read_lines(path):
        if isinstance(line, Problem):
            problems.append(line)
            continue
        try:
            item = checked(line, machine)
            if item.digest in digests:
                raise RequestError(f"the same as line {digests[item.digest]}: give it another seed or a name of its own")
            for file in item.outputs:
                if file.lower() in files:
                    raise RequestError(f"would write {file}, as line {files[file.lower()]} does: give it another name")
        except _AtError as error:
            problems.append(Problem(line=error.line, error=error.reason))
        except StudioError as error:
            problems.append(Problem(line=line.number, error=error))
        except RecursionError:
            problems.append(Problem(line=line.number, error=RequestError(TOO_DEEP)))
        except OSError as error:  # of names that no file can have
            why = FileError(f"cannot look for a file it names: {error.strerror or error}")
            problems.append(Problem(line=line.number, error=why))
        else:
            digests[item.digest] = line.number
            files |= dict.fromkeys((file.lower() for file in item.outputs), line.number)
            items.append(item)
    return items, problems


class _AtError(Exception):
    """A mistake on a line of its own."""

    def __init__(self, line: int, reason: StudioError) -> None:
        super().__init__(str(reason))
        self.line, self.reason = line, reason


def checked(line: Line, machine: Machine) -> Item:
    """A line as a job.

    Raises:
        StudioError: what is wrong with it.
    """
    from pipelines.jobs import KINDS, digest

    values = dict(line.values)
    _check_text(values)
    kind, version = values.get("kind"), values.get("version", VERSION)
    if kind is None:
        raise RequestError(f"'kind' is missing: say what to make, one of {', '.join(KINDS)}")
    if not isinstance(kind, str) or kind not in KINDS:
        raise UnknownNameError("kind", str(kind), KINDS)
    if version != VERSION or isinstance(version, bool):
        raise RequestError(f"version {version!r} of '{kind}' is not known here: this studio reads version {VERSION}")
    takes = KINDS[kind].takes
    for key in values:
        if key not in takes.model_fields and key != "name":
            raise _AtError(line.places.get(key, line.number), UnknownNameError("key", key, ["name", *takes.model_fields]))
    name = values.pop("name", "")
    if not isinstance(name, str) or (name and not NAME.fullmatch(name)):
        raise RequestError(f"name {name!r} cannot name a file: use letters, digits, spaces and . _ + -, at most 100")
    if len(name.encode()) > NAME_BYTES:
        raise RequestError(f"name '{name}' is too long for a file: {len(name.encode())} bytes of UTF-8, at most {NAME_BYTES}")
    job = KINDS[kind](takes.of(**values), name, machine)
    inputs = job.inputs()
    found = digest(job.request.model_dump(mode="json"), _short(inputs), name)
    return Item(line=line.number, name=name or f"{slug(job.title())}-{found[:8]}", job=job, inputs=inputs, digest=found)


def _check_text(values: Mapping[str, Any]) -> None:
    """Refuse halves of characters, which JSON and YAML can escape and nothing can write."""
    try:
        json.dumps(values, ensure_ascii=False, default=str, skipkeys=True).encode()
    except UnicodeEncodeError as error:
        half = ord(error.object[error.start])
        raise RequestError(f"a text holds \\u{half:04x}, half of a character: write the whole character") from None


def _short(inputs: Mapping[str, str]) -> dict[str, str]:
    """Inputs without their kinds where that keeps them apart: the request says which is which, and what was made before kinds
    were noted keeps its digest."""
    short = {key.partition(":")[2]: found for key, found in inputs.items()}
    return short if len(short) == len(inputs) else dict(inputs)
