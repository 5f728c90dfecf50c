"""Protocols: how a model is asked, by name or from a file of the user's. Published numbers hold for one alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import DataError, InputError, OptionError, UnknownNameError, suggest
from ..utils import yaml_files
from ..utils.files import read

PACKAGED = Path(__file__).with_suffix(".yaml")


class Protocol(BaseModel):
    """How a model is asked, and how its answers are taken. What is not given is the checkpoint's or the task's own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = "hf"
    about: str = ""
    """In one line, for tables and lists."""
    source: str = ""
    """Where its values come from."""
    system: str | None = None
    """System text, in the template or as a system turn of the checkpoint's chat template."""
    template: str | None = None
    """The prompt, with `{system}`, `{images}` and `{question}`, instead of the checkpoint's chat template."""
    image_aspect: Literal["processor", "pad"] = "processor"
    """`pad`: images become squares, padded with the processor's mean colour, before the processor gets them."""
    min_pixels: int | None = Field(default=None, ge=1)
    """Fewest pixels of an image, for processors that keep its size (Qwen-VL)."""
    max_pixels: int | None = Field(default=None, ge=1)
    """Most pixels of an image, for the same."""
    suffix: str | None = None
    """What prompts end with, instead of the task's own request for a short answer."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Longest answer in tokens, instead of the task's."""
    scoring: Literal["task", "lenient"] = "task"
    """`lenient`: an answer in which a reference stands counts as that reference (yes or no: the first of both)."""

    def record(self) -> dict[str, Any]:
        """What of it decides numbers, as cells keep it; nothing for ``hf`` as it is."""
        kept = self.model_dump(exclude_defaults=True, exclude={"about", "source"})
        return {} if kept in ({}, {"name": "hf"}) else {"name": self.name} | kept

    def prompt(self, processor: Any, question: str, images: int) -> str:
        """The text of a question with so many images."""
        token = getattr(processor, "image_token", None) or "<image>"
        own = getattr(processor, "chat_template", None)
        if self.template is not None or not own:
            text = self.template or ("{system} " if self.system else "") + "USER: {images}\n{question} ASSISTANT:"
            for name, value in {"system": self.system or "", "images": token * images}.items():
                text = text.replace(f"{{{name}}}", value)
            return text.replace("{question}", question)
        content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
        turns = [{"role": "user", "content": content}]
        if self.system is not None:
            turns.insert(0, {"role": "system", "content": [{"type": "text", "text": self.system}]})
        text = processor.apply_chat_template(turns, add_generation_prompt=True)
        if self.system and self.system not in text:
            raise InputError(
                f"protocol {self.name}: the checkpoint's chat template leaves out its system text: give a template too"
            )
        return text

    def template_of(self, processor: Any) -> str:
        """Whose template prompts follow."""
        if self.template is not None:
            return f"protocol {self.name}"
        return (
            "checkpoint"
            if getattr(processor, "chat_template", None)
            else "none of the checkpoint's (USER: … ASSISTANT:)"
        )

    def shaped(self, processor: Any, pictures: Sequence[Image.Image]) -> list[Image.Image]:
        """Images as the processor is to get them."""
        if self.image_aspect == "processor":
            return list(pictures)
        mean = tuple(int(255 * value) for value in processor.image_processor.image_mean)
        return [squared(picture, mean) for picture in pictures]

    def set_up(self, processor: Any) -> None:
        """Give an image processor its limits. Raises :class:`OptionError` for one that has none."""
        limits = {key: getattr(self, key) for key in ("min_pixels", "max_pixels") if getattr(self, key) is not None}
        images: Any = getattr(processor, "image_processor", None)
        edges = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
        for key, value in limits.items():
            size = getattr(images, "size", None)
            if not (hasattr(images, "merge_size") and size is not None and edges[key] in size):
                raise OptionError(
                    f"protocol {self.name} sets {key}, which {type(images).__name__} does not know: leave it out"
                )
            images.size = {**dict(size), edges[key]: value}


HF = Protocol(about="what the checkpoint says, its chat template and its image processor")


def squared(picture: Image.Image, colour: Sequence[int]) -> Image.Image:
    """The picture in the middle of a square of ``colour``, as LLaVA's ``expand2square``."""
    side = max(picture.size)
    if picture.size == (side, side):
        return picture
    square = Image.new("RGB", (side, side), tuple(colour))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def find(given: str | Mapping[str, Any]) -> Protocol:
    """A protocol by name, ``FILE.yaml`` or ``FILE.yaml:NAME``, or from its values, which may extend another.

    Raises :class:`UnknownNameError`, :class:`DataError` for an unreadable file, and :class:`OptionError` for values.
    """
    if not isinstance(given, str):
        return _built(str(given.get("name", "own")), given, packaged(), "protocol")
    file, colon, name = given.rpartition(":") if not given.endswith((".yaml", ".yml")) else (given, ":", "")
    if not (colon and file.endswith((".yaml", ".yml"))):
        return _built(given, _named(given, packaged(), "the package"), packaged(), "protocol")
    table = _read(Path(file))
    if not name and len(table) != 1:
        raise OptionError(f"{file} holds {len(table)} protocols: name one, {file}:NAME; {suggest('', table)}")
    name = name or next(iter(table))
    return _built(name, _named(name, table, file), packaged() | table, file)


@cache
def packaged() -> dict[str, Any]:
    """The protocols that come with the package: name → values."""
    return _read(PACKAGED)


def _named(name: str, table: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    if name not in table:
        raise UnknownNameError(f"no protocol {name!r} in {where}; {suggest(name, table)}, or a YAML file of your own")
    return table[name]


def _built(name: str, values: Any, table: Mapping[str, Any], where: str, depth: int = 0) -> Protocol:
    if not isinstance(values, Mapping):
        raise OptionError(f"{where}: protocol {name} is no mapping of keys to values")
    base = values.get("extends")
    if base is not None and not isinstance(base, str):
        raise OptionError(f"{where}: protocol {name}: extends: expected the name of a protocol, not {base!r}")
    if depth > len(table):
        raise OptionError(f"{where}: protocol {name} extends itself")
    inherited = _built(base, _named(base, table, where), table, where, depth + 1).model_dump() if base else {}
    try:
        own = {key: value for key, value in values.items() if key != "extends"}
        return Protocol.model_validate(inherited | own | {"name": name})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        known = suggest(key, Protocol.model_fields) if first["type"] == "extra_forbidden" else first["msg"].lower()
        raise OptionError(f"{where}: protocol {name}: {key}: {known}") from error


def _read(file: Path) -> dict[str, Any]:
    try:
        content = yaml_files.parse(read(file).decode("utf-8-sig"))
    except OSError as error:
        raise DataError(f"no protocols in {file} ({error.strerror}): give a YAML file that is there") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not content:
        raise DataError(f"{file} holds no protocols: write NAME: and its keys below")
    return content
