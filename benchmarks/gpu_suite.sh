#!/usr/bin/env bash
# Everything that only a GPU can show, in under nine minutes on one H200 and without a network:
# kernels against float64, then attention, decoding and training against their peers, and at the end
# what was wanted beside what was found.
#
#     bash benchmarks/gpu_suite.sh [FOLDER]      (results/ by default: suite.log, one JSON a part)
#
# A part that fails or runs out of time keeps the rows it had and does not stop the others; in a
# part, a kernel that hangs or crashes loses its row alone. The exit status tells whether all went
# well; a bar that is missed is no failure.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
out=${1:-results}
mkdir -p "$out"
python=${PYTHON:-python3}
seconds=525
export PYTHONUNBUFFERED=1
failed=()

part() { # NAME SECONDS COMMAND…
    local name=$1 limit=$2 start=$SECONDS status=0
    shift 2
    echo "== $name"
    timeout --kill-after=5 "$limit" "$@" --out="$out/$name.json" || status=$?
    ((status == 0)) || failed+=("$name")
    ((status != 124 && status != 137)) || echo "$name: out of time"
    echo "== $name: $((SECONDS - start)) s"
}

suite() {
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    # Only correctness may share the GPU among processes: nothing is timed there.
    XLA_PYTHON_CLIENT_PREALLOCATE=false part correctness 110 "$python" -m benchmarks.correctness \
        --implementations=pallas_gpu,cudnn --row_seconds=60 --processes=4
    part attention 150 "$python" -m benchmarks.attention --quick --row-seconds=60
    part decode 90 "$python" -m benchmarks.decode --quick --row_seconds=60
    left=$((seconds - SECONDS))
    part train "$left" "$python" -m benchmarks.train_gpu --quick --seconds=$((left - 10))
    "$python" -m benchmarks.targets "$out"
    if ((${#failed[@]})); then
        echo "failed: ${failed[*]}"
        return 1
    fi
    echo "all parts went well in $SECONDS s"
}

suite 2>&1 | tee "$out/suite.log"
exit "${PIPESTATUS[0]}"
