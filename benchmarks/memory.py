"""Whether a sweep takes more memory for more questions: its peak on the host, at 100 and at 700 questions of GQA.

    python benchmarks/memory.py [--questions 100,700] [--most 1.1] [--set KEY=VALUE …]

Peak resident memory (RSS) of one process that sweeps methods on `tiny`, in a temporary folder. `make bench-memory` sets
`feature_cache_gb=0`, so that nothing is kept between batches but answers, then a bound that 100 questions fill. With
the default of 1 GiB more images, inputs and features stay in memory with more questions, until that is full. Exit code
1 if the last is more than `--most` times the first.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

METHODS = ["none", "fastv:keep=0.5", "visipruner:shallow_layers=4", "visionzip:tokens=54"]


def peak(questions: int, settings: list[str]) -> float:
    """MiB that a sweep of so many questions had at most."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "memory.yaml"
        config.write_text(json.dumps({"model": "tiny", "tasks": ["gqa"], "methods": METHODS, "timing": None}))
        command = [sys.executable, "-m", "visibench", "sweep", str(config), "--out", folder, "--limit", str(questions)]
        command += [part for setting in settings for part in ("--set", setting)]
        process = subprocess.Popen([*command, "--quiet"], stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"the sweep failed: {os.waitstatus_to_exitcode(status)}")
        return used.ru_maxrss / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", default="100,700")
    parser.add_argument("--most", type=float, default=1.1)
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    options = parser.parse_args()
    peaks = {}
    for questions in map(int, options.questions.split(",")):
        peaks[questions] = peak(questions, options.settings)
        print(f"{questions:6} questions: peak RSS {peaks[questions]:7.0f} MiB", flush=True)
    first, *_, last = peaks.values()
    print(f"ratio {last / first:.3f} (at most {options.most:g})")
    return int(last / first > options.most)


if __name__ == "__main__":
    sys.exit(main())
