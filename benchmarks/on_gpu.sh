#!/usr/bin/env bash
# What a GPU can say, in about ten minutes: its tests, and the suite "gpu". Results go to the folder given.
#   benchmarks/on_gpu.sh build/gpu
# Needs an environment with a CUDA build of torch, crosstrim, pytest, hypothesis and accelerate.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?give a folder for the results}
mkdir -p "$out"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}"

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/card.csv"
timeout 200 python -m pytest --disable-warnings -q tests/gpu 2>&1 | tee "$out/tests.log"
tests=$?
timeout 390 python -m crosstrim bench gpu --out "$out/gpu.json" 2>&1 | tee "$out/bench.log"
bench=$?
echo "tests ended with $tests, bench with $bench"
exit $((tests + bench))
