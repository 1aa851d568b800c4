#!/bin/sh
# The kernels under AddressSanitizer and UndefinedBehaviorSanitizer: the self test, or with `pytest` (and arguments for it)
# their Python tests, which go further and take ten times as long.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
build=${MIDL_SANITIZE_DIR:-$root/build/sanitize}
export UBSAN_OPTIONS=print_stacktrace=1
if [ "${1:-}" != pytest ]; then
  cmake -S "$root" -B "$build-selftest" -DMIDL_SANITIZE=ON -DMIDL_SELFTEST=ON >/dev/null
  cmake --build "$build-selftest" --parallel 2 >/dev/null
  exec "$build-selftest/native/selftest" "$@"
fi
shift
python=${PYTHON:-python}
cmake -S "$root" -B "$build" -DPython_EXECUTABLE="$(command -v "$python")" -DMIDL_SANITIZE=ON >/dev/null
cmake --build "$build" --parallel 2
export MIDL_NATIVE_BUILD="$(ls "$build"/native/_native*.so)"
export LD_PRELOAD="$(c++ -print-file-name=libasan.so):$(c++ -print-file-name=libubsan.so):$(c++ -print-file-name=libstdc++.so)"
# CPython keeps memory until exit, which is no leak of ours.
export ASAN_OPTIONS=detect_leaks=0
export PYTHONPATH="$root/native${PYTHONPATH:+:$PYTHONPATH}"
cd "$root"
exec "$python" -m pytest -p load_build -q "$@" tests/ops/test_native*.py
