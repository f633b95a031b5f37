#!/usr/bin/env bash
# GPU suite: kernels against float64, then attention, decoding and training against their peers,
# then the performance targets. Takes under nine minutes on one H200 and needs no network.
#
#     bash benchmarks/gpu_suite.sh [FOLDER]
#
# Writes FOLDER/suite.log and one JSON file per part; FOLDER is results/ by default. PYTHON selects
# the interpreter. A part that fails or exceeds its time limit keeps the rows it has saved, and the
# next part runs. Within a part, a kernel that hangs or crashes loses one row. The exit status is 0
# if all parts succeeded; a missed target is not an error.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
out=${1:-results}
mkdir -p "$out"
python=${PYTHON:-python3}
total_seconds=525
export PYTHONUNBUFFERED=1
failed=()

run_part() { # NAME SECONDS COMMAND…
    local name=$1 limit=$2 start=$SECONDS status=0
    shift 2
    echo "== $name"
    timeout --kill-after=5 "$limit" "$@" --out="$out/$name.json" || status=$?
    ((status == 0)) || failed+=("$name")
    ((status != 124 && status != 137)) || echo "$name: exceeded its time limit of $limit s"
    echo "== $name: $((SECONDS - start)) s"
}

run_suite() {
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    # Correctness alone lets several processes share the GPU: nothing is timed there.
    XLA_PYTHON_CLIENT_PREALLOCATE=false run_part correctness 110 "$python" \
        -m benchmarks.correctness --implementations=pallas_gpu,cudnn --row_seconds=60 --processes=4
    run_part attention 150 "$python" -m benchmarks.attention --quick --row-seconds=60
    run_part decode 90 "$python" -m benchmarks.decode --quick --row_seconds=60
    left=$((total_seconds - SECONDS))
    run_part train "$left" "$python" -m benchmarks.train_gpu --quick --seconds=$((left - 10))
    "$python" -m benchmarks.targets "$out"
    if ((${#failed[@]})); then
        echo "failed: ${failed[*]}"
        return 1
    fi
    echo "all parts succeeded in $SECONDS s"
}

run_suite 2>&1 | tee "$out/suite.log"
exit "${PIPESTATUS[0]}"
