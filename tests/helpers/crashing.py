"""A script that runs ``visibench sweep`` in processes of its own and kills them; see ``test_crashes.py``.

Processes are forked after the imports, which take most of the time of a short sweep. Run as ``crashing.py kill CONFIG
OUT COUNT`` or ``crashing.py share CONFIG OUT COUNT``; prints JSON.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import visibench.evals.answers.score
import visibench.evals.compute.timing  # noqa: F401
from visibench.cli import main
from visibench.evals.sweeps import in_process
from visibench.results.store import disk

config, out, count = sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])


def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)


def tear(file, line):
    """Half a line reaches the disk."""
    with file.open("ab") as stream:
        stream.write(line[: len(line) // 2])
    die()


def nth(function, at, instead, seen):
    """``function`` at first, ``instead`` from its call ``at`` on."""

    def called(*arguments, **options):
        seen.append(1)
        return (instead if len(seen) == at else function)(*arguments, **options)

    return called


def child(prepare) -> int:
    """A process that runs the sweep; ``prepare`` is called in it first."""
    process = os.fork()
    if process:
        return process
    try:
        sys.argv[1:] = ["sweep", config, "--out", str(out)]
        sink = os.open(out.with_suffix(f".{os.getpid()}.log"), os.O_WRONLY | os.O_CREAT)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        prepare()
        main()
    except SystemExit as ended:
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(ended.code or 0)
    os._exit(70)


def kill() -> dict:
    """Kill ``count`` runs, each at a random call of a writing function or a random time, then run to the end."""
    dice, how = random.Random(7), []
    while True:
        kind, at = dice.choice(["sync", "replace", "tear", "unlink", "time"]), dice.randint(1, 9)
        last = len(how) >= count

        def prepare(kind=kind, at=at, last=last):
            seen = []
            if last:
                return
            if kind == "sync":
                os.fsync = nth(os.fsync, at, die, seen)
            if kind == "replace":
                os.replace = nth(os.replace, at, die, seen)
            if kind == "unlink":
                Path.unlink = nth(Path.unlink, at, die, seen)
            if kind == "tear":
                disk.append = nth(disk.append, min(at, 3), tear, seen)

        process = child(prepare)
        if kind == "time" and not last:
            time.sleep(dice.uniform(0.1, 0.6))  # alone on a machine, a run is over within two seconds
            os.kill(process, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if status != -signal.SIGKILL:
            return {"killed": how, "status": status}
        how.append(kind)


def share() -> dict:
    """Let ``count`` processes share the sweep, the first of which dies in its second cell."""
    log = out.with_suffix(".cells")
    run = in_process.run_cell

    def noted(loaded, cell, *arguments, **options):
        done = run(loaded, cell, *arguments, **options)
        with log.open("a") as stream:
            stream.write(cell.config.folder + "\n")
        return done

    def prepare(dies=False):
        in_process.run_cell = noted
        if dies:
            disk.append = nth(disk.append, 6, tear, [])

    processes = [child(lambda: prepare(dies=True))]
    while not list(out.glob("cells/*/config.json")):  # else the others might leave it no second cell
        time.sleep(0.01)
    processes += [child(prepare) for _ in range(count - 1)]
    statuses = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    said = [out.with_suffix(f".{process}.log").read_text() for process in processes]
    return {"statuses": statuses, "cells": log.read_text().split(), "said": said}


if __name__ == "__main__":
    print(json.dumps({"kill": kill, "share": share}[sys.argv[1]]()))
