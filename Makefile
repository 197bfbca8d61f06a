# One target per need; `make help` lists them from the comments behind the double hashes.
SHELL := /bin/bash
.DEFAULT_GOAL := help

# The newest that runs: a shim on PATH may stand for a Python that is not there. trio-asyncio does not
# import on Python 3.14 yet.
SUITABLE := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
PYTHON ?= $(shell for v in 3.13 3.12 3.11 3; do p=$$(command -v python$$v) && "$$p" -c '$(SUITABLE)' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
CLIENT := .venv-client
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml plugins/*/pyproject.toml 2>/dev/null | cksum | cut -d' ' -f1)

.PHONY: help demo demo-kafka test retest test-kafka torture-rebalance test-all bench bench-peers check fmt proto clean setup

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' | awk -F'|' '{printf "  %-18s %s\n", $$1, $$2}'

setup: $(STAMP) $(CLIENT)/.installed ## make the virtual environments (every other target does it by itself)

$(STAMP):
	@test -n "$(PYTHON)" || { echo "taskd needs Python 3.13, 3.12 or 3.11 on PATH; none was found." >&2; exit 1; }
	@echo "setting up $(VENV) with $(PYTHON)"
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	@$(BIN)/python -m pip install --quiet --group test --group check -e . -e plugins/taskd-demo -e plugins/taskd-webhooks
	@rm -f $(VENV)/.installed-*
	@touch $@

# An environment of its own: requirements-client.txt says why.
$(CLIENT)/.installed: requirements-client.txt | $(STAMP)
	@$(BIN)/python -m venv --clear $(CLIENT)
	@$(CLIENT)/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements-client.txt
	@touch $@

demo: $(STAMP) ## run the main job on the embedded log: 500 webhooks, with progress and a summary
	@$(BIN)/python plugins/taskd-webhooks/examples/demo.py --log embedded

demo-kafka: $(STAMP) ## the same over Kafka (a broker from PyPI, or TASKD_TEST_KAFKA=host:port)
	@$(BIN)/python plugins/taskd-webhooks/examples/demo.py --log kafka

test: $(STAMP) $(CLIENT)/.installed ## run the tests, Kafka included
	@$(BIN)/python -m pytest -m "not long" -n 2 --dist worksteal

retest: $(STAMP) $(CLIENT)/.installed ## run again what failed in the last run
	@$(BIN)/python -m pytest -m "not long" --last-failed --last-failed-no-failures none

test-kafka: $(STAMP) ## run the Kafka tests on a real Apache Kafka (needs Maven, a JDK 17, openssl)
	@$(BIN)/python tests/kafka/real_kafka.py $(BIN)/python -m pytest -m "kafka and not long"

torture-rebalance: $(STAMP) ## restart eight brokers over and over on a real Apache Kafka (six minutes)
	@$(BIN)/python tests/kafka/real_kafka.py $(BIN)/python tests/kafka/torture_rebalance.py $(TORTURE)

test-all: $(STAMP) $(CLIENT)/.installed ## run the tests and the long ones: kill loops, many seeds
	@$(BIN)/python -m pytest

bench: $(STAMP) ## measure taskd on this machine: every figure that has a target (ten minutes)
	@$(BIN)/taskd bench all

bench-peers: $(STAMP) ## measure taskd against Celery, Dramatiq, Taskiq, Huey, RQ, asynq (ten minutes; PEERS="--only rq")
	@$(BIN)/python tests/peers/run.py $(PEERS)

check: $(STAMP) ## types, lint, format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

fmt: $(STAMP) ## format, and mend what lint can mend
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

proto: $(STAMP) ## generate taskd/wire/generated from proto/
	@rm -rf taskd/wire/generated && mkdir -p taskd/wire/generated
	@cd proto && PATH="$(CURDIR)/$(BIN):$$PATH" python -m grpc_tools.protoc -I . \
		--python_betterproto2_out=../taskd/wire/generated \
		--python_betterproto2_opt=client_generation=none,server_generation=none \
		$$(find . -name '*.proto' | sed 's|^\./||' | sort)

clean: ## remove what was built; data folders stay
	rm -rf $(VENV) $(CLIENT) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
