#!/usr/bin/env bash
# Build the ops with AddressSanitizer and UndefinedBehaviorSanitizer and run their tests, for every width of vectors.
set -euo pipefail
cd "$(dirname "$0")/../.."
work=out/sanitize
rm -rf "$work"
python -m pip install --quiet --no-build-isolation --no-deps --target "$work" \
  --config-settings build-dir=build/sanitize --config-settings cmake.define.TRIMSERVE_SANITIZE=ON .
cp -r tests pyproject.toml "$work"
# An environment of its own: the usual one imports the usual build, wherever it is started.
python -m venv --without-pip "$work/venv"
packages=$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
python -c 'import sys; print(*(path for path in sys.path if path.endswith("site-packages")), sep="\n")' > "$packages/tools.pth"
cd "$work"
# Python and torch are not instrumented: the sanitizers come first by preloading, and leaks of theirs do not count.
LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
  venv/bin/python -m pytest tests/ops
echo "sanitize: the tests of the ops run clean"
