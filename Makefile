# Two commands do all of their own set-up: `make demo` and `make test`.
PYTHON ?= python3
PY := .venv/bin/python
# A GPU box installs requirements.txt, every other machine requirements-cpu.txt.
REQUIREMENTS := $(if $(shell command -v nvidia-smi),requirements.txt,requirements-cpu.txt)
DEMO_IMAGES ?= 2400
DEMO_PORT ?= 8017

.PHONY: demo test browser install lint doctor experiment experiments-table bench

install: .venv/installed

.venv/installed: $(REQUIREMENTS)
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 13) else "error: $(PYTHON) is Python " + sys.version.split()[0] + "; 3.11 or 3.12 is needed; make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r $(REQUIREMENTS)
	@touch $@

# About seven minutes on two cores, downloads included. It owns data/demo and outputs/demo, and starts them anew.
demo: install
	rm -rf data/demo data/demo-source outputs/demo outputs/tiny/eval-test
	$(PY) prepare_dataset.py phantoms --images $(DEMO_IMAGES) --size 400x300 --out data/demo
	$(PY) train.py --data data/demo --model tiny --run demo --epochs 5 --batch 16 --accumulate 1 --lr 4e-3 --schedule cosine
	$(PY) evaluate.py tiny --data data/demo --no-blind
	$(PY) evaluate.py outputs/demo --data data/demo
	bash serve.sh outputs/demo --port $(DEMO_PORT) --then \
	  "$(PY) inference.py --endpoint http://127.0.0.1:$(DEMO_PORT)/v1 --data data/demo --question Q3 --json"
	@echo "data/demo: images and answers; outputs/demo: adapter/ merged/ run.json; outputs/demo/eval-test: scores.json report.html"

# Tests that need a browser, vLLM or Node are skipped where it is missing. SONOVQA_ALL_TESTS=1 make test: they fail instead.
# CI leaves it unset: Chromium may not be had there, and the other tests still count.
test: install browser
	$(PY) -m pytest

# Tests of the page drive a browser. Where there is none Debian's is put in if we may; else those tests are skipped and say so.
browser:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || [ "$$(id -u)" != 0 ] || \
	  { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends chromium fonts-liberation; } \
	  >/dev/null 2>&1 || echo "no Chromium could be installed: tests that need a browser are skipped"

lint: install
	$(PY) -m ruff check . && $(PY) -m ruff format --check .

# What this machine can do, and what is missing with the way out.
doctor: install
	@$(PY) -m sonovqa.doctor

# `make experiment N=3` runs that block of experiments.md; MODEL, DATA, SEEDS and the like in front of it or behind.
experiment: install
	@$(PY) -m sonovqa.experiments $(N)

experiments-table: install
	$(PY) -m sonovqa.tables

# Shared image prefix against separate sequences, raw steps, then train.py against the peers' way; then answering.
# On a GPU box: make bench BENCH_MODEL=Qwen/Qwen3-VL-8B-Instruct BENCH_SIZE="512x384 800x600" BENCH_PAIRS="64 128 256"
BENCH_DATA ?= data/phantoms-bench
BENCH_MODEL ?= tiny
BENCH_SIZE ?= 128x96
BENCH_PAIRS ?= 64 128
BENCH_TRAIN = $(PY) -m sonovqa.bench train --data $(BENCH_DATA) --model $(BENCH_MODEL) --size $(BENCH_SIZE) --pairs $(BENCH_PAIRS)
bench: install
	test -e $(BENCH_DATA)/dataset.json || $(PY) prepare_dataset.py phantoms --images 400 --size 400x300 --out $(BENCH_DATA)
	$(BENCH_TRAIN)
	$(BENCH_TRAIN) --end-to-end
	$(PY) -m sonovqa.bench answer --data $(BENCH_DATA) --model $(BENCH_MODEL)
