#!/usr/bin/env bash
# All GPU measurements in one command, most valuable first: benchmarks/gpu.sh [PART ...]
#
# Runs on a bare machine: packages that it lacks are installed from .whl (`make gpu-wheels`), nothing is downloaded.
# Each part has a time limit and its own process, and its results are written as soon as they exist. GPU_SMOKE=1 runs
# every part at toy size, also on a CPU. GPU_OUTPUT is the folder of the results, PYTHON the interpreter.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
output=${GPU_OUTPUT:-runs/gpu}
mkdir -p "$output"
export PYTHONPATH="$PWD:$PWD/plugins/longalign-siglip:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export CUBLAS_WORKSPACE_CONFIG=:4096:8 PYTORCH_ALLOC_CONF=expandable_segments:True

if ! $python -c "import catalogue, diffusers, open_clip, pydantic" 2>"$output/import.txt"; then
    site=$(mktemp -d)
    $python -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" .whl/*.whl || exit 1
    export PYTHONPATH="$site:$PYTHONPATH"
fi
# parts are found through the entry points of an installed package
$python -c "from longalign.registry import rewards; rewards.info('clip')" 2>>"$output/import.txt" ||
    $python -m pip install -q --no-index --no-deps --no-build-isolation -e . -e plugins/longalign-siglip || exit 1

run() { # part, seconds, command
    echo "== $1"
    local start=$SECONDS
    timeout -k 5 "$(($2 * ${GPU_SMOKE:+10 *} 1))" "${@:3}" >"$output/$1.log" 2>&1
    local status=$?
    tail -n "${GPU_LINES:-25}" "$output/$1.log"
    echo "== $1: exit status $status after $((SECONDS - start)) s"
    [ $status = 0 ] || failed="$failed $1"
}

failed=""
# most valuable first; the limits add up to eight minutes
declare -A limits=([peak]=15 [reward]=100 [tests]=90 [calls]=40 [encode]=30 [sdxl]=65 [profile]=20 [compiled]=75 [demo]=45)
for part in ${@:-peak reward tests calls encode sdxl profile compiled demo}; do
    case $part in
    tests) run tests "${limits[tests]}" $python -m pytest -q -W default -p no:cacheprovider -m gpu tests/test_gpu.py ;;
    *) run "$part" "${limits[$part]}" $python benchmarks/_gpu.py "$part" --output "$output" ;;
    esac
done
$python benchmarks/_gpu.py report --output "$output" || failed="$failed report"
[ -z "$failed" ] || { echo "failed:$failed" && exit 1; }
