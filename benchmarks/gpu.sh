#!/usr/bin/env bash
# Everything that issue "as fast as the machine allows" asks of a GPU, in one call.
#
#   benchmarks/gpu.sh [OUT]     results as JSON and text files in OUT (default: $OUT, or ./gpu-results)
#
# On a machine without network, put wheels of what is missing (pymoo, pydantic, ...) into ./wheels.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-${OUT:-gpu-results}}
mkdir -p "$out"
if [ -d wheels ]; then pip install --quiet --no-index --find-links wheels pymoo pydantic filelock; fi
python -c 'import torch; assert torch.cuda.is_available(), "no GPU that torch can use"' || exit 2

note() { echo "== $*"; }

note "fused and plain supernet, captured steps and training on this machine"
python -m pytest -q -n 0 tests/test_graphs.py tests/test_fused.py tests/test_training.py \
    >"$out/tests.txt" 2>&1
tail -n 2 "$out/tests.txt"

for precision in float32 bfloat16; do
    for batch in 64 256; do
        note "supernet step, $precision, batch $batch"
        python benchmarks/supernet.py --device cuda --json --batch "$batch" --rounds 5 \
            --precision "$precision" >"$out/supernet-$precision-b$batch.json" 2>"$out/supernet.log"
        cat "$out/supernet-$precision-b$batch.json"
    done
done

note "training of DARTS_V2, C=18, L=20, seconds an epoch of 50,000 images"
python benchmarks/training.py --device cuda --json >"$out/training.json" 2>"$out/training.log"
cat "$out/training.json"

note "where the time of a supernet step goes"
python benchmarks/supernet.py --device cuda --batch 64 --profile "$out/profile.txt"
head -n 30 "$out/profile.txt"

note "growth with cells, channels, ops, batch"
python benchmarks/supernet.py --device cuda --growth "$out/growth-gpu.png" | tee "$out/growth.txt"
