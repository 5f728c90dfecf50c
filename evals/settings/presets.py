"""Named settings of methods: ``vscan@published-64``, and ``visipruner@FILE.yaml`` for one of your own.

A preset is one YAML file: the ``method``, its ``options``, and the ``source`` that says where they are from. One that
was found on a model names the ``model`` and the ``evidence``; used on another model it says so. Those of the package
lie in ``configs/presets/METHOD/``. Options written behind a preset replace its own: ``vscan@published-64:window=4``.
"""

from __future__ import annotations

import os
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...errors import DataError, OptionError, UnknownNameError, suggest
from ...results.store import disk
from ...utils import yaml_files

FOLDER = Path(__file__).parents[2] / "configs" / "presets"
_REFERENCE = re.compile(r"(?P<method>.+\.py(?::[^@]*)?|[^@]*)@(?P<preset>.+)$")


class PresetModel(BaseModel):
    """The model on which a preset was found: its name, and of a local checkpoint the fingerprint as well."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    checkpoint: str = ""


class Preset(BaseModel):
    """Options of a ``method`` under a name; ``source``: where they are from, in words.

    ``evidence``: what was measured when they were found, in any form.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    options: dict[str, Any]
    source: str = Field(min_length=1)
    model: PresetModel | None = None
    evidence: dict[str, Any] = {}

    def write(self, file: Path) -> None:
        """Write it to a YAML file. Raises :class:`DataError` where that cannot be."""
        content = self.model_dump(exclude_defaults=True)
        try:
            disk.write(file, yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120))
        except OSError as error:
            raise DataError(f"cannot write {file}: {error.strerror}") from error


def divided(reference: str) -> tuple[str, str]:
    """The method's own reference and the preset's, which is empty where there is none."""
    match = _REFERENCE.match(reference)
    return (match["method"], match["preset"]) if match else (reference, "")


def load(method: str, name: str) -> Preset:
    """The preset ``name`` of a ``method``: one of the package, or a YAML file.

    Raises :class:`UnknownNameError` if there is none, :class:`DataError` for a file that is not there or not YAML,
    :class:`OptionError` for one that is no preset, or that of another method.
    """
    packaged = {file.stem: file for file in (FOLDER / method).glob("*.yaml")}
    file = packaged.get(name, Path(name))
    if name not in packaged and file.suffix not in (".yaml", ".yml"):
        known = suggest(name, packaged) if packaged else f"the package has none of {method}"
        raise UnknownNameError(f"no preset {name!r} of {method}, and not a YAML file; {known}")
    if not os.path.isfile(file):
        raise DataError(f"{method}@{name}: there is no file {file}")
    try:
        preset = Preset.model_validate(yaml_files.mapping(file, "method, options and source"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise OptionError(f"{file} is no preset: {where}: {first['msg'][0].lower()}{first['msg'][1:]}") from error
    if preset.method != method:
        raise OptionError(f"{file} is a preset of {preset.method}: write {preset.method}@{name}")
    return preset


def names(method: str) -> list[str]:
    """The presets of a method that ship with the package."""
    return sorted(file.stem for file in (FOLDER / method).glob("*.yaml"))


@cache
def tell(method: str, name: str, model: str) -> None:
    """One line on standard error, once, if the preset was found on another model than the one called ``model``."""
    from ...models.load import fingerprint

    origin = load(method, name).model
    if origin is None:
        return
    here = fingerprint(model)
    same = here == origin.checkpoint if here and origin.checkpoint else model == origin.name
    if not same:
        print(f"{method}@{name} was found on {origin.name}, not on {model}: see its evidence", file=sys.stderr)
