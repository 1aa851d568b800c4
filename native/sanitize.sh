#!/bin/sh
# Build the kernels with AddressSanitizer and UndefinedBehaviorSanitizer and run their tests; arguments go to pytest.
# Takes minutes: optimised, instrumented code of five instruction sets.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
build=${MIDL_SANITIZE_DIR:-$root/build/sanitize}
python=${PYTHON:-python}
cmake -S "$root" -B "$build" -DPython_EXECUTABLE="$(command -v "$python")" -DCMAKE_BUILD_TYPE=RelWithDebInfo \
  -DMIDL_SANITIZE=ON >/dev/null
cmake --build "$build" --parallel 2
export MIDL_NATIVE_BUILD="$(ls "$build"/native/_native*.so)"
export LD_PRELOAD="$(c++ -print-file-name=libasan.so):$(c++ -print-file-name=libubsan.so):$(c++ -print-file-name=libstdc++.so)"
# CPython keeps memory until exit, which is no leak of ours.
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
export PYTHONPATH="$root/native${PYTHONPATH:+:$PYTHONPATH}"
cd "$root"
exec "$python" -m pytest -p load_build -q "$@" tests/ops/test_native*.py
