"""Measured time."""

import time

import numpy as np
import pytest
import torch
import visibench
from visibench.errors import OptionError
from visibench.evals.timing import Timing, iqr, measure, time_prefill

CPU = torch.device("cpu")


def test_warm_up_is_run_and_not_counted():
    calls: list[int] = []

    def work():
        calls.append(len(calls))
        time.sleep(0.05 if len(calls) <= 2 else 0.002)

    times = measure(work, CPU, warmup=2, repeats=5)
    assert len(calls) == 7
    assert len(times) == 5
    assert all(2 <= t < 50 for t in times)


def test_statistics_are_those_of_numpy():
    times = (5.0, 1.0, 4.0, 9.0, 2.0, 2.5)
    timing = Timing(times, warmup=1, batch_size=1, device="cpu")
    assert timing.median_ms == np.median(times)
    assert timing.iqr_ms == pytest.approx(np.subtract(*np.percentile(times, [75, 25])))
    assert timing.min_ms == 1.0
    assert timing.repeats == 6
    assert iqr([3.0]) == 0.0


@pytest.mark.parametrize("options", [{"repeats": 0, "warmup": 1}, {"repeats": 1, "warmup": -1}])
def test_senseless_repeats_are_refused(options):
    with pytest.raises(OptionError):
        measure(int, CPU, **options)


def test_prefill_is_one_forward_under_the_method(loaded):
    inputs = loaded.inputs(["what color is the box"] * 2, [[image()]] * 2)
    seen = []
    hook = loaded.adapter.layers[-1].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    timing = time_prefill(loaded, visibench.load_method("fastv", keep=0.25), inputs, warmup=1, repeats=3)
    hook.remove()
    assert seen == [inputs["input_ids"].shape[1] - 12] * 4
    assert (timing.repeats, timing.warmup, timing.batch_size, timing.device) == (3, 1, 2, "cpu")
    assert timing.min_ms > 0


def image():
    from hubdata import picture

    return picture("red")
