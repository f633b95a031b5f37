#!/usr/bin/env bash
# Everything that only a GPU can show, in under nine minutes on one H200 and without a network:
# kernels against the float32 reference, then attention, decoding and training against their peers.
#
#     bash benchmarks/gpu_suite.sh [FOLDER]      (results/ by default: one JSON and one log a part)
#
# A part that fails does not stop the others; the exit status tells whether all went well.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-results}
mkdir -p "$out"
python=${PYTHON:-python3}
failed=()

part() { # NAME SECONDS COMMAND…
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    echo "== $name"
    if ! timeout "$limit" "$@" 2>&1 | tee "$out/$name.log"; then
        failed+=("$name")
    fi
    echo "== $name: $((SECONDS - start)) s"
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/device.txt"
part correctness 150 "$python" -m benchmarks.correctness --out="$out/correctness.json"
part attention 130 "$python" -m benchmarks.attention --quick --out="$out/attention.json"
part decode 90 "$python" -m benchmarks.decode --quick --out="$out/decode.json"
part train 150 "$python" -m benchmarks.train_gpu --quick --out="$out/train.json"
if ((${#failed[@]})); then
    echo "failed: ${failed[*]}"
    exit 1
fi
echo "all parts went well in $SECONDS s"
