"""Measured time."""

import gc
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import visibench
from visibench.engine import session
from visibench.errors import OptionError
from visibench.evals.compute import timing as clocks
from visibench.evals.compute.timing import (
    HostClock,
    MethodClock,
    Timing,
    clock_of,
    greedy,
    iqr,
    measure,
    time_method,
    time_phases,
    time_prefill,
)
from visibench.methods import Forward, Keep, Method

CPU = torch.device("cpu")


class FakeClock(HostClock):
    """Time passes only where a test lets it."""

    now = 0.0

    def __init__(self) -> None:
        self.calls: list[str] = []

    def mark(self) -> float:
        self.calls.append("mark")
        return self.now

    def settle(self) -> None:
        self.calls.append("settle")

    def between(self, start: float, end: float) -> float:
        return end - start


@pytest.fixture
def clock(monkeypatch):
    fake = FakeClock()
    monkeypatch.setattr(clocks, "clock_of", lambda device: fake)
    return fake


def test_warm_up_is_run_and_not_counted():
    calls: list[int] = []

    def work():
        calls.append(len(calls))
        time.sleep(0.05 if len(calls) <= 2 else 0.002)

    times = measure(work, CPU, warmup=2, repeats=5)
    assert len(calls) == 7
    assert len(times) == 5
    assert all(2 <= t < 50 for t in times)


def test_the_device_is_idle_before_the_first_mark_and_done_before_times_are_read(clock):
    measure(lambda: clock.calls.append("work"), CPU, warmup=1, repeats=2)
    assert clock.calls == ["work", *["settle", "mark", "work", "mark", "settle"] * 2]


def test_nothing_disturbs_a_generation_that_is_timed(clock, loaded, monkeypatch):
    collecting = []
    real = clocks.greedy
    monkeypatch.setattr(clocks, "greedy", lambda *args: (collecting.append(gc.isenabled()), real(*args)))
    time_phases(loaded, loaded.synthetic_inputs(1, 8, 144), new_tokens=2)
    assert clock.calls[:2] == ["settle", "mark"]
    assert clock.calls[-2:] == ["mark", "settle"]
    assert (collecting, gc.isenabled()) == ([False], True)
    gc.disable()
    try:
        time_phases(loaded, loaded.synthetic_inputs(1, 8, 144), new_tokens=2)
        assert not gc.isenabled(), "as it was before"
    finally:
        gc.enable()


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


# ---- phases -------------------------------------------------------------------------------------------------------


def test_greedy_steps_give_the_tokens_of_generate(loaded):
    inputs = loaded.inputs(["what color is the box", "is there a ring here"], [[image()], [image()]])
    assert inputs["attention_mask"].all()
    tokens = []
    greedy(loaded.model, inputs, 5, lambda output: tokens.append(output.logits[:, -1].argmax(-1)))
    generated = loaded.model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, eos_token_id=[])
    assert torch.stack(tokens, 1).tolist() == generated[:, -5:].tolist()


def test_greedy_runs_on_a_pruned_cache_as_generate_does(loaded):
    inputs = loaded.synthetic_inputs(2, 12, 16)
    tokens = []
    with visibench.prune(loaded.model, visibench.load_method("fastv", keep=0.25)):
        greedy(loaded.model, inputs, 5, lambda output: tokens.append(output.logits[:, -1].argmax(-1)))
        generated = loaded.model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=[])
    assert torch.stack(tokens, 1).tolist() == generated[:, -5:].tolist()


def test_phases_are_those_of_the_parts_that_run(loaded, clock):
    """The tower takes 7, the projector 5 and each call of a decoder layer 1, of which there are as many as layers."""
    layers = len(loaded.adapter.layers)
    hooked = lambda: [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in loaded.model.modules()]  # noqa: E731
    loaded.model(**loaded.synthetic_inputs(1, 6, 16))  # transformers leaves hooks of its own
    before = hooked()

    def passes(by):
        def hook(*_):
            clock.now += by

        return hook

    hooks = [
        loaded.adapter.vision_blocks[0].register_forward_pre_hook(passes(7)),
        loaded.adapter.projector.register_forward_pre_hook(passes(5)),
        *(layer.register_forward_pre_hook(passes(1)) for layer in loaded.adapter.layers),
    ]
    times = time_phases(loaded, loaded.synthetic_inputs(1, 6, 16), 4)
    text = time_phases(loaded, loaded.synthetic_inputs(1, 6, 0), 1)
    for hook in hooks:
        hook.remove()
    assert times == {"vision": 12, "prefill": 12 + layers, "decode": layers, "end_to_end": 12 + 4 * layers}
    assert text == {"prefill": layers, "end_to_end": layers}
    assert hooked() == before


@dataclass(frozen=True)
class Slow(Method):
    """Takes 3 at each layer's input and 5 in its attention, besides the attention itself."""

    name = "slow"
    title = "Slow"
    hook_points = ("attention", "decoder", "projector")
    clock: FakeClock | None = None

    def begin(self, layout, geometry):
        return SlowForward(self.clock)


class SlowForward(Forward):
    def __init__(self, clock):
        self.clock = clock

    def projected(self, view):
        self.clock.now += 11

    def layer_input(self, layer, view):
        self.clock.now += 3
        return Keep(view.present)

    def attention(self, layer, view):
        self.clock.now += 5
        return view.output if layer % 2 else None


def test_overhead_is_the_method_without_the_attention_that_runs_anyway(loaded, clock, monkeypatch):
    original = session.PruningSession._on_attention

    def slower(self, layer, kernel, *args, **kwargs):
        def slow_kernel(*inner, **named):
            clock.now += 100
            return kernel(*inner, **named)

        return original(self, layer, slow_kernel, *args, **kwargs)

    monkeypatch.setattr(session.PruningSession, "_on_attention", slower)
    spent = time_method(loaded, Slow(clock=clock), loaded.synthetic_inputs(1, 6, 16))
    assert spent == 11 + 8 * len(loaded.adapter.layers)
    assert clock.now == spent + 100 * len(loaded.adapter.layers)


def test_attention_in_parts_is_the_models_own(loaded, clock, monkeypatch):
    from visibench.engine import attention

    original = attention.subset_attention

    def slower(*args):
        clock.now += 100
        return original(*args)

    monkeypatch.setattr(attention, "subset_attention", slower)
    method = visibench.load_method("visipruner", shallow_layers=1, skip=True)
    assert time_method(loaded, method, loaded.synthetic_inputs(1, 6, 16)) == 0
    assert clock.now == 200


def test_stopwatch_counts_only_the_outermost_spans(clock):
    watch = MethodClock(clock)
    with watch("model"):
        clock.now += 1000
    with watch("method"):
        clock.now += 10
        with watch("model"):
            clock.now += 100
        clock.now += 1
    assert watch.total() == 11


def test_clock_of_the_host_measures_real_time():
    clock = clock_of(CPU)
    start = clock.mark()
    time.sleep(0.02)
    assert 20 <= clock.between(start, clock.mark()) < 2000


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_clock_of_a_gpu_sees_its_work():
    device = torch.device("cuda")
    square = torch.randn(4096, 4096, device=device)
    times = measure(lambda: [square @ square for _ in range(20)], device, warmup=3, repeats=3)
    assert min(times) > 2 * max(measure(lambda: square @ square, device, warmup=3, repeats=3))


def image():
    from hubdata import picture

    return picture("red")
