"""Synthetic data in the schemas of GQA, MME, TextVQA and POPE, built on first use."""

from pathlib import Path


def ensure(root: Path | None = None, *, calibration: bool = False) -> Path:
    """Folder of the four data sets, built in ``root`` when it is not there yet (see :mod:`.datasets`)."""
    from .datasets import ensure as build

    return build(root, calibration=calibration)


__all__ = ["ensure"]
