#!/usr/bin/env bash
# The first hour on a machine with a GPU: what has only been compiled and pretended runs there for the first time.
#
#   scripts/first_gpu.sh wheels            # here, with a network: what the machine lacks, into build/gpu_wheels
#   scripts/first_gpu.sh STEP [FOLDER]     # there, without one: a step, or `all`; results go to FOLDER (out/first_gpu)
#
# Steps: bring build test memcheck racecheck ops model. Each takes less than ten minutes, and one that fails stops none
# that comes after it: FOLDER/STEP.log says what was seen, FOLDER/steps.tsv how each ended and how long it took. The
# machine needs a torch for CUDA, transformers, nvcc (13.0 or newer), a C++ compiler and Python 3.11 or newer.
set -u -o pipefail
cd "$(dirname "$0")/.."
python=${GPU_PYTHON:-python3}
wheels=build/gpu_wheels
out=${2:-out/first_gpu}

# What trimserve, its tests and its benchmarks import beside torch and transformers.
needed() {
  sed -n 's/^  "\(numpy\|pillow\|jinja2\|pydantic\|safetensors\|tokenizers\|huggingface-hub\|llguidance\|prometheus-client\|structlog\|rich\|typer\)\([^"]*\)".*/\1\2/p' pyproject.toml
  sed -n 's/^  "\(hypothesis\|pytest\|pytest-asyncio\|pytest-timeout\)\(==[^"]*\)".*/\1\2/p' pyproject.toml
  sed -n 's/^build = \[\(.*\)\]/\1/p' pyproject.toml | tr -d '" ' | tr ',' '\n' | grep -v scikit-build
}

fetch_wheels() {
  mkdir -p "$wheels"
  local version
  for version in ${GPU_PYTHON_VERSIONS:-3.11 3.12 3.13}; do
    needed | xargs "$python" -m pip download --quiet --dest "$wheels" --only-binary :all: --python-version "$version" \
      --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 || return 1
  done
  echo "$wheels: $(ls "$wheels" | wc -l) wheels; take the folder along with the tree"
}

bring() {
  needed | xargs "$python" -m pip install --quiet --no-index --find-links "$wheels" --upgrade-strategy only-if-needed
}

build() { make build/gpu/.built GPU_PYTHON="$python"; }

test_all() { make test-gpu GPU_PYTHON="$python"; }

sanitize() { # tool
  local few=(tests/ops/test_write_kv.py tests/ops/test_paged_attention.py tests/ops/test_headwise_scores.py
    tests/ops/test_headwise_topk.py tests/ops/test_select_features.py tests/ops/test_union_indices.py tests/ops/test_rows.py
    tests/ops/test_rotate_write_kv.py)
  compute-sanitizer --tool "$1" --error-exitcode 9 --target-processes all "$python" -m pytest -c /dev/null --rootdir . \
    -o pythonpath=. --import-mode importlib -p no:cacheprovider -q --device cuda --hypothesis-profile few "${few[@]}"
}

ops() { "$python" -m benchmarks.bench_ops --device cuda --out "$out"; }

model() { "$python" -m benchmarks.bench_gpu --seconds 0.5 --out "$out/gpu.json"; }

step() { # name, command...
  local name=$1 began=$SECONDS status=0
  shift
  mkdir -p "$out"
  "$@" 2>&1 | tee "$out/$name.log" || status=$?
  printf '%s\t%s\t%s s\n' "$name" "$status" "$((SECONDS - began))" | tee -a "$out/steps.tsv"
  return "$status"
}

run() { # step
  case $1 in
    bring) step bring bring ;;
    build) step build build ;;
    test) step test test_all ;;
    memcheck | racecheck) step "$1" sanitize "$1" ;;
    ops) step ops ops ;;
    model) step model model ;;
    *) echo "no step $1; there are: wheels bring build test memcheck racecheck ops model all" >&2 && return 2 ;;
  esac
}

case ${1:-} in
  needed) needed ;;
  wheels) fetch_wheels ;;
  all)
    failed=0
    for each in bring build test memcheck racecheck ops model; do run "$each" || failed=1; done
    exit "$failed"
    ;;
  '') sed -n '2,10s/^# \{0,1\}//p' "$0" && exit 2 ;;
  *) run "$1" ;;
esac
