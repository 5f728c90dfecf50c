"""The environment of commands that must not find anybody's W&B account."""

import os
from pathlib import Path

import matplotlib

KEY = "0123456789abcdef" * 3


def environment(home: Path, **changes: str) -> dict[str, str]:
    """This process's, without an account."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_") and k != "NETRC"}
    cache = os.environ.get("VISIBENCH_CACHE") or str(Path.home() / ".cache" / "visibench")
    return clean | {"HOME": str(home), "VISIBENCH_CACHE": cache, "MPLCONFIGDIR": matplotlib.get_configdir(), **changes}
