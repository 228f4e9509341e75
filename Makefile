# `make demo` and `make test` set everything up in .venv by themselves; a second run installs nothing.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
READY := .venv/.built
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)
export TOKENIZERS_PARALLELISM := false
unexport PYTHONDONTWRITEBYTECODE  # tests start many processes, and each would compile the package again

.PHONY: demo test quick check test-full ENGINES SERVERS OTHERS test-vllm lint format wheel asan triton36
.PHONY: bench-op bench-generate bench-pair bench-sweep bench-serve bench-attack bench-zeroing bench-report bench-reproduce readme gpu-check clean

demo: $(READY)
	$(BIN)/snpatch demo

# Tests run on one thread each: three groups at once, because engines, servers and killed processes are often waited
# for, and lint.
TESTS := $(sort $(wildcard tests/test_*.py tests/*/test_*.py tests/*/*/test_*.py))
ENGINES := $(filter tests/op/% tests/executors/% tests/engine/% tests/judges/%,$(TESTS))
SERVERS := $(filter tests/server/% tests/experiments/% tests/cli/% tests/integrations/%,$(TESTS))
OTHERS := $(filter-out $(ENGINES) $(SERVERS),$(TESTS))
ALL := @$(MAKE) --no-print-directory -j4 --keep-going --output-sync ENGINES SERVERS OTHERS lint

test: $(READY)
	$(ALL) SELECT='not full'

# Tests without vLLM engines; `quick` also skips tests that take seconds.
check: $(READY)
	$(ALL) SELECT='not full and not engine'

quick: $(READY)
	$(ALL) SELECT='not full and not engine and not slow'

# Also whole grids, long fuzz runs and rehearsals, with coverage.
test-full: lint
	$(BIN)/python -m pytest --durations=25 --cov=snpatch --cov-report=term:skip-covered

ENGINES SERVERS OTHERS: $(READY)
	$(BIN)/python -m pytest --durations=25 -m "$(SELECT)" $($@)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell snpatch bench kernels csrc .ci tests *.md
	$(BIN)/deptry . --no-ansi
	$(BIN)/lint-imports
	$(BIN)/basedpyright --level error

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A wheel with the C++ kernels and an sdist, in dist/. Not isolated: the kernels are compiled against .venv's PyTorch.
wheel: $(READY)
	$(BIN)/python -m build --no-isolation

$(READY): $(INSTALLED) $(wildcard csrc/*)
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

$(INSTALLED): pyproject.toml setup.py .ci/setup_env.py .ci/constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "snpatch setup: needs Python 3.11 or newer, and $(PYTHON) is not on PATH"; exit 1; }
	@$(PYTHON) .ci/setup_env.py
	@touch $@

# The executor's tests with another vLLM, on a CPU, in build/vllm-VERSION: make test-vllm VERSION=0.24.0
test-vllm: $(READY)
	$(BIN)/python .ci/test_vllm.py $(VERSION)

# The tests of the CPU kernels on an address-sanitizer build of csrc/.
asan: $(READY)
	CFLAGS="-fsanitize=address -fno-omit-frame-pointer -O1" LDFLAGS=-fsanitize=address \
	  $(BIN)/python setup.py -q build_ext --force --build-lib build/asan --build-temp build/asan-objects
	LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 $(BIN)/python .ci/asan.py

# The tests of the compiled kernel under the oldest Triton that is served.
triton36: $(READY)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --target build/triton36 --no-deps triton==3.6.0
	PYTHONPATH=build/triton36 $(BIN)/python -m pytest -q tests/op/test_patched_glu_native.py -k "sass or compilation"

# Records in bench/results/; one thread on a CPU.
bench-op: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q bench/bench_patched_glu.py --benchmark-enable \
	  --benchmark-columns=median,iqr --benchmark-json=bench/results/patched_glu.cpu.json

# Patched generation inside vLLM against native vLLM and hooks (minutes); contrasts; filling the plan.
bench-generate: $(READY)
	$(BIN)/python -m pytest -q bench/bench_generate.py bench/bench_plan.py --benchmark-enable \
	  --benchmark-columns=median,iqr --benchmark-json=bench/results/generate.cpu.json
	SNPATCH_BENCH_SIZE=tiny $(BIN)/python -m pytest -q bench/bench_generate.py -k contrast --benchmark-enable \
	  --benchmark-columns=median,iqr --benchmark-json=bench/results/contrast.cpu.json

# Two sets of weights in one engine against two native engines; one stream against native (minutes).
bench-pair: $(READY)
	$(BIN)/python -m pytest -q bench/bench_pair.py --benchmark-enable \
	  --benchmark-columns=median,iqr --benchmark-json=bench/results/pair.cpu.json

# Sweeps: many windows in one batch, the store, a finished sweep again (minutes).
bench-sweep: $(READY)
	$(BIN)/python -m pytest -q bench/bench_sweep.py -k "windows and not demo" --benchmark-enable \
	  --benchmark-columns=median,iqr --benchmark-json=bench/results/sweep.cpu.json
	$(BIN)/python -m pytest -q bench/bench_sweep.py -k "windows and demo" --benchmark-enable \
	  --benchmark-columns=median,iqr --benchmark-json=bench/results/sweep_demo.cpu.json
	$(BIN)/python -m pytest -q bench/bench_sweep.py -k "not windows" --benchmark-enable \
	  --benchmark-columns=median,iqr --benchmark-json=bench/results/store.cpu.json

# The server under `vllm bench serve`, against plain requests and vLLM's own server; what HTTP adds (minutes).
bench-serve: $(READY)
	$(BIN)/python -m pytest -q bench/bench_serve.py --benchmark-enable \
	  --benchmark-columns=median,iqr --benchmark-json=bench/results/serve.cpu.json

# The server under 30,000 requests of an attack: texts, memory, /health (minutes). SNPATCH_BENCH_REQUESTS shortens it.
bench-attack: $(READY)
	OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind $(BIN)/python -m pytest -q bench/bench_attack.py --benchmark-enable \
	  --benchmark-columns=median,iqr --benchmark-json=bench/results/attack.cpu.json

# Zeroing of KV blocks before they are used again, against none (minutes).
bench-zeroing: $(READY)
	$(BIN)/python -m pytest -q bench/bench_zeroing.py --benchmark-enable \
	  --benchmark-columns=median,iqr --benchmark-json=bench/results/zeroing.cpu.json

# The page of a sweep: writing, opening, searching; needs Chromium.
bench-report: $(READY)
	$(BIN)/python -m pytest -q bench/bench_report.py --benchmark-enable \
	  --benchmark-columns=median,iqr --benchmark-json=bench/results/report.cpu.json

# The whole pipeline on the demo model: trainings, experiments, report (25 minutes).
bench-reproduce: $(READY)
	$(BIN)/python bench/bench_reproduce.py

# Rerun the experiments on the demo model (minutes) and rebuild the tables of README and guides.
readme: $(READY)
	rm -rf build/experiments
	$(BIN)/snpatch exp all --config demo --out build/experiments
	mkdir -p bench/results/demo
	cp $(addprefix build/experiments/,curve.csv curve.json curve.png report.json) bench/results/demo/
	sed -i 's|$(CURDIR)/||g' bench/results/demo/*.json
	$(BIN)/python bench/readme_table.py

# On a machine with a GPU, torch and triton (no .venv needed): `python bench/gpu_check.py --help` says how. Elsewhere it
# lists what it skips.
gpu-check:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) bench/gpu_check.py --all

clean:
	rm -rf .venv build dist *.egg-info
