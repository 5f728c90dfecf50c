#!/usr/bin/env bash
# What only a GPU can show, in under ten minutes on one of 80 GB: CUDA tests, LLaVA-1.5-7B in time, memory and waits,
# flash attention, and what a batch that does not fit comes to.
#
#     benchmarks/gpu.sh                           on the machine with the GPU, in the repository's root
#     benchmarks/gpu.sh --device cpu              the same steps on a CPU, with a small model: a rehearsal
#
# The machine needs torch and transformers, and keeps those that it has. What else is missing is taken from ./wheels,
# without a network; made elsewhere, for its Python: `pip wheel -c constraints.txt -w wheels . pytest pytest-timeout`.
# Each step has its own limit, and a failed one does not end the run: what failed is listed at the end, and the exit code
# is 1. Results: results/measured/*_<hardware>_*.json and .txt; the logs of all steps in $OUT (default: build/gpu).
set -u
cd "$(dirname "$0")/.."
DEVICE=cuda OUT=${OUT:-build/gpu}
[ "${1:-}" = --device ] && DEVICE=$2
mkdir -p "$OUT" results/measured && OUT=$(cd "$OUT" && pwd)
export PYTHONUNBUFFERED=1
failed=()

step() { # name, seconds, command …
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    echo "== $name"
    if timeout "$limit" "$@" >"$OUT/$name.log" 2>&1; then echo "   done in $((SECONDS - start)) s"; else
        failed+=("$name: exit $? after $((SECONDS - start)) s, see $OUT/$name.log")
        tail -n 5 "$OUT/$name.log" | sed 's/^/   /'
    fi
}

if [ -d wheels ]; then
    missing=$(python -c 'import sys
from importlib.metadata import distributions
there = {one.name.lower().replace("-", "_").replace(".", "_") for one in distributions()}
print(*(wheel for wheel in sys.argv[1:] if wheel.split("/")[-1].split("-")[0].lower().replace(".", "_") not in there))
' wheels/*.whl)
    [ -z "$missing" ] || step install 120 python -m pip install --no-index --no-deps $missing
fi
python -c 'import visibench' 2>/dev/null || export PYTHONPATH="$OUT/path"
mkdir -p "$OUT/path" && ln -sfn "$PWD" "$OUT/path/visibench"
HARDWARE=$(python -c 'import re, sys, torch
name = torch.cuda.get_device_name() if sys.argv[1] == "cuda" else "cpu"
print(re.sub(r"\W+", "-", name.lower()) + "_torch" + torch.__version__.split("+")[0])' "$DEVICE") || exit 1
RESULTS=results/measured
[ "$DEVICE" = cpu ] && RESULTS=$OUT # a rehearsal is no result
measured() { echo "$RESULTS/$1_$HARDWARE"; }

if [ "$DEVICE" = cuda ]; then
    profile=(profile_7b --repeats 10) flash=(profile_7b --batch-sizes 1 --repeats 10 --attention flash_attention_2)
else
    small=(profile_7b --device cpu --model llava-cpu --layers 2 --repeats 1 --warmup 0 --lengths 8/576/2)
    small+=(--method fastv:keep=0.5,layer=1)
    profile=("${small[@]}" --batch-sizes 1,2) flash=("${small[@]}" --batch-sizes 1 --attention eager)
fi

step tests 150 python -m pytest -q -p no:cacheprovider tests/engine/test_syncs.py tests/evals/test_timing.py \
    tests/evals/test_profile.py
step profile 240 python -m visibench profile "${profile[@]}" --out "$(measured profile_7b).json"
cp "$OUT/profile.log" "$(measured profile_7b).txt"
step launches 60 python benchmarks/launches.py --batch 1
step halving 60 python benchmarks/halving.py --device "$DEVICE"
step flash 90 python -m visibench profile "${flash[@]}" --out "$(measured profile_7b_flash).json"

cat "$OUT/profile.log"
echo "== took $SECONDS s on $HARDWARE"
if [ ${#failed[@]} -gt 0 ]; then printf 'FAILED %s\n' "${failed[@]}" && exit 1; fi
echo "nothing failed"
