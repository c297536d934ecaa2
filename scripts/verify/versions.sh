#!/usr/bin/env bash
# Run the tests with the wheel and other releases of what it needs, in an environment of their own.
#
# Usage: scripts/verify/versions.sh floor|newest [PYTEST ARGUMENT ...]; make test-floor and make test-newest call it.
# floor: requirements/floor.txt, the oldest that pyproject.toml allows. newest: what is newest today, within its ranges.
# torch is $TORCH in both: other builds of it are gigabytes, and the ops' stable ABI is made for several.
set -euo pipefail
cd "$(dirname "$0")/../.."
which=$1
shift
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if [ "$which" = newest ]; then
  requirements=$work/newest.txt
  python -m scripts.generate.lock --newest "$requirements"
else
  requirements=requirements/floor.txt
fi
python -m venv "$work/venv"
pip=("$work/venv/bin/python" -m pip --disable-pip-version-check install --quiet)
"${pip[@]}" --require-hashes --no-deps --requirement "$requirements"
"${pip[@]}" "$TORCH"
python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir "$work" .
"${pip[@]}" --no-deps "$work"/*.whl

# The tests find the repository around them, but trimserve is the one that was installed.
mkdir "$work/tree"
git ls-files -z | grep -zv '^trimserve/' | tar --create --null --files-from - | tar --extract --directory "$work/tree"
ln -s "$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/trimserve" "$work/tree"
cd "$work/tree"
"$work/venv/bin/python" -m pytest -p no:cacheprovider "$@"
