# Every target makes the environment it needs first; `make` alone prints the targets.
CONFIG ?= configs/micro.yaml
# Two files of tests at a time, in order: the longest come first. Most of a test's time is the start of a process.
TEST_WORKERS ?= -n 2 --dist loadfile --no-loadscope-reorder
VENV ?= .venv
export VENV
# Data, whatever is in it: recipes take these from the environment, so that neither make nor a shell reads them as code.
# What ends in _ARGS is words for the shell.
VALUES := CONFIG DATA_ROOT PROFILE CORES REBUILD A B FOLDER TRIALS FAULTS SIZES
$(foreach name,$(VALUES),$(eval override $(name) := $$(value $(name))))
export $(VALUES)
# What notebooks and tests start by name (ninja, torchrun, mergekit-yaml) comes from the environment too.
export PATH := $(abspath $(VENV))/bin:$(PATH)
VENV_PYTHON := $(VENV)/bin/python
DATA_AND_CORES := $${DATA_ROOT:+--data-root "$$DATA_ROOT"} $${CORES:+--cores "$$CORES"} $${PROFILE:+--profile "$$PROFILE"}
COMPILE := $(VENV)/bin/uv pip compile -q --python-version 3.11 --no-annotate --no-emit-index-url --no-emit-find-links \
	--custom-compile-command "make lock" --overrides requirements/overrides.txt $(LOCK_ARGS)

.DEFAULT_GOAL := help
.PHONY: help bootstrap run plan status verify compare test test-slow faults lab lint format figures publish lm-eval licences benchmark-curation benchmark-grading \
	benchmark-merge benchmark-sft benchmark-stress lock clean clean-runs

help:
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

bootstrap:
	@bash scripts/bootstrap.sh

run: bootstrap ## all notebooks of CONFIG (configs/micro.yaml) headless; DATA_ROOT= where the data lies, CORES= how many, PROFILE=configs/slurm
	@$(VENV_PYTHON) -m tinyr1_utils.stage_runner all --config "$$CONFIG" $(DATA_AND_CORES)

plan: bootstrap ## memory per GPU, steps and hours of every branch of CONFIG, before anything loads; PLAN_ARGS="--gpu-gib 40"
	@$(VENV_PYTHON) -m tinyr1_utils.memory_plan --config "$$CONFIG" $(PLAN_ARGS)

test: bootstrap lm-eval ## all tests; PYTEST_ARGS="-m 'not slow'" for the quick ones
	@bash scripts/test_programs.sh
	$(VENV_PYTHON) -m pytest -q tests $(TEST_WORKERS) $(PYTEST_ARGS)

test-slow: bootstrap ## of the tests the slow ones alone, which start real jobs, servers and hosts
	@bash scripts/test_programs.sh
	$(VENV_PYTHON) -m pytest -q tests -m slow $(TEST_WORKERS) $(PYTEST_ARGS)

status: bootstrap ## what of CONFIG is done, stale, running or missing, with its result and its cost, a line each
	@$(VENV_PYTHON) -m tinyr1_utils.stage_runner status --config "$$CONFIG"

verify: bootstrap ## hold every artifact of CONFIG against its manifest; REBUILD=1 runs damaged stages again
	@$(VENV_PYTHON) -m tinyr1_utils.stage_runner verify --config "$$CONFIG" $${REBUILD:+--rebuild} $(DATA_AND_CORES)

compare: bootstrap ## two finished runs, A=run1 B=run2: parameters that differ, scores with paired intervals
	@$(VENV_PYTHON) -m tinyr1_utils.stage_runner compare -- "$$A" "$$B"

faults: bootstrap ## TRIALS (20) of every fault at random moments, hours; needs root; FAULTS="full disk" for one
	@bash scripts/test_programs.sh
	$(VENV_PYTHON) tests/faults/trials.py $${FOLDER:+--folder "$$FOLDER"} $${TRIALS:+--trials "$$TRIALS"} --faults "$$FAULTS"

lab: bootstrap ## JupyterLab on notebooks/, its kernel this environment; LAB_ARGS=--no-browser
	PYTHONWARNINGS="ignore:IProgress not found" $(VENV)/bin/jupyter lab notebooks $(if $(filter 0,$(shell id -u)),--allow-root) $(LAB_ARGS)

lint: bootstrap ## rules and formatting of code and notebooks
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: bootstrap ## rewrite code and notebooks in the project's format
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

figures: bootstrap ## draw figures/ again from the published runs
	@$(VENV_PYTHON) -m tinyr1_utils.stage_runner figures

publish: bootstrap ## copy a finished run's small results to papermill_runs/published, draw figures/; CONFIG=
	@$(VENV_PYTHON) -m tinyr1_utils.stage_runner publish --config "$$CONFIG"

lm-eval: bootstrap ## add lm-evaluation-harness (optional), for IFEval and BBH
	@$(VENV_PYTHON) -m pip install -q --disable-pip-version-check --no-deps -r requirements/lm-eval.lock

licences: bootstrap lm-eval ## write requirements/licences.csv anew: what licence each package of the locks says it has
	@$(VENV_PYTHON) scripts/licences.py

benchmark-grading: bootstrap ## grading and sampling beside their peers: time, agreement
	$(VENV_PYTHON) benchmarks/grading.py
	$(VENV_PYTHON) benchmarks/math_grading.py
	$(VENV_PYTHON) benchmarks/sampling.py

benchmark-curation: bootstrap ## decontamination and near duplicates beside common practice, 10k to 300k rows; 4 GiB free in FOLDER
	$(VENV_PYTHON) benchmarks/curation.py --folder "$${FOLDER:-/tmp}"

benchmark-merge: bootstrap ## merging beside mergekit: time, memory, repeats; SIZES="0.5B"
	$(VENV_PYTHON) benchmarks/merge.py $${SIZES:+--sizes $$SIZES}

benchmark-sft: bootstrap ## branch SFT by way of feeding it: tokens/s, utilisation, memory; planned against measured memory; on a GPU SFT_ARGS=--gpu
	$(VENV_PYTHON) benchmarks/sft.py $(SFT_ARGS)
	$(VENV_PYTHON) benchmarks/memory_plan.py

benchmark-stress: bootstrap ## the stress test's changes a second, and scoring beside plain forward passes; DATA_ROOT=
	$(VENV_PYTHON) benchmarks/stress.py --data-root "$${DATA_ROOT:+$$(realpath "$$DATA_ROOT")}"

# On a machine without a local wheel of CPU torch, uv looks its version up in PyTorch's CPU index.
lock: bootstrap ## resolve requirements/*.in again, keeping versions that still fit; LOCK_ARGS=--upgrade moves them
	UV_FIND_LINKS="$(PIP_FIND_LINKS)" $(COMPILE) requirements/cpu.in --overrides requirements/overrides-cpu.txt \
		$(if $(PIP_FIND_LINKS),,--torch-backend=cpu) -o requirements/cpu.lock
	sed -i 's/+cpu$$//' requirements/cpu.lock
	$(COMPILE) requirements/gpu.in -c requirements/cpu.lock -o requirements/gpu.lock
	$(COMPILE) requirements/lm-eval.in -c requirements/cpu.lock --overrides requirements/overrides-cpu.txt \
		--overrides requirements/overrides-lm-eval.txt -o requirements/lm-eval.lock
	grep '^#' requirements/lm-eval.lock > requirements/.lm-eval.tmp
	grep -vxF -f requirements/cpu.lock requirements/lm-eval.lock >> requirements/.lm-eval.tmp
	mv requirements/.lm-eval.tmp requirements/lm-eval.lock

clean: ## remove caches and unfinished temporary files; results in papermill_runs/ stay
	rm -rf .snakemake .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -path ./.git -prune -o -path './$(VENV:./%=%)' -prune -o \
		-type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -exec rm -rf {} +
	if [ -d papermill_runs ]; then find papermill_runs -type f -name '.*.tmp' -delete; fi

clean-runs: ## remove the results in papermill_runs/ that git does not track; published/ stays
	git clean -fdx -e published papermill_runs
