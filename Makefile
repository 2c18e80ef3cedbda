# `make demo` and `make test` set up what they need, in .venv: the pinned packages and the build. Done once, both are
# done again only when what they depend on has changed.
#
#   make demo ARGS="--world-size 3"        make test ARGS="-k faults"        make bench ARGS="rs_rmsnorm --world-size 4"
#   make PYTHON=python3.12 test            TP_FUSED_CUDA=0 make build        (see setup.py)
#   make wheel WHEELS=/tmp

PYTHON ?= python3
ARGS ?=
WHEELS ?= dist
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)
CPP := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
# The build calls cmake and ninja by name.
$(VENV)/built wheel: export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: FORCE help demo test test-sglang test-vllm soak fuzz bench build docs wheel format lint clean
.PHONY: gpu-build gpu-demo gpu-test gpu-soak gpu-sanitize gpu-bench gpu-multi

help:
	@echo "make demo          a small DeepSeek-V3 on 4 ranks, as engines run it today and with scattered rows"
	@echo "make test          the tests, without a GPU          ARGS=\"-k faults\""
	@echo "make test-sglang   the SGLang plugin on the code of SGLang 0.5.6 and 0.5.23"
	@echo "make test-vllm     the vLLM plugin in vLLM's engine, on CPU ranks"
	@echo "make bench         a benchmark                       ARGS=\"rs_rmsnorm --world-size 4\""
	@echo "make soak          random calls, all compared        ARGS=\"--world-size 2 3 8 --calls 20000\""
	@echo "make fuzz          the C API under AddressSanitizer  ARGS=\"-max_total_time=600\""
	@echo "make docs          the documents as a site, in site/"
	@echo "make wheel         a wheel in dist/, to install on another machine"
	@echo "make lint, format  the style of the code, its types"
	@echo
	@echo "On a machine with GPUs, with its own Python, torch and nvcc:"
	@echo "make gpu-demo, gpu-test, gpu-soak, gpu-sanitize, gpu-bench; gpu-multi with several GPUs"
	@echo
	@echo "python -m tp_fused doctor tells what this machine can run."

demo: build
	tools/with_mps.sh $(BIN)/python examples/deepseek_v3_prefill.py $(ARGS)

# Two files of tests at a time, in their order: much of what tests do is wait. WORKERS=0: one after the other.
WORKERS ?= 2
test: build
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

# The SGLang plugin against SGLang's own code, of both releases: 40 MB and 220 MB, and 100 MB beside them, once.
SGLANG_FOLDERS := build/engines/sglang-0.5.6 build/engines/sglang-0.5.23
test-sglang: build build/engines/requirements $(SGLANG_FOLDERS)
	$(BIN)/python -m pytest tests/engines/test_sglang.py $(ARGS)

INSTALL_ALONE := -m pip install --quiet --disable-pip-version-check --no-deps
build/engines/sglang-%: | $(VENV)/packages
	$(BIN)/python $(INSTALL_ALONE) --target $@ sglang==$*

build/engines/requirements: tests/engines/sglang-requirements.txt | $(VENV)/packages
	$(BIN)/python $(INSTALL_ALONE) --upgrade --target $@ --requirement $<
	touch $@

# The vLLM plugin in a real engine on two CPU ranks, and on vLLM's own layers of DeepSeek-V3.2: 1.1 GB, once, in a folder
# of its own. For x86-64.
test-vllm: build build/engines/vllm
	$(BIN)/python -m pytest tests/engines/test_vllm.py tests/engines/test_vllm_sequence_parallel.py $(ARGS)

build/engines/vllm: tests/engines/vllm-requirements.txt tests/engines/vllm-engine.txt | $(VENV)/packages
	rm -rf $@ $@.part
	$(BIN)/python $(INSTALL_ALONE) --target $@.part --requirement tests/engines/vllm-requirements.txt
	$(BIN)/python $(INSTALL_ALONE) --target $@.part --upgrade --require-hashes --requirement tests/engines/vllm-engine.txt
	mv $@.part $@

# Random calls for as long as asked: make soak ARGS="--world-size 2 3 8 --calls 20000"
soak: build
	$(BIN)/python -m tools.soak $(ARGS)

# The C API on random calls, for a minute or as long as asked: make fuzz ARGS="-max_total_time=600 -seed=1"
# libFuzzer chooses them where clang++ has one, else random numbers.
fuzz: build/fuzz/fuzz_c_api
	$< -max_total_time=60 -max_len=256 -len_control=0 $(ARGS)

FUZZED := $(wildcard csrc/cpu/*.cpp csrc/plan/*.cpp) tests/cpp/fuzz_c_api.cpp
FUZZ_FLAGS := -std=c++20 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined -ffp-contract=off -Icsrc \
  $(if $(filter x86_64,$(shell uname -m)),-march=x86-64-v3)
build/fuzz/fuzz_c_api: $(FUZZED) $(wildcard csrc/*.h csrc/cpu/*.h csrc/plan/*.h tests/cpp/fuzz_*.h)
	mkdir -p $(@D)
	clang++ $(FUZZ_FLAGS) -fsanitize=fuzzer -DTPF_LIBFUZZER $(FUZZED) -lrt -o $@ || \
	  $(CXX) $(FUZZ_FLAGS) $(FUZZED) -pthread -lrt -o $@

bench: build
	$(BIN)/python -m bench $(ARGS)

# On a machine with GPUs: its own Python, torch and nvcc; the build lands beside the sources.
gpu-build:
	TP_FUSED_CUDA=1 $(PYTHON) setup.py --quiet build_ext --inplace

gpu-demo: gpu-build
	PYTHONPATH=$(CURDIR) tools/with_mps.sh $(PYTHON) examples/deepseek_v3_prefill.py $(ARGS)

gpu-test: gpu-build
	tools/with_mps.sh $(PYTHON) -m pytest --device cuda $(ARGS)

gpu-soak: gpu-build
	tools/with_mps.sh $(PYTHON) -m tools.soak --device cuda $(ARGS)

# Of a build in which racecheck can follow all arrivals (kArrivingLanes); `make gpu-build` brings the usual one back.
gpu-sanitize:
	TP_FUSED_CUDA=1 NVCC_APPEND_FLAGS=-DTPF_RACECHECK \
	  $(PYTHON) setup.py --quiet build_ext --inplace --build-temp build/racecheck
	$(PYTHON) tools/sanitize.py

gpu-bench: gpu-build
	tools/with_mps.sh $(PYTHON) -m bench goals $(ARGS)

# On a machine with two GPUs or more, a rank on each.
gpu-multi: gpu-build
	$(PYTHON) -m bench multi $(ARGS)

build: $(VENV)/built

# An editable install in effect, but one that keeps its build folder and compiles again only what has changed.
$(VENV)/built: $(VENV)/packages $(VENV)/asked $(SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace --build-temp build/make
	$(BIN)/python -c "import pathlib, sysconfig; \
	  pathlib.Path(sysconfig.get_path('purelib'), 'tp_fused.pth').write_text('$(CURDIR)')"
	touch $@

# For this Python, and for machines whose glibc and libstdc++ are as new as this one's: the hosted workflow
# (.github/workflows/wheels.yml) builds those for older ones. Modules that have gone since the last wheel are not packed.
wheel: $(VENV)/packages
	rm -rf build/lib.* build/bdist.*
	$(BIN)/python -m pip wheel . --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir $(WHEELS)
	@ls -l $(WHEELS)/*.whl

# What was asked of the build: where that changes, it is built again.
ASKED := TP_FUSED_CUDA=$(TP_FUSED_CUDA) TP_FUSED_CUDA_ARCHITECTURES=$(TP_FUSED_CUDA_ARCHITECTURES)
$(VENV)/asked: $(VENV)/packages FORCE
	@echo '$(ASKED)' | cmp -s - $@ || echo '$(ASKED)' > $@

$(VENV)/packages: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed") if sys.version_info < (3, 10) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the pinned packages of requirements.txt into $(VENV): about 2 GB, once"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	touch $@

# The site of docs/, in site/; a warning is an error. Its packages have a venv of their own: it needs no torch.
DOCS_VENV := .venv-docs
docs: $(DOCS_VENV)/packages
	@NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict --quiet
	@echo "site/index.html"

$(DOCS_VENV)/packages: docs/requirements.txt
	@echo "installing the pinned packages of $< into $(DOCS_VENV), once"
	@test -x $(DOCS_VENV)/bin/python || $(PYTHON) -m venv $(DOCS_VENV)
	@$(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

lint: $(VENV)/packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@echo "$(BIN)/clang-format --dry-run --Werror ..."; $(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/basedpyright --project pyproject.toml

format: $(VENV)/packages
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf $(VENV) $(DOCS_VENV) site build dist *.egg-info tp_fused/*.so .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
