"""``studio doctor``: what this machine can do, which attention kernels really run, and what is missing.

A kernel is called good only after it has run here and agreed with the plain one: being installed proves nothing.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ui.rooms import DISTRIBUTION, shadowed, shared_with

if TYPE_CHECKING:
    import torch
    from rich.table import Table

DEPENDENCIES = (
    "torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "numpy", "opencv-python", "pillow", "gradio",
    "pydantic", "typer", "rich", "pyyaml",
)  # fmt: skip
"""The packages the studio cannot do without; as in ``pyproject.toml``."""
OPTIONAL = {"xformers": "xformers", "ray": "cluster"}
"""Package -> the extra that brings it."""
TOLERANCE = 2e-2
"""Largest difference between a fused and the plain kernel: half precision, values of order 1."""

State = Literal["ok", "info", "warn", "missing"]


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``missing`` means that something needed is not there."""

    section: str
    name: str
    state: State
    detail: str

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def examine(outputs: Path) -> list[Finding]:
    """Everything worth knowing, in the order it is printed.

    Args:
        outputs: the folder results would be written to.
    """
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        machine, versions, rooms, devices, kernels, shipped, lambda: writable(outputs),
    )  # fmt: skip
    return [finding for check in checks for finding in check()]


def table(findings: list[Finding]) -> Table:
    """The report for people."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "info": "blue", "warn": "yellow", "missing": "red"}
    drawn = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    for _ in range(3):
        drawn.add_column(no_wrap=True)
    drawn.add_column(overflow="fold")
    section = ""
    for finding in findings:
        heading = finding.section if finding.section != section else ""
        section = finding.section
        colour = colours[finding.state]
        drawn.add_row(f"[bold]{heading}[/]", finding.name, f"[{colour}]{finding.state}[/]", Text(finding.detail))
    return drawn


def machine() -> Iterator[Finding]:
    yield Finding("machine", "python", "ok", f"{sys.version.split()[0]} on {platform.platform()}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("machine", "cores", "info", f"{cores} usable of {os.cpu_count()}")
    try:
        import torch
    except ImportError:
        return
    limit = os.environ.get("OMP_NUM_THREADS")
    note = f" (OMP_NUM_THREADS={limit})" if limit else ""
    yield Finding("machine", "threads", "info", f"{torch.get_num_threads()} inside an operation{note}, "
                  f"{torch.get_num_interop_threads()} between operations")  # fmt: skip


def tested_versions() -> dict[str, str]:
    """Package -> version this release was tested with; empty when the list was not shipped."""
    from studio.paths import assets

    listing = assets().parent / "constraints.txt"
    if not listing.is_file():
        return {}
    lines = (line.partition("#")[0].strip() for line in listing.read_text("utf-8").splitlines())
    pairs = (line.partition("==") for line in lines)
    return {name.lower().replace("_", "-"): tested for name, equals, tested in pairs if equals}


def versions() -> Iterator[Finding]:
    from studio.errors import MissingAssetError

    try:
        tested = tested_versions()
    except MissingAssetError:
        tested = {}
    for name in DEPENDENCIES:
        try:
            found = version(name)
        except PackageNotFoundError:
            yield Finding("packages", name, "missing", f"not installed: pip install {DISTRIBUTION}")
            continue
        wanted = tested.get(name)
        same = wanted is None or found.partition("+")[0] == wanted
        yield Finding("packages", name, "ok" if same else "warn", found if same else f"{found}, tested with {wanted}")
    for name, extra in OPTIONAL.items():
        try:
            yield Finding("packages", name, "ok", version(name))
        except PackageNotFoundError:
            yield Finding("packages", name, "info", f"not installed, optional: pip install '{DISTRIBUTION}[{extra}]'")


def rooms() -> Iterator[Finding]:
    for line in shadowed():
        yield Finding("packages", "shadowed", "warn", line)
    for room, names in shared_with().items():
        yield Finding("packages", room, "warn", f"the package '{room}' is also brought by {', '.join(names)}")


def devices() -> Iterator[Finding]:
    try:
        import torch
    except ImportError as error:
        yield Finding("devices", "torch", "missing", f"cannot be imported: {_first_line(error)}")
        return
    yield Finding("devices", "cpu", "ok", f"{torch.backends.cpu.get_cpu_capability()} instructions")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            detail = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, compute capability {facts.major}.{facts.minor}"
            yield Finding("devices", f"cuda:{index}", "ok", detail)
    else:
        built = torch.version.cuda or torch.version.hip
        why = f"built for {built}, but no device or driver answers" if built else "this torch is a CPU build"
        yield Finding("devices", "cuda", "info", f"none: {why}")
    if torch.backends.mps.is_available():
        yield Finding("devices", "mps", "ok", "Apple GPU")


def kernels() -> Iterator[Finding]:
    """Run a tiny attention through every kernel on every kind of device here."""
    try:
        import torch
    except ImportError:
        return
    places = ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    for place in places:
        dtype = torch.float32 if place == "cpu" else torch.float16
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, 2, 64, 32, generator=generator).to(place, dtype) for _ in range(3))
        plain = torch.softmax(q.float() @ k.float().mT / q.shape[-1] ** 0.5, -1) @ v.float()
        for name, attention in _attentions().items():
            yield _tried(f"{name} on {place}", partial(attention, q, k, v), plain)


def _attentions() -> dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]]:
    """Kernel name -> attention over ``[B, heads, N, width]``."""
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def sdpa(backend: SDPBackend) -> Callable[..., torch.Tensor]:
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel([backend]):
                return F.scaled_dot_product_attention(q, k, v)

        return attend

    def xformers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        from xformers.ops import memory_efficient_attention

        out: torch.Tensor = memory_efficient_attention(*(x.transpose(1, 2).contiguous() for x in (q, k, v)))
        return out.transpose(1, 2)

    return {
        "SDPA": F.scaled_dot_product_attention,
        "SDPA math": sdpa(SDPBackend.MATH),
        "SDPA flash": sdpa(SDPBackend.FLASH_ATTENTION),
        "SDPA efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
        "SDPA cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
        "xformers": xformers,
    }


def _tried(name: str, attend: Callable[[], torch.Tensor], plain: torch.Tensor) -> Finding:
    """Run ``attend`` and compare; a kernel that is not for this machine is no fault, wrong numbers are."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            error = float((attend().float() - plain).abs().max())
        except ModuleNotFoundError:
            return Finding("kernels", name, "info", "not installed")
        except Exception as reason:  # any failure of foreign code is the finding
            said = str(caught[0].message) if caught else str(reason) or type(reason).__name__
            said = "no such kernel for this device and type" if said.startswith("No viable backend") else said
            return Finding("kernels", name, "info", f"does not run: {_first_line(said)}")
    if not error <= TOLERANCE:
        return Finding("kernels", name, "warn", f"runs but is wrong: differs by {error:.2g} from the plain formula")
    return Finding("kernels", name, "ok", "runs and agrees with the plain formula")


def shipped() -> Iterator[Finding]:
    """The files this product ships: atlas, embedded base, LoRAs."""
    import json

    from studio.art.atlas import STYLES
    from studio.errors import MissingAssetError
    from studio.paths import assets

    try:
        folder = assets()
    except MissingAssetError as error:
        yield Finding("assets", "folder", "missing", str(error))
        return
    needed = [*(f"{style}.webp" for style in STYLES), "concepts.json", "splits.json"]
    absent = ", ".join(name for name in needed if not (folder / "atlas" / name).is_file())
    yield _there("atlas", not absent, str(folder / "atlas"), f"no {absent} in {folder / 'atlas'}")
    base = folder / "base"
    try:
        name = json.loads((base / "studio.json").read_text("utf-8"))["name"]
    except (OSError, ValueError, TypeError, KeyError):  # a base without its record is reported, and no reason to stop
        name = "unnamed"
    yield _there("embedded base", (base / "model_index.json").is_file(), f"{name} in {base}", f"no model in {base}")
    loras = sorted(path.stem for path in (folder / "loras").glob("*.safetensors"))
    yield _there("LoRAs", bool(loras), ", ".join(loras), f"none in {folder / 'loras'}")


def _there(name: str, there: bool, found: str, absent: str) -> Finding:
    return Finding("assets", name, "ok", found) if there else Finding("assets", name, "missing", absent)


def writable(outputs: Path) -> Iterator[Finding]:
    """Whether a file can really be written where results go; nothing is left behind."""
    place = outputs.resolve()
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        yield Finding("results", str(outputs), "missing", f"cannot write into {place}: {error.strerror or error}")
        return
    yield Finding("results", str(outputs), "ok", f"{outputs.resolve()} can be written")


def _first_line(said: object) -> str:
    lines = str(said).strip().splitlines()
    return lines[0][:160] if lines else type(said).__name__
