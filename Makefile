# make demo: trains a small detector on synthetic images and draws what it finds.
# make test: runs the whole test suite.
# Both set up .venv in a fresh clone and reuse it later. PYTHON=... uses that interpreter as it is.

VENV := .venv
ifdef PYTHON
READY :=
else
PYTHON := $(VENV)/bin/python
READY := $(VENV)/ready
endif

.PHONY: demo test clean

demo: $(READY)
	$(PYTHON) tools/run_demo.py

test: $(READY)
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n auto --maxprocesses 8 --dist worksteal

$(VENV)/ready: setup.py pyproject.toml dev/setup_venv.sh $(wildcard csrc/* csrc/*/*)
	bash dev/setup_venv.sh $(VENV)
	touch $@

clean:
	rm -rf $(VENV) build output projects/*.egg-info projects/dn_detr/_C.* projects/dn_detr/_build.json
