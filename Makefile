# make help lists what one can do
PYTHON ?= python3
VENV := .venv/bin/python
SLOWEST := --durations=25

.PHONY: help quickstart test setup up down unit trainer combinations local serving component e2e chaos gpu seeds bench lint format crds lock docs site sbom release release-check clean-cache

help:  ## List the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

quickstart: setup  ## From nothing to a published adapter, on a Kubernetes of this machine
	@$(VENV) -m tests.cluster.quickstart

test: setup lint  ## Everything: linters, types; unit, trainer, component, chaos and end-to-end tests
	@$(VENV) -m tests

setup:  ## Python environments (cached outside the checkout)
	@sh tests/cluster/bootstrap.sh $(PYTHON)

up: setup  ## Start the local cluster with the operator's images
	@$(VENV) -m tests.cluster up

down: setup  ## Stop the local cluster and everything it started
	@$(VENV) -m tests.cluster down

unit: setup  ## Unit tests
	$(VENV) -m pytest tests/unit $(SLOWEST)

trainer: setup  ## The trainer's stages on a tiny model: every method, objective, metric and output
	$(VENV) -m pytest tests/trainer $(SLOWEST)

combinations: setup  ## Every objective with every method that is accepted, and every method with every strategy
	FINETUNE_COMBINATIONS=all $(VENV) -m pytest tests/trainer/test_methods.py tests/local/test_local.py $(SLOWEST)

local: setup  ## `finetune run --local`: processes that really train here, disturbed and undisturbed
	$(VENV) -m pytest tests/local $(SLOWEST)

serving: setup  ## A replica on this machine's CPU: a real vLLM, its agent and its proxy
	$(VENV) -m pytest tests/serving $(SLOWEST)

component: setup  ## Tests against a real API server
	$(VENV) -m pytest tests/component $(SLOWEST)

e2e: setup  ## Tests with real pods that really train
	$(VENV) -m pytest tests/e2e $(SLOWEST)

chaos: setup  ## 200 random faults over twenty jobs at once; `make test` strikes 60 times
	FINETUNE_CHAOS_FAULTS=200 $(VENV) -m pytest tests/chaos $(SLOWEST)

gpu:  ## The stages on this machine's NVIDIA GPUs, measured beside trl sft; with the Python at hand, no Kubernetes
	@if [ -x $(VENV) ]; then $(VENV) -m tests.gpu $(ARGS); else $(PYTHON) -m tests.gpu $(ARGS); fi

seeds: setup  ## The quickstart's result with three seeds, as the table of docs/evaluation.md
	@$(VENV) -m tests.bench.seeds $(ARGS)

bench: setup  ## Benchmarks with their baselines
	$(VENV) -m tests.bench

lint: setup  ## ruff, mypy, import contracts
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	$(VENV) -m mypy
	$(VENV) -c 'from importlinter.cli import lint_imports_command; lint_imports_command()'

format: setup  ## Format the code
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

crds: setup  ## Generate crds/, the chart's copy and the field reference
	$(VENV) -m finetune_api.crd .
	$(VENV) -m finetune_api.reference docs/reference.md

site: setup  ## The documentation as a site, in out/site
	$(VENV) -m mkdocs build --strict

sbom: setup  ## Bills of materials with licences of both images, in out/
	$(VENV) -m tests.cluster.sbom out

release: setup  ## Chart, CRDs, bills of materials and digests of a version, in out/release
	$(VENV) -m tests.cluster.release build out/release

release-check: setup  ## Whether this checkout can be released: versions, changes, made twice the same, all combinations
	$(VENV) -m tests.cluster.release check

lock: setup  ## Pin the newest versions that pyproject.toml allows
	$(VENV) -m tests.cluster.lock
