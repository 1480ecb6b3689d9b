# make serve    an OpenAI-compatible server scheduled by FastServe, on this machine's CPU
# make test     every test on vLLM 0.32, then those that must hold on both versions on 0.33
# make demo     the same burst of requests on stock vLLM and on FastServe: a table and a plot
# make bench    systems over loads, and the swap modes where KV cache is short: a report (minutes)
# make distributed  every way to run on two workers, over HTTP: docs/distributed.md (half an hour)
# make exact    greedy tokens under KV swap in every way to run the engine (three hours on two cores)
# make host-tests  vLLM's own scheduler tests on FastServe's scheduler, fetched by pip (half an hour)
# make fuzz     random events on the scheduler: STEPS=0 until interrupted, SEED=n from there on
# make soak     a server under mixed traffic: MINUTES=10
# make lint     formatting, lints, types, import contracts
# make dashboards       write examples/grafana and docs/metrics.md from the metric catalogue
# make dashboards-demo  a server, load for it, and Prometheus; says where to look
# make clean    remove caches and build output; make distclean also environments and models
#
# The first run installs vLLM and takes minutes; later ones start at once.

VENV := .venv
VLLM_033 := .vllm-0.33
PYTHON ?= $(shell command -v python3.11 || command -v python3)
RUN := $(VENV)/bin/python

PORT ?= 8000
DEFAULT_MODEL := .models/smollm2-135m-instruct
TINY_MODEL := .models/tiny-llama
MODEL ?= $(DEFAULT_MODEL)
ARGS ?=
SCHEDULER_ARGS ?= --scheduler fastserve
# Two files at a time: engines mostly use one core, and each takes up to 2 GiB.
PYTEST_ARGS ?= -n 2 --dist loadfile
EXACT_ARGS ?=
DISTRIBUTED_ARGS ?=
BENCH := results/bench
BENCH_SEEDS ?= 0
DEMO_ARGS ?=
HOST_ARGS ?=
STEPS ?= 100000
SEED ?= 0
MINUTES ?= 10
SOAK_ARGS ?=

.PHONY: serve demo bench test test-033 exact distributed host-tests fuzz soak dashboards dashboards-demo
.PHONY: lint format clean distclean env dev-env vllm-033
.DEFAULT_GOAL := test

serve: env
ifeq ($(MODEL),$(DEFAULT_MODEL))
	@$(RUN) scripts/smollm2_model.py $(MODEL) >/dev/null
endif
	@PORT='$(PORT)' VENV='$(VENV)' SCHEDULER_ARGS='$(SCHEDULER_ARGS)' \
	  exec scripts/serve.sh '$(MODEL)' $(ARGS)

demo: dev-env
	@$(RUN) scripts/smollm2_model.py $(DEFAULT_MODEL) >/dev/null
	@. scripts/cpu_env.sh; $(RUN) -m benchmarks.demo --model $(DEFAULT_MODEL) $(DEMO_ARGS)

# Points that are there already are not measured again.
bench: dev-env
	@. scripts/cpu_env.sh; $(RUN) -m benchmarks.run --workload sharegpt --out $(BENCH)/sharegpt \
	  --systems vllm-fcfs vllm-priority-oracle mlfq fastserve srpt-oracle \
	  --loads 0.3 0.7 0.9 1.0 1.2 --requests 250 --seeds $(BENCH_SEEDS) --jobs 2 --quiet
	@. scripts/cpu_env.sh; $(RUN) -m benchmarks.run --workload sharegpt --out $(BENCH)/sharegpt-kv \
	  --regime kv --systems vllm-fcfs fastserve fastserve-reactive fastserve-recompute \
	  --loads 1.0 1.2 --requests 250 --seeds $(BENCH_SEEDS) --jobs 2 --quiet
	@$(RUN) -m benchmarks.report $(BENCH)/sharegpt $(BENCH)/sharegpt-kv --out $(BENCH)/report

test: dev-env
	@$(RUN) scripts/tiny_model.py $(TINY_MODEL) >/dev/null
	. scripts/cpu_env.sh; HF_HUB_OFFLINE=1 $(RUN) -m pytest $(PYTEST_ARGS)
	@$(MAKE) --no-print-directory test-033

test-033: dev-env vllm-033
	. scripts/cpu_env.sh; HF_HUB_OFFLINE=1 PYTHONPATH='$(CURDIR)/$(VLLM_033)/overlay' \
	  $(RUN) -m pytest -m host_versions $(PYTEST_ARGS)

exact: dev-env
	@$(RUN) scripts/tiny_model.py $(TINY_MODEL) >/dev/null
	. scripts/cpu_env.sh; HF_HUB_OFFLINE=1 $(RUN) tests/exactness.py $(TINY_MODEL) $(EXACT_ARGS)

# Rows that go wrong leave the file as it is.
distributed: dev-env
	@$(RUN) scripts/tiny_model.py $(TINY_MODEL) >/dev/null
	. scripts/cpu_env.sh; HF_HUB_OFFLINE=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 \
	  PYTHONPATH='$(CURDIR):tests:tests/e2e' $(RUN) tests/distributed/run.py $(TINY_MODEL) \
	  --out benchmarks/results/distributed.json $(DISTRIBUTED_ARGS)
	. scripts/cpu_env.sh; HF_HUB_OFFLINE=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 \
	  PYTHONPATH='$(CURDIR):tests:tests/e2e' $(RUN) tests/distributed/run.py $(TINY_MODEL) \
	  --failures --out benchmarks/results/distributed.json $(DISTRIBUTED_ARGS)
	@$(RUN) tests/distributed/tables.py

dashboards: dev-env
	$(RUN) -m scripts.dashboards

dashboards-demo: dev-env
	@$(RUN) scripts/tiny_model.py $(TINY_MODEL) >/dev/null
	@. scripts/cpu_env.sh; HF_HUB_OFFLINE=1 PORT='$(PORT)' \
	  $(RUN) -m scripts.dashboards.demo $(TINY_MODEL) $(ARGS)

host-tests: dev-env vllm-033
	. scripts/cpu_env.sh; PYTHONPATH=.:tests/host $(RUN) tests/host/vllm_suite/run.py $(HOST_ARGS)

fuzz: dev-env
	@$(RUN) scripts/tiny_model.py $(TINY_MODEL) >/dev/null
	. scripts/cpu_env.sh; VLLM_LOGGING_LEVEL=ERROR HF_HUB_OFFLINE=1 PYTHONPATH=.:tests/policy \
	  $(RUN) tests/fuzz/scheduler_fuzz.py $(TINY_MODEL) --steps $(STEPS) --seed $(SEED)

soak: dev-env
	@$(RUN) scripts/tiny_model.py $(TINY_MODEL) >/dev/null
	. scripts/cpu_env.sh; HF_HUB_OFFLINE=1 PYTHONPATH=.:tests:tests/e2e \
	  $(RUN) tests/soak/soak.py $(TINY_MODEL) --minutes $(MINUTES) $(SOAK_ARGS)

lint: dev-env
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports

format: dev-env
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

env:
	@$(PYTHON) scripts/setup_env.py $(VENV) cpu model

dev-env:
	@$(PYTHON) scripts/setup_env.py $(VENV) cpu model bench test dashboards ray

vllm-033: dev-env
	@scripts/vllm_033_env.sh $(VENV) $(VLLM_033)

clean:
	rm -rf build dist *.egg-info htmlcov .coverage
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -path './.*' -prune -o -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(VLLM_033) .vllm-tests .models
