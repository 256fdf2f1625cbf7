#!/usr/bin/env bash
# One script for a bare machine with a GPU, torch (2.10 or later), nvcc, cmake, ninja, pybind11 and
# pytest: builds the package in place, runs the GPU suite and the sanitizer, and measures every
# operator and detection end to end. Under ten minutes. Nothing is downloaded or installed.
#
#   bash benchmarks/gpu/run.sh [OUT]     OUT: where results go (default benchmarks/results)
#   DRY_RUN=1 bash benchmarks/gpu/run.sh every step on CPU tensors and tiny shapes, no GPU
set -uo pipefail
cd "$(dirname "$0")/../.."
OUT=$(realpath -m "${1:-benchmarks/results}")
PYTHON=${PYTHON:-python3}
DRY=${DRY_RUN:-}
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false GRADSAFE_CUDA=on
failed=()

step() { # name, limit in seconds, command: a failure is reported at the end, the rest still runs
  local name=$1 limit=$2; shift 2
  echo "=== $name ($(date +%T))"
  timeout "$limit" "$@" 2>&1 | tee "$OUT/$name.log" | tail -n 40
  local code=${PIPESTATUS[0]}
  [ "$code" -eq 0 ] || failed+=("$name: exit $code")
}

if [ -z "$DRY" ]; then
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
  export GRADSAFE_CUDA_ARCHS=${GRADSAFE_CUDA_ARCHS:-90-real}
  step build 240 "$PYTHON" setup.py -q build_ext --inplace
  step suite 150 "$PYTHON" -m pytest tests/gpu -q -p no:cacheprovider
  if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck synccheck initcheck; do
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "sanitizer_$tool" 90 \
        compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" tests/gpu/sanitize.py
    done
  else
    echo "compute-sanitizer: not on this machine, SKIPPED"
  fi
  step operators 150 "$PYTHON" -m benchmarks.run --device cuda --out "$OUT"
  step detection 150 "$PYTHON" -m benchmarks.bench_detection --size 7B --tokens 100 \
    --dtype bfloat16 --device cuda --out "$OUT"
else
  step build 900 "$PYTHON" setup.py -q build_ext --inplace
  step suite 150 "$PYTHON" -m pytest tests/gpu -q -p no:cacheprovider
  step operators 150 "$PYTHON" -m benchmarks.run --dry-run
  step detection 300 "$PYTHON" -m benchmarks.bench_detection --size tiny --tokens 8 --out "$OUT"
fi

"$PYTHON" -c "import matplotlib" 2> /dev/null && step plots 60 "$PYTHON" -m benchmarks.plot "$OUT"

echo "=== results in $OUT"
ls -l "$OUT"
if [ ${#failed[@]} -gt 0 ]; then
  printf 'FAILED %s\n' "${failed[@]}"
  exit 1
fi
echo "all steps passed"
