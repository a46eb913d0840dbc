"""A training written down: a YAML file of options. Paths in it are relative to the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from studio.errors import FileError
from studio.paths import EMBEDDED
from training.config import ALPHA, ConceptConfig, make_config


def load_config(path: Path | str, /, **overrides: Any) -> ConceptConfig:
    """Read a YAML file; keywords win over the file. Paths in it are relative to its folder, a ``base`` if it is there.

    Raises:
        FileError: the file is missing or not YAML.
        RequestError: as :func:`make_config`.
    """
    return make_config(**read_options(Path(path)) | overrides)


def read_options(path: Path) -> dict[str, Any]:
    """The options of a YAML file, unchecked; paths relative to its folder, a ``base`` if it is there.

    Raises:
        FileError: the file is missing or not YAML.
    """
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"cannot read the training file '{path}': {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise FileError(f"'{path}' is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise FileError(f"'{path}' must hold 'option: value' lines, such as 'trigger: zqx'")
    for key in ("data", "output", "prior_data", "start_from"):
        if isinstance(values.get(key), str):
            values[key] = path.parent / Path(values[key]).expanduser()
    if isinstance(masks := values.get("masks"), str) and masks != ALPHA:
        values["masks"] = path.parent / Path(masks).expanduser()
    base = values.get("base")
    if isinstance(base, str) and base not in ("", EMBEDDED) and (beside := path.parent / Path(base).expanduser()).exists():
        values["base"] = str(beside)
    return {str(key): value for key, value in values.items()}
