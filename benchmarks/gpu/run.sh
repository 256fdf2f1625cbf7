#!/usr/bin/env bash
# Builds, tests and measures on a new machine with a GPU in less than ten minutes; see drive.py.
#
#   GRADSAFE_COMMIT=abc1234 bash benchmarks/gpu/run.sh OUT        everything
#   bash benchmarks/gpu/run.sh OUT --only wgrad,moments           selected steps (--list prints all)
#   bash benchmarks/gpu/run.sh OUT --skip-done                    continue an interrupted run
#   DRY_RUN=1 bash benchmarks/gpu/run.sh OUT                      tiny shapes on the CPU
cd "$(dirname "$0")/../.." || exit 2
exec "${PYTHON:-python3}" benchmarks/gpu/drive.py "$@"
