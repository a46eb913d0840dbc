"""How the doors speak: words for people, one JSON line for scripts, an exit code for both.

Answers go to standard output; progress, notes and errors go to standard error. With ``--json`` standard output carries exactly
one line, also when the command fails, whatever a library prints on the way.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console, RenderableType

EXIT_CODES = {
    0: "done",
    1: "a failure without a code of its own",
    2: "a wrong option or a value out of range",
    3: "an unknown name (base, LoRA, scheduler, ...)",
    4: "a file or folder that cannot be read or written",
    5: "a file that is unsafe to open",
    6: "a LoRA, embedding or checkpoint that is damaged, of an unknown format, or made for another base",
    7: "a model that produced NaN or infinity",
    8: "not enough memory",
    9: "a package that is missing, or another one in its place",
    130: "cancelled (Ctrl-C)",
}
"""Every code the ``studio`` command ends with."""

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON line; everything else goes to stderr.")]
"""The option every command that gives an answer has."""


@dataclass(frozen=True)
class Voice:
    """Where one command speaks: ``answers`` is the real standard output."""

    answers: TextIO
    as_json: bool

    def answer(self, payload: dict[str, Any], *words: str | RenderableType) -> None:
        """The result: ``payload`` as one JSON line with ``--json``, otherwise ``words``, one after the other."""
        if self.as_json:
            print(json.dumps(payload, ensure_ascii=False, default=str), file=self.answers, flush=True)
            return
        for part in words:
            if isinstance(part, str):
                print(part, file=self.answers, flush=True)
            else:
                Console(file=self.answers, highlight=False).print(part)

    def note(self, text: str) -> None:
        """Something worth knowing that is not the result."""
        print(harmless(text), file=sys.stderr, flush=True)


@contextmanager
def speaking(as_json: bool = False) -> Iterator[Voice]:
    """A :class:`Voice`; with ``as_json`` everything else printed meanwhile is sent to standard error."""
    answers = sys.stdout
    if not as_json:
        yield Voice(answers, False)
        return
    with redirect_stdout(sys.stderr):
        yield Voice(answers, True)


def run(app: typer.Typer, arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; a user's mistake is one line, ``error: ...``, never a traceback."""
    from studio.errors import StudioError

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = typer.main.get_command(app)
    try:
        code = command.main(args=arguments, prog_name="studio", standalone_mode=False)
        sys.stdout.flush()
    except StudioError as error:
        return _failed(type(error).__name__, str(error), error.exit_code, arguments)
    except typer.TyperException as error:  # a wrong option or argument
        where = getattr(getattr(error, "ctx", None), "command_path", "studio")
        return _failed(
            "UsageError", f"{_line(error.format_message()).rstrip('.')} (see '{where} --help')", error.exit_code, arguments
        )
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:  # the reader of our output went away, as 'head' does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if code == 130:
        return _failed("CancelledError", "cancelled", 130, arguments)
    return code if isinstance(code, int) else 0


def _failed(kind: str, message: str, code: int, arguments: Sequence[str]) -> int:
    print(f"error: {_line(message)}", file=sys.stderr, flush=True)
    if "--json" in arguments:
        print(json.dumps({"error": {"kind": kind, "message": message, "exit_code": code}}, ensure_ascii=False), flush=True)
    return code


def harmless(text: str) -> str:
    """``text`` without what could steer a terminal: file names and what files say are a stranger's. Line breaks stay."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)


def _line(text: str) -> str:
    return " ".join(harmless(text).split())
