"""Papers whose settings and figures are known: each a sweep, by name, in configs/papers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ... import configs
from ...errors import UnknownNameError, suggest
from ...results.published.reproduction import papers_by_file
from ..settings.config import parse
from ..settings.include import override, read
from .config import SweepConfig

FOLDER = Path(configs.__file__).parent / "papers"


class PaperConfig(SweepConfig):
    """A sweep over the settings of a paper."""

    paper: str
    """The file of printed figures in results/published."""


def known() -> list[str]:
    """Papers by name."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def load_paper(name: str, settings: Sequence[str] = ()) -> PaperConfig:
    """The sweep of a paper, with ``settings`` as ``--set`` takes them. Raises :class:`UnknownNameError`."""
    if name not in known():
        raise UnknownNameError(f"no settings of paper {name!r} are known; {suggest(name, known())}")
    content, path = read(str(FOLDER / f"{name}.yaml"))
    config = parse(PaperConfig, override(content, settings, PaperConfig.model_fields), str(path))
    files = [file for _, file in papers_by_file()]
    if config.paper not in files:
        raise UnknownNameError(f"{path}: no printed figures of {config.paper!r}; {suggest(config.paper, files)}")
    return config
