#!/usr/bin/env bash
# Build a wheel, install it in an environment without any development tool, and answer a question with it.
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir "$work" .
python -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --require-hashes --no-deps --requirement requirements/serve.txt
"$work/venv/bin/pip" install --quiet "torch==$(python -c 'import torch; print(torch.__version__.split("+")[0])')"
"$work/venv/bin/pip" install --quiet --no-deps "$work"/*.whl
cd "$work"
"$work/venv/bin/trimserve" info --json
"$work/venv/bin/trimserve" generate --prompt "Hello" --json
echo "wheel: answers from an environment of its own"
