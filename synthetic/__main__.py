"""``python -m visibench.synthetic``: build the data sets, or write the manifest anew."""

import argparse
from pathlib import Path

from .datasets import ensure, write_manifest


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, help="cache folder (default: $VISIBENCH_CACHE or ~/.cache/visibench)")
    parser.add_argument("--write-manifest", action="store_true", help="after a wanted change of scenes or questions")
    arguments = parser.parse_args()
    for calibration in (False, True):
        if arguments.write_manifest:
            print(write_manifest(calibration=calibration))
        else:
            print(ensure(arguments.root, calibration=calibration))


if __name__ == "__main__":
    main()
