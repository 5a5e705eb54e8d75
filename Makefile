# make demo: a virtual machine migrates live between two nodes through migproxy
# make test: the gate, which is what CI runs: ten minutes (PYTEST_ARGS='-k relay': only these)
# make soak: all other tests: long storms, every mix, kernel TLS in a virtual machine (SLICE=2/4: the second of four parts)
# make bench: migproxy beside other relays and the limit, in about seven minutes (BENCH_ARGS=--quick: in one)
# make install: as a service of systemd (DESTDIR=, PREFIX=/usr/local, PYTHON=); make uninstall: takes it away again
# make venv, lint, unit, net, kube, e2e, observe, docs, lock: the parts
# make sbom: bills of materials of wheel and image, in build/ (BASE=...@sha256:...: the base image that was built on)
# make policies: the tests of make kube with Kubernetes' own admission policies (CONTRIBUTING.md); needs root and 4 GB

SHELL := /bin/sh
BIN := .venv/bin

.PHONY: demo test soak bench venv lint unit net kube e2e observe policies docs sbom lock install installed uninstall clean \
	packages-demo packages-bench packages-lab packages-all

# Two apt-gets at once get into each other's way.
.NOTPARALLEL:

demo: packages-demo venv
	@scripts/demo

test: packages-all venv installed lint
	scripts/run-tests gate $(PYTEST_ARGS)
	$(BIN)/coverage report

soak: packages-all venv installed
	scripts/run-tests soak $(SLICE) $(PYTEST_ARGS)

bench: packages-bench venv
	@$(BIN)/migproxy bench --json benchmarks/latest.json --chart benchmarks/latest.svg $(BENCH_ARGS)

lint: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: venv
	$(BIN)/pytest tests/unit $(PYTEST_ARGS)

net e2e kube: packages-lab venv installed
	scripts/sandbox $(BIN)/pytest tests/$@ -m "not outside" $(PYTEST_ARGS)

observe: packages-all venv
	scripts/sandbox $(BIN)/pytest tests/$@ $(PYTEST_ARGS)

policies: packages-lab venv installed
	scripts/policy-server .venv/policy-server
	MIGPROXY_POLICY_SERVER=$(CURDIR)/.venv/policy-server scripts/sandbox $(BIN)/pytest tests/kube $(PYTEST_ARGS)

venv: .venv/ready

# --no-deps: the lock is complete, and some versions of pip look past it for a requirement with an extra.
.venv/ready: requirements.lock pyproject.toml
	@scripts/system-packages venv
	@python=$$(scripts/find-python) || { echo "migproxy: no Python 3.11 or newer with venv on this machine" >&2; exit 1; }; \
	[ -x $(BIN)/python ] || "$$python" -m venv .venv
	@echo "migproxy: installing the Python packages of requirements.lock into .venv"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@$(BIN)/python -m compileall -q migproxy
	@touch $@

packages-demo:
	@scripts/system-packages venv demo

packages-bench:
	@scripts/system-packages venv bench

packages-lab:
	@scripts/system-packages venv lab bench

packages-all:
	@scripts/system-packages venv lab bench observability

# The parts of the documentation that come from the code.
docs: venv
	$(BIN)/python scripts/options-table --write

sbom: venv
	@mkdir -p build
	PYTHONPATH=. $(BIN)/python scripts/sbom wheel >build/wheel.cdx.json
	PYTHONPATH=. $(BIN)/python scripts/sbom image $(BASE) >build/image.cdx.json

COMPILE := uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
	  --no-emit-index-url --no-emit-find-links

# requirements-runtime.lock is what the container image has: the same versions without the development tools.
# Needs uv, which is not among the locked packages: it is only used to make the lock.
lock:
	$(COMPILE) --extra dev pyproject.toml -o requirements.lock
	$(COMPILE) pyproject.toml -c requirements.lock -o requirements-runtime.lock

export DESTDIR PREFIX PYTHON

# Without bytecode, each daemon of a test would compile migproxy anew: another 0.06 s of CPU.
export PYTHONDONTWRITEBYTECODE :=

install: venv
	@scripts/install files
	@scripts/install program

# For the tests that boot a systemd: without a network, they cannot download.
installed: .venv/installed/ready

.venv/installed/ready: .venv/ready requirements-runtime.lock scripts/install $(shell find migproxy systemd -type f ! -name "*.pyc")
	@echo "migproxy: installing migproxy into .venv/installed, as make install would"
	@for part in files program; do DESTDIR=$(CURDIR)/.venv/installed scripts/install $$part; done
	@touch $@

uninstall:
	@scripts/install uninstall

clean:
	rm -rf .venv .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build *.egg-info
