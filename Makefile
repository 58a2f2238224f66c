# make demo: the main job on this machine.   make test: the whole suite.   make help: the rest.
PYTHON ?=
VENV   := .venv
BIN    := $(VENV)/bin
LOCKS  := deploy/locks
JEST   := $(BIN)/jest
ARGS   ?=

.DEFAULT_GOAL := help
.PHONY: help install install-nodes install-dev demo smoke test test-fast test-oldest test-newest test-slow test-long test-endurance chaos fuzz mutants bench gpu-bundle gpu-rehearsal lint format types docs check lock licences audit clean

help: ## what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-16s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# Every release is named in the locks with its hashes, so nothing needs resolving, and nothing must try. make test adds
# its tools to the environment of make demo.
INSTALL := sh deploy/install_lock.sh $(VENV)
$(VENV)/.run: $(LOCKS)/run.txt pyproject.toml
	@test -x $(BIN)/python || { python=$$(PYTHON="$(PYTHON)" sh deploy/find_python.sh) && "$$python" -m venv $(VENV); }
	@sh deploy/find_python.sh --check $(VENV)
	$(INSTALL) $(LOCKS)/run.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

$(VENV)/.dev: $(VENV)/.run $(LOCKS)/dev.txt
	$(INSTALL) $(LOCKS)/dev.txt
	touch $@

$(VENV)/.nodes: $(VENV)/.run $(LOCKS)/nodes.txt
	$(INSTALL) $(LOCKS)/nodes.txt
	touch $@

install: $(VENV)/.run ## the environment of the demonstration, in .venv
install-nodes: $(VENV)/.nodes ## the same with what the nodes of a cluster need
install-dev: $(VENV)/.dev ## the same with the tools of the tests

demo: install ## the main job end to end: 8 to 10 minutes on 2 cores; again resumes. ARGS="--data medium --seeds 2"
	$(JEST) demo $(ARGS)

smoke: install ## a few steps of everything
	$(JEST) demo --smoke $(ARGS)

test: install-dev ## the suite; what takes minutes by itself is left to test-long
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not long and not endurance and not chaos" --jaxtyping-packages=jest_core,beartype.beartype $(ARGS)

test-fast: install-dev ## what needs neither Ray nor S3 and is quick, on two processes: two minutes
	$(BIN)/python -m pytest -n 2 --dist worksteal -m fast --jaxtyping-packages=jest_core,beartype.beartype $(ARGS)

test-oldest: ## test-fast, and what compiles, on the oldest Python that is here, in .venv-oldest
	$(MAKE) test-fast VENV=.venv-oldest PYTHON=$$(sh deploy/find_python.sh 3.11 3.12 3.13 3.14)
	.venv-oldest/bin/python -m pytest -m slow tests/core

test-newest: ## test-fast, and what compiles, on the newest Python that is here, in .venv-newest
	$(MAKE) test-fast VENV=.venv-newest PYTHON=$$(sh deploy/find_python.sh 3.14 3.13 3.12 3.11)
	.venv-newest/bin/python -m pytest -m slow tests/core

test-slow: install-dev ## only those
	$(BIN)/python -m pytest -m slow $(ARGS)

test-long: install-dev ## what takes minutes: kills (chaos and endurance with them), clusters, Slurm, ssh, benchmarks
	$(BIN)/python -m pytest -n 2 --dist worksteal -m long $(ARGS) || [ $$? -eq 5 ] # 5: ARGS names none of these
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "chaos or endurance" $(ARGS) || [ $$? -eq 5 ]

test-endurance: install-dev ## ten times the object store from S3; LAION-2B's run file on a cluster of three nodes
	$(BIN)/python -m pytest -m endurance $(ARGS)

chaos: install-dev ## a run and a scoring, killed twenty times, end like undisturbed ones; JEST_CHAOS_SEED repeats a run
	$(BIN)/python -m pytest -s -m chaos $(ARGS)

# The command that it prints has the seed; CASES=411:412 is the one case of that number
fuzz: install-dev ## mutated pictures, shards, run files, checkpoints, parts, logs, answers of servers; SEED repeats, CASES of each, ARGS="-k tars"
	JEST_FUZZ_SEED=$(or $(SEED),$(shell date +%s)) JEST_FUZZ_CASES=$(or $(CASES),1000) $(BIN)/python -m pytest tests/fuzz --timeout 3600 --timeout-method thread $(ARGS)

mutants: install-dev ## faults of one line each, of which tests have to catch every one; ARGS=--fast: those of fast tests
	$(BIN)/python -m tests.mutants $(ARGS)

bench: install-dev ## selection, loss, steps, training, data and scoring against their baselines: over an hour on 2 idle cores
	$(BIN)/python -m tests.benchmarks.bench_selection $(ARGS)
	$(BIN)/python -m tests.benchmarks.bench_loss $(ARGS)
	$(BIN)/python -m tests.benchmarks.bench_start
	$(BIN)/python -m tests.benchmarks.bench_flexi
	$(BIN)/python -m tests.benchmarks.bench_training
	$(BIN)/python -m tests.benchmarks.bench_data
	$(BIN)/python -m tests.benchmarks.bench_reference_scores

gpu-bundle: install-dev ## build/gpu: what a machine with PyTorch and no network lacks for deploy/gpu/check.sh; ARGS goes to pip
	$(BIN)/python -m deploy.gpu.bundle build/gpu/site.tar.xz $(ARGS)

gpu-rehearsal: ## deploy/gpu/check.sh on the CPU, out of that bundle, without a network; installs a PyTorch of 5 GB in build/gpu-rehearsal
	bash deploy/gpu/rehearse.sh build/gpu-rehearsal $(ARGS)

lint: install-dev ## ruff, and the directions of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

format: install-dev ## ruff, writing
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: install-dev ## mypy
	$(BIN)/mypy

docs: install-dev ## what deploy/docs has of the run file and of the stages, from the code
	$(BIN)/python -m pipelines.base.stage_table deploy/docs/stages.md
	$(BIN)/python -m jest_core.run_file.describe deploy/docs

check: format lint types test ## before a commit

COMPILE = $(BIN)/uv pip compile pyproject.toml --quiet --universal --python-version 3.11 --generate-hashes \
	--no-annotate --no-emit-package pip --custom-compile-command "make lock"
lock: install-dev ## the locks again, after pyproject.toml; ARGS=--upgrade takes what is newest
	$(COMPILE) --all-extras -o $(LOCKS)/dev.txt $(ARGS)
	$(COMPILE) -c $(LOCKS)/dev.txt --extra drawings -o $(LOCKS)/run.txt $(ARGS)
	$(COMPILE) -c $(LOCKS)/dev.txt --extra clouds --extra cluster --extra trackers --extra ingest --extra language --extra tokenizers -o $(LOCKS)/nodes.txt $(ARGS)

licences: install-dev ## deploy/LICENSES.md: under what terms the releases of the images come
	$(BIN)/pip-licenses --format=markdown --with-urls --with-system --packages $$(sed -n 's/==.*//p' $(LOCKS)/nodes.txt) --output-file deploy/LICENSES.md

audit: install-dev ## known vulnerabilities of what the images install; fails where no advisory database can be asked
	$(BIN)/pip-audit --strict --disable-pip --require-hashes -r $(LOCKS)/nodes.txt $(ARGS)

clean: ## remove the environment and caches, not runs/
	rm -rf $(VENV) .venv-oldest .venv-newest build *.egg-info .pytest_cache .mypy_cache .ruff_cache
