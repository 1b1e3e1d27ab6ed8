# make demo   the main job on this machine: a broker, four simulated boards, the ground station (no root, no torch)
# make test   every check: ruff and pytest (installs the Debian packages it may, and torch for the parity tests)
# make image-test  builds bootable images and boots them in QEMU (some 20 minutes; layers are kept in IMAGE_CACHE)
# make clean  removes what these made, but not IMAGE_CACHE
# Both work in .venv, which they create. Stamps carry a hash of what was installed and where: a changed pin installs again, a
# moved clone or another Python makes .venv anew, and nothing else does.

PYTHON ?= python3
DEMO_EXTRAS ?= ground,sim
TEST_EXTRAS ?= ground,quantize,sim,hardware,experiments,reference,dev
# A little chance makes the text livelier than greedy decoding; the seed keeps it the same every time. DEMO_ARGS comes after.
DEMO_SAMPLING ?= --temperature 0.7 --top-p 0.9 --seed 0
DEMO_ARGS ?=
PYTEST_ARGS ?=
# Tests wait more than they compute: two at a time take little over half of the time. 0: one after the other.
PYTEST_WORKERS ?= 2
IMAGE_CACHE ?= $(HOME)/.cache/spacemoe/image
IMAGE_TEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
KEY := $(shell { $(PYTHON) --version; pwd; cat pyproject.toml constraints.txt; } 2>&1 | cksum | cut -d' ' -f1)
HOME_KEY := $(shell { $(PYTHON) --version; pwd; } 2>&1 | cksum | cut -d' ' -f1)
VENV_STAMP := $(VENV)/.stamp-venv-$(HOME_KEY)
DEMO_STAMP := $(VENV)/.stamp-demo-$(KEY)
TEST_STAMP := $(VENV)/.stamp-test-$(KEY)
LM_VENV := $(VENV)-lm
LM_STAMP := $(LM_VENV)/.stamp-$(shell { $(PYTHON) --version; pwd; cat tests/lm-eval-constraints.txt; } 2>&1 | cksum | cut -d' ' -f1)

.PHONY: demo test image-test clean debian-packages promtool lm-eval
.DELETE_ON_ERROR:

demo: $(DEMO_STAMP)
	@echo "== spacemoe demo $(DEMO_SAMPLING) $(DEMO_ARGS)"
	@$(BIN)/spacemoe demo $(DEMO_SAMPLING) $(DEMO_ARGS)

test: debian-packages $(TEST_STAMP) promtool lm-eval
	@echo "== ruff check"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "== pytest"
	@PATH="$(CURDIR)/$(BIN):$(CURDIR)/$(LM_VENV)/bin:$$PATH" $(BIN)/python -m pytest -q -n $(PYTEST_WORKERS) --dist loadfile $(PYTEST_ARGS)

# EleutherAI's lm-eval judges the API. In an environment of its own: it wants other versions of what the kit needs.
lm-eval: $(TEST_STAMP)
	@command -v lm_eval >/dev/null || [ -e $(LM_STAMP) ] || { echo "== installing lm-eval into $(LM_VENV)" && rm -rf $(LM_VENV) \
	  && $(BIN)/python -m venv --without-pip $(LM_VENV) && $(BIN)/python -m pip --python $(LM_VENV)/bin/python install -q --disable-pip-version-check \
	  -c tests/lm-eval-constraints.txt 'lm-eval[api]' 'transformers<4.58' && touch $(LM_STAMP); } \
	  || echo "== lm-eval cannot be had here: the tests that need it will be skipped"

# promtool judges /metrics. Out of Debian's package, which is not installed: that would start a server on this machine.
promtool: $(TEST_STAMP)
	@command -v promtool >/dev/null || [ -x $(BIN)/promtool ] || { command -v apt-get && command -v dpkg-deb \
	  && mkdir -p $(VENV)/deb && cd $(VENV)/deb && { apt-get download -q prometheus || { apt-get update -q && apt-get download -q prometheus; }; } \
	  && dpkg-deb --fsys-tarfile prometheus_*.deb | tar -x ./usr/bin/promtool && mv usr/bin/promtool ../bin/; } >$(VENV).log 2>&1 \
	  || echo "== promtool cannot be had here: the test that needs it will be skipped"
	@rm -rf $(VENV)/deb $(VENV).log

# The Debian packages that it needs (mmdebstrap, qemu-user-static, qemu-system-arm ...) it installs itself where it may.
image-test: debian-packages $(TEST_STAMP) promtool lm-eval
	@$(BIN)/python -m hardware.image_test --cache $(IMAGE_CACHE) $(IMAGE_TEST_ARGS)

clean:
	rm -rf .image-test $(VENV) $(LM_VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

$(VENV_STAMP):
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not on PATH; install Python 3.10 or newer, or say make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $$($(PYTHON) --version) is too old; install Python 3.10 or newer, or say make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "== creating $(VENV) with $$($(PYTHON) --version)"
	@rm -rf $(VENV)
# Debian's python3 without python3-venv cannot put pip into a new environment, but its own pip can.
	@$(PYTHON) -m venv $(VENV) >$(VENV).log 2>&1 \
	  || { rm -rf $(VENV); $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install -q pip; } >>$(VENV).log 2>&1 \
	  || { tail -n 3 $(VENV).log >&2; rm -rf $(VENV) $(VENV).log; \
	       echo "error: $(PYTHON) cannot create a virtual environment; install python3-venv (Debian: apt-get install python3-venv)" >&2; exit 1; }
	@rm -f $(VENV).log
	@touch $@

$(DEMO_STAMP): $(VENV_STAMP)
	@echo "== installing spacemoe-kit[$(DEMO_EXTRAS)] into $(VENV) (exact versions of constraints.txt)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[$(DEMO_EXTRAS)]"
	@touch $@

$(TEST_STAMP): $(VENV_STAMP)
	@echo "== installing spacemoe-kit[$(TEST_EXTRAS)] into $(VENV) (exact versions of constraints.txt; torch is large)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[$(TEST_EXTRAS)]"
	@touch $@ $(DEMO_STAMP)

# mosquitto: the production broker (without it those tests skip and the embedded broker is tested alone);
# mandoc: reads manual pages of the corpus. xz and 7z (PPMd): what the reference model's held-out bits per byte are compared with.
debian-packages:
	@missing=""; \
	PATH="$$PATH:/usr/sbin:/sbin"; \
	command -v mosquitto >/dev/null || missing="$$missing mosquitto"; \
	command -v mosquitto_pub >/dev/null || missing="$$missing mosquitto-clients"; \
	command -v xz >/dev/null || missing="$$missing xz-utils"; \
	command -v 7z >/dev/null || missing="$$missing p7zip-full"; \
	command -v mandoc >/dev/null || missing="$$missing mandoc"; \
	command -v bmaptool >/dev/null || missing="$$missing bmap-tools"; \
	command -v zstd >/dev/null || missing="$$missing zstd"; \
	command -v openssl >/dev/null || missing="$$missing openssl"; \
	command -v curl >/dev/null || missing="$$missing curl"; \
	command -v sfdisk >/dev/null || missing="$$missing fdisk"; \
	command -v mcopy >/dev/null || missing="$$missing mtools"; \
	command -v mkfs.vfat >/dev/null || missing="$$missing dosfstools"; \
	command -v debugfs >/dev/null || missing="$$missing e2fsprogs"; \
	command -v busybox >/dev/null || missing="$$missing busybox-static"; \
	command -v cpio >/dev/null || missing="$$missing cpio"; \
	command -v faketime >/dev/null || missing="$$missing faketime"; \
	command -v fish >/dev/null || missing="$$missing fish"; \
	command -v zsh >/dev/null || missing="$$missing zsh"; \
	command -v chromium >/dev/null || missing="$$missing chromium fonts-dejavu-core"; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ]; then root=""; elif sudo -n true 2>/dev/null; then root="sudo"; else root=no; fi; \
	if [ "$$root" != no ] && command -v apt-get >/dev/null; then \
	  echo "== apt-get install$$missing"; \
	  { $$root apt-get update -q && DEBIAN_FRONTEND=noninteractive $$root apt-get install -q -y --no-install-recommends $$missing; } >.apt.log 2>&1 \
	    && { rm -f .apt.log; exit 0; }; \
	  tail -n 3 .apt.log; rm -f .apt.log; \
	fi; \
	echo "== not installed:$$missing (no root, or apt-get failed): the tests that need them will be skipped"
