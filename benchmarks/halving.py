"""Whether a batch that does not fit into memory is answered in halves, with the answers that it has whole.

    python benchmarks/halving.py [--device cuda] [--batch-size 16]

On a GPU, torch is allowed less memory than the whole batch took, and more than a half needs. On a CPU, where Linux
would end the process, the model raises what torch raises there for batches above a half: a rehearsal of all the rest.
Exit code 1 if a question fails, an answer differs, or nothing was halved.
"""

import argparse
from contextlib import contextmanager
from typing import Any

import torch
import visibench
from visibench.evals.answers.score import evaluate
from visibench.evals.tasks.tasks import load_tasks
from visibench.models.load import release


@contextmanager
def less_memory(model: Any, rows: int, peak: int, held: int) -> Any:
    """Too little for ``rows`` at once, which took ``peak`` bytes, ``held`` of them for good."""
    if model.device.type == "cuda":
        release()
        total = torch.cuda.get_device_properties(model.device).total_memory
        torch.cuda.set_per_process_memory_fraction((held + 0.7 * (peak - held)) / total, model.device)
        yield
        torch.cuda.set_per_process_memory_fraction(1.0, model.device)
        return

    def refuse(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if len(kwargs["input_ids"]) > rows // 2:
            raise torch.OutOfMemoryError("rehearsed")

    hook = model.register_forward_pre_hook(refuse, with_kwargs=True)
    yield
    hook.remove()


def main() -> None:
    """Answer twice, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch-size", type=int, default=16)
    given = parser.parse_args()
    loaded, (task,) = visibench.load_model("tiny", device=given.device, dtype="float32"), load_tasks(["gqa"])
    method, size, cuda = visibench.load_method("fastv", keep=0.5), given.batch_size, given.device != "cpu"
    held = torch.cuda.memory_reserved() if cuda else 0
    whole = evaluate(loaded, method, task, limit=2 * size, batch_size=size)
    with less_memory(loaded.model, size, torch.cuda.max_memory_reserved() if cuda else 0, held):
        parts = evaluate(loaded, method, task, limit=2 * size, batch_size=size)
    print("\n".join(parts.outcome.remarks) or "no batch was halved")
    one, other = (result.samples.set_index("doc_id")["output"] for result in (whole, parts))
    differ = int((one != other[one.index]).sum())
    print(f"{len(one)} questions, {differ} answers differ")
    raise SystemExit(bool(differ or not parts.outcome.remarks))


if __name__ == "__main__":
    main()
