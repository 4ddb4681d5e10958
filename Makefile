# make demo   compile gfnet_xs for a Jetson TX2 and for this machine, and classify a photo
# make test   lint, types, import contracts and every test
# make report an example report, in demo/report.html
# make bench  times of host bundles beside the other runtimes that are installed
# make clean  remove what these made

.DEFAULT_GOAL := help
.PHONY: help demo test lint report screenshots bench install tools clean

VENV := .venv
BIN := $(abspath $(VENV))/bin
PHOTO := $(abspath runtime/photos/cat.jpg)
# qemu and arm64's libc run the ARM bundles; gcc builds the C example as a user would; a sshd of
# the tests' own stands in for a board; reports are looked at in Chromium.
PACKAGES := qemu-user libc6-arm64-cross gcc libc6-dev openssh-client openssh-server \
    chromium-headless-shell

help:
	@sed -n 's/^# make/make/p' Makefile

demo: $(VENV)/.installed
	mkdir -p demo
	cd demo && $(BIN)/gfcompile --model gfnet_xs --target jetson-tx2 --int8
	cd demo && $(BIN)/gfcompile --model gfnet_xs --target host --int8
	cd demo && $(BIN)/gfcompile run gfnet_xs-host-int8 $(PHOTO)

test: tools lint
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

# validate ends with 1 if the machine misses the budget; the report then says so.
report: $(VENV)/.installed
	mkdir -p demo
	cd demo && $(BIN)/gfcompile --model dynamicvit_deit_s --target host --int8
	-cd demo && $(BIN)/gfcompile validate dynamicvit_deit_s-host-int8 --runs 500 \
	    --max-latency-ms 100 --min-agreement 0.5
	cd demo && $(BIN)/gfcompile report dynamicvit_deit_s-host-int8 --photo $(PHOTO) \
	    --output report.html

# Pictures of it for the README.
screenshots: tools $(VENV)/.installed-dev report
	$(BIN)/python docs/screenshots.py demo/report.html

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/cpu.py

install: $(VENV)/.installed

# The stamps make a second run start at once; a changed pyproject.toml installs again.
$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	@echo 'installing torch, TVM and the rest into $(VENV): 2.2 GB, about a minute'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/bin/python pyproject.toml
	@echo 'installing torch, TVM and the rest into $(VENV): 2.2 GB, about a minute'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@ $(VENV)/.installed

# Not every python3.x on the PATH runs (pyenv's shims) or can make a venv (Debian splits it off).
$(VENV)/bin/python:
	@for python in $(PYTHON) python3.11 python3.12 python3; do \
	    if $$python -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' \
	        2>/dev/null; then \
	        echo "$$python -m venv $(VENV)"; exec $$python -m venv $(VENV); \
	    fi; \
	done; \
	echo 'no Python 3.11 or 3.12 with venv; on Debian: sudo apt-get install -y python3-venv' >&2; \
	exit 1

tools:
	@missing=$$(for package in $(PACKAGES); do \
	    dpkg-query -W -f='$${Status}' $$package 2>/dev/null | grep -q 'ok installed' \
	        || printf '%s ' $$package; \
	done); \
	if [ -z "$$missing" ]; then \
	    :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "apt-get install $$missing"; \
	    export DEBIAN_FRONTEND=noninteractive; \
	    apt-get update -qq && apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
	else \
	    echo 'Tests that need these will be skipped. To run them, first:'; \
	    echo "    sudo apt-get install -y $$missing"; \
	fi

clean:
	rm -rf $(VENV) demo build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	rm -rf .hypothesis src/gfcompile.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
