# make demo: trains a small detector on synthetic images and draws its detections.
# make test: runs the whole test suite.
# make fuzz: sends broken annotation files through everything that reads them, INPUTS of them.
# make test-pypi-detectron2: runs the tests that need Detectron2 with its Python files from PyPI, as
# on a machine that cannot reach GitHub (see projects/dn_detr/install_detectron2.py).
# make sanitize: compiles the CPU operators with GCC's address and undefined behaviour sanitizers,
# into build/sanitize, and runs their tests and a fuzzer with them (TRIALS=...).
# make emulate: compiles the CUDA operators for the CPU (dev/cuda_emulator), runs their tests with
# them, and breaks them on purpose in a few places, which the tests must notice.
# make check-long: everything that takes too long for every change: all of these mutations, other
# orders of threads, and the code for sm_80.
# make lint: checks style and types; needs no operators, so it takes any .venv as it is.
# make docs: makes a site of the documents and docstrings, build/docs/docs/index.html.
# All set up .venv in a fresh clone and reuse it later. PYTHON=... uses an existing interpreter.

VENV := .venv
ifdef PYTHON
READY :=
else
PYTHON := $(VENV)/bin/python
READY := $(VENV)/ready
endif

.PHONY: demo test fuzz sanitize emulate check-long lint docs test-pypi-detectron2 clean

demo: $(READY)
	$(PYTHON) tools/run_demo.py

test: $(READY)
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n auto --maxprocesses 8 --dist worksteal

INPUTS := 30000

fuzz: $(READY)
	OMP_NUM_THREADS=1 $(PYTHON) tests/d2/fuzz_data.py --inputs $(INPUTS) --processes 2

SANITIZE := -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=undefined,float-cast-overflow
# The allocator of the sanitizer must come first, and torch needs its exceptions from libstdc++.
SANITIZED = LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so.6)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
	PYTHONPATH=build/sanitize/lib OMP_NUM_THREADS=1 $(PYTHON)
TRIALS := 4000

sanitize: $(READY)
	FORCE_CUDA=0 LDFLAGS="$(SANITIZE)" \
		DN_DETR_CXXFLAGS="-O1 -g1 -fno-wrapv -fno-omit-frame-pointer $(SANITIZE)" $(PYTHON) setup.py -q build \
		--build-lib build/sanitize/lib --build-temp build/sanitize/temp
	$(SANITIZED) tests/ops/fuzz_operators.py --trials $(TRIALS)
	ATEN_CPU_CAPABILITY=default $(SANITIZED) tests/ops/fuzz_operators.py --trials $(TRIALS) --seed 1
	$(SANITIZED) -m pytest -q -n 2 --dist worksteal tests/ops -k "not pytorch-cpu and not graph"

EMULATED = PYTHONPATH=build/emulate/lib OMP_NUM_THREADS=1 $(PYTHON)
# Not those of the CPU's own kernels, and of what only they refuse.
EMULATED_TESTS := -m pytest -q -n 2 --dist worksteal tests/ops tests/losses/test_linear_assignment.py \
	tests/losses/test_matcher.py tests/losses/test_matching_costs.py -k "not pytorch-cpu and not graph and not \
	number_of_threads and not instruction_sets and not wrong_inputs_of_the and not cuda_emulator"

emulate: $(READY)
	$(PYTHON) dev/cuda_emulator/build.py build/emulate
	$(EMULATED) $(EMULATED_TESTS)
	$(PYTHON) dev/cuda_emulator/mutations.py build/emulate --few

check-long: emulate
	$(PYTHON) dev/cuda_emulator/mutations.py build/emulate
	for seed in 1 2 3; do EMULATOR_SEED=$$seed $(EMULATED) $(EMULATED_TESTS) || exit 1; done
	$(PYTHON) dev/cuda_emulator/build.py build/emulate-sm80 --arch 800
	PYTHONPATH=build/emulate-sm80/lib OMP_NUM_THREADS=1 $(PYTHON) $(EMULATED_TESTS)

lint: $(if $(wildcard $(VENV)/bin/mypy),,$(READY))
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

docs: $(if $(wildcard $(VENV)/bin/sphinx-build),,$(READY))
	$(PYTHON) -m sphinx --quiet --fail-on-warning --keep-going -c docs -b html . build/docs

$(VENV)/ready: setup.py pyproject.toml dev/setup_venv.sh projects/dn_detr/install_detectron2.py $(wildcard csrc/* csrc/*/*)
	bash dev/setup_venv.sh $(VENV)
	touch $@

PYPI_DETECTRON2 := $(CURDIR)/build/pypi-detectron2
WITH_DETECTRON2 := $(addprefix tests/d2/test_,$(addsuffix .py,train_net evaluation datasets configs \
	faster_rcnn masks checkpoint detector loader bad_input operator_checks))

test-pypi-detectron2: $(READY)
	rm -rf "$(PYPI_DETECTRON2)"
	$(PYTHON) -m dn_detr.install_detectron2 --files "$(PYPI_DETECTRON2)"
	OMP_NUM_THREADS=1 PYTHONPATH="$(PYPI_DETECTRON2)" DN_DETR_PYPI_DETECTRON2=1 $(PYTHON) -m pytest \
		-n auto --maxprocesses 8 --dist worksteal $(WITH_DETECTRON2)

clean:
	rm -rf $(VENV) build output projects/*.egg-info projects/dn_detr/_C.* projects/dn_detr/_build.json
