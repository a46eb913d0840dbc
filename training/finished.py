"""Is the LoRA of a run there already? And what two runs have different."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from studio.errors import RequestError, StudioError

if TYPE_CHECKING:
    from pathlib import Path

    from training.plan import Plan

SHOWN = 6
"""Differences a sentence lists."""


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines ``key: old -> new`` for every value that differs."""
    keys = sorted(old.keys() | new.keys())
    return [f"{key}: {old.get(key, '(absent)')} -> {new.get(key, '(absent)')}" for key in keys if old.get(key) != new.get(key)]


def finished(plan: Plan) -> bool:
    """Whether the file at the output is what ``plan`` would train, so that there is nothing to do.

    Not when the plan starts over, nor when an unfinished run lies there: that one goes on.

    Raises:
        RequestError: it is something else, which is not overwritten unasked; the message lists what differs.
    """
    from training.state import find

    config = plan.config
    if config.restart or not config.output.exists() or find(config.work) is not None:
        return False
    told = _told(config.output)
    changed = differences(told, json.loads(json.dumps(plan.identity())))
    if not changed:
        return True
    shown = f"{'; '.join(changed[:SHOWN])}{'; ...' if len(changed) > SHOWN else ''}"
    what = f"was trained with other values ({shown})" if told else "does not say how it was trained"
    raise RequestError(f"'{config.output}' is there already and {what}: move it away, or set restart to true to train it again")


def nothing_to_do(plan: Plan) -> str:
    """The sentence for a plan that is :func:`finished`."""
    from studio.lora.files import read_header
    from training.export import layout_of

    output, wanted = plan.config.output, layout_of(plan.config.layout, plan.base.family.name)
    written = read_header(output).metadata.get("modelspec.implementation", "")
    other = written.endswith("sd-scripts") != (wanted == "kohya")
    names = f"; 'studio lora convert' brings it into the layout {wanted}" if other else ""
    return f"'{output}' is finished, so there is nothing to train: set restart to true to train it again{names}"


def _told(path: Path) -> dict[str, Any]:
    """What a file says of its training; nothing when it is another program's, or damaged."""
    from studio.lora.files import read_header

    try:
        found = json.loads(read_header(path).metadata.get("studio.config", ""))
    except (StudioError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
