#!/usr/bin/env bash
# Builds, tests and measures on a bare machine with a GPU, in under ten minutes; see drive.py.
#
#   GRADSAFE_COMMIT=abc1234 bash benchmarks/gpu/run.sh OUT        everything
#   bash benchmarks/gpu/run.sh OUT --only wgrad,moments           some steps (--list shows all)
#   bash benchmarks/gpu/run.sh OUT --skip-done                    go on after a stopped run
#   DRY_RUN=1 bash benchmarks/gpu/run.sh OUT                      tiny shapes on the CPU
cd "$(dirname "$0")/../.." || exit 2
exec "${PYTHON:-python3}" benchmarks/gpu/drive.py "$@"
