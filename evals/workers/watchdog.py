"""Ends what a cluster of Ray has started once its driver has ended, however that ended.

    python watchdog.py MARK        standard input: a pipe that the driver holds open

Ray's own processes look for their driver now and then, and some live on when it is killed. Those that are started first
have inherited the driver's environment, in which ``MARK`` is a value that nothing else has; those that they start may
have written over theirs, as Ray's agents do, and are known as their children.
"""

import select
import sys
import time

import psutil

NAME = "VISIBENCH_CLUSTER"
LOOK = 2.0
"""Seconds between two looks at who is there."""
TRIES = 20


def of_cluster(mark: str) -> set[psutil.Process]:
    """The processes of a cluster that run now."""
    found: set[psutil.Process] = set()
    for process in psutil.process_iter():
        try:
            if process.environ().get(NAME) == mark:
                found |= {process, *process.children(recursive=True)}
        except psutil.Error:  # it has just ended, or is somebody else's
            continue
    return found


def living(processes: set[psutil.Process]) -> set[psutil.Process]:
    """Those of them that have not ended; a number that was given anew is another process."""
    alive = set()
    for process in processes:
        try:
            alive |= {process} if process.is_running() and process.status() != psutil.STATUS_ZOMBIE else set()
        except psutil.Error:
            continue
    return alive


def watch(mark: str) -> set[psutil.Process]:
    """Wait for the end of standard input; the processes of the cluster that have been seen and live."""
    known: set[psutil.Process] = set()
    while not select.select([sys.stdin], [], [], LOOK)[0]:
        known = living(known | of_cluster(mark))
    return known


def end(mark: str, known: set[psutil.Process]) -> None:
    """Kill them, and what they start meanwhile."""
    for _ in range(TRIES):
        known = living(known | of_cluster(mark))
        for process in known:
            try:
                process.kill()
            except psutil.Error:
                continue
        if not known:
            return
        time.sleep(0.1)


if __name__ == "__main__":
    end(sys.argv[1], watch(sys.argv[1]))
