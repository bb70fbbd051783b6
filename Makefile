# Both targets need Python 3.11, pip, git and make, and set up the rest in .venv.
PYTHON ?= python3.11
BIN := .venv/bin
export PYTHONSAFEPATH := 1
export HF_HUB_DISABLE_TELEMETRY := 1
# where bytecode is kept a process starts in half the time; what is used is compiled once, which is less than all
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test lint tests notebooks bench bench-gpu clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/installed  ## language model -> dictionary -> report, in a few minutes
	$(BIN)/saekit demo --out demo

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typing && mkdir -p build/typing/saekit
	ln -s $(CURDIR)/saekit/* build/typing/saekit/
	for room in kernels trainers circuits autointerp; do ln -s $(CURDIR)/$$room build/typing/saekit/$$room; done
	$(BIN)/mypy

test: .venv/installed  ## lint, types, and every test that needs no network and no GPU, side by side
	$(MAKE) --jobs 2 lint tests

tests: .venv/installed
	HF_HUB_OFFLINE=1 WANDB_MODE=offline $(BIN)/pytest -n 2 --dist loadfile

notebooks: .venv/installed  ## every notebook and every page of docs/, from top to bottom, offline; build/notebooks has them with outputs
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 WANDB_MODE=offline $(BIN)/pytest -n 2 --dist worksteal -m "notebook and not slow"

bench: .venv/installed  ## parity, then times against one dense product; PEERS=python of an environment with other toolkits
	$(BIN)/saekit bench --scaling $(if $(PEERS),--peers $(PEERS))

bench-gpu:  ## the same on a GPU; needs only torch with CUDA and Triton under PYTHON
	mkdir -p build/gpu/saekit && ln -sfn $(CURDIR)/kernels build/gpu/saekit/kernels && touch build/gpu/saekit/__init__.py
	PYTHONPATH=build/gpu $(PYTHON) -m saekit.kernels.bench_gpu $(PEERS)

clean:
	rm -rf .venv demo build dist *.egg-info
