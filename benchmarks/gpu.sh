#!/usr/bin/env bash
# All that is to be checked and timed on a GPU, in one call; exit status 1 if a part failed.
#
#   benchmarks/gpu.sh [OUT]     results as JSON and text files in OUT (default: $OUT, or ./gpu-results)
#
# On a machine without network, put wheels of what is missing there into ./wheels, each with what it
# needs: pymoo, pydantic, plotly (19 MB for CPython 3.12, where torch, scipy, pytest and so on are there).
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-${OUT:-gpu-results}}
mkdir -p "$out"
failed=0

part() { # part NAME COMMAND...: standard output to NAME, errors beside it
    local name=$1
    shift
    echo "== $name: $*"
    if ! "$@" >"$out/$name" 2>"$out/$name.err"; then
        echo "FAILED: $name"
        tail -n 5 "$out/$name.err"
        failed=1
    fi
    tail -n 30 "$out/$name"
}

if [ -d wheels ]; then
    pip install --quiet --no-index --no-deps wheels/*.whl
fi
python -c 'import torch; assert torch.cuda.is_available(), "no GPU that torch can use"' || exit 2

part tests.txt env PYTHONPATH=. python -m pytest -q -n 0 \
    tests/test_graphs.py tests/test_strategies.py tests/test_fused.py tests/test_training.py
for precision in float32 bfloat16; do
    for batch in 64 256; do # ratios are against the textbook in float32
        part "supernet-$precision-b$batch.json" python benchmarks/supernet.py --device cuda --json \
            --batch "$batch" --rounds 5 --precision "$precision"
    done
done
part training.json python benchmarks/training.py --device cuda --networks DARTS_V2 --json # epochs of 50,000 images
part profile.log python benchmarks/supernet.py --device cuda --batch 64 --profile "$out/profile.txt"
part growth.txt python benchmarks/supernet.py --device cuda --growth "$out/growth-gpu.png"
exit "$failed"
