"""What ``generate`` may be asked for under pruning, and by how many threads."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from ..errors import InputError, VisibenchError

VIDEO = (
    "videos of {} go another way than its images and cannot be pruned: give the frames as images, or run the model "
    "outside prune()"
)

# Options of generate that pruning does not support: values that are fine besides None, and what to do.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "cache_implementation": (("dynamic",), "leave it unset; static, quantised, offloaded and sliding caches are not"),
    "prefill_chunk_size": ((), "leave it unset; a method chooses among all tokens of an image, with the prompt's last"),
    "penalty_alpha": ((0, 0.0), "contrastive search is not; use greedy search, sampling or beams"),
    "dola_layers": ((), "decoding by contrasting layers is not; use greedy search, sampling or beams"),
    "assistant_early_exit": ((), "give another model as assistant_model"),
    "use_mtp": ((False,), "give another model as assistant_model"),
    "custom_generate": ((), "use greedy search, sampling or beams"),
    "constraints": ((), "use greedy search, sampling or beams"),
    "force_words_ids": ((), "use greedy search, sampling or beams"),
    "num_beam_groups": ((1,), "use plain beam search"),
}
LOOKUP = "prompt_lookup_num_tokens"


@dataclass
class Generation:
    """A running call of ``generate``.

    ``assisted``: whether it checks proposals of an assistant. ``prompt``: tokens of each row in its first call of the
    model; 0 before that.
    """

    assisted: bool
    prompt: int = 0

    def next_call(self, tokens: int, kept: int, cache: Any) -> dict[str, Any]:
        """What the next call of the model, with so many new ``tokens`` and logits ``kept``, is in terms of ``Inputs``.

        Without a cache all tokens come again. The method decides about the prompt alone, as it did at first.
        """
        first, self.prompt = not self.prompt, self.prompt or tokens
        if self.assisted:
            return {"drafts": max(kept - 1, 0)}
        if cache is None:
            return {"drafts": max(tokens - self.prompt, 0)}
        return {"is_step": not first and tokens == 1}


class Turnstile:
    """Lets one thread at a time in, as often as it likes; refuses any other."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: int | None = None
        self._depth = 0

    def enter(self) -> None:
        """Go in, or raise if another thread is inside."""
        with self._lock:
            if self._thread not in (None, threading.get_ident()):
                raise VisibenchError(
                    "another thread is using this model inside the same prune() block: let one finish before the next "
                    "begins, or give each thread a model of its own"
                )
            self._thread, self._depth = threading.get_ident(), self._depth + 1

    def leave(self) -> None:
        """Go out once."""
        with self._lock:
            self._depth -= 1
            if not self._depth:
                self._thread = None


@contextmanager
def guarded(
    model: Any, around: Callable[[bool], AbstractContextManager[None]], check_videos: Callable[[], None]
) -> Iterator[None]:
    """While active, ``model.generate`` refuses what pruning does not support, before anything runs.

    ``around`` is entered for each call, and told whether an assistant's proposals are to be checked. ``check_videos``
    raises where they are not supported.
    """
    if not hasattr(model, "generate"):
        yield
        return
    instance_generate, generate = vars(model).get("generate"), model.generate

    @functools.wraps(generate)
    def checked(*args: Any, **kwargs: Any) -> Any:
        configs = (kwargs.get("generation_config") or (args[1] if len(args) > 1 else None), model.generation_config)
        if kwargs.get("pixel_values_videos") is not None:
            check_videos()
        check(kwargs, configs)
        with around(bool(_option("assistant_model", kwargs, ()) or _option(LOOKUP, kwargs, configs))):
            try:
                return generate(*args, **kwargs)
            except BaseException:
                if kwargs.get("streamer") is not None:  # or who reads from it would wait for ever
                    kwargs["streamer"].end()
                raise

    model.generate = checked
    try:
        yield
    finally:
        del model.generate
        if instance_generate is not None:
            model.generate = instance_generate


def check(kwargs: dict[str, Any], configs: tuple[Any, ...]) -> None:
    """Raise for options of ``generate`` that are not supported."""
    for name, (fine, remedy) in REFUSED.items():
        value = _option(name, kwargs, configs)
        if value is not None and value not in fine:
            raise InputError(f"generate({name}={value!r}) is not supported under prune(): {remedy}")


def _option(name: str, kwargs: dict[str, Any], configs: tuple[Any, ...]) -> Any:
    """What ``generate`` will take for an option: its own argument, else that of the first configuration with one."""
    values = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in values if value is not None), None)
