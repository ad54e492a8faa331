# Two commands do all of their own set-up: `make demo` and `make test`.
PYTHON ?= python3
PY := .venv/bin/python
# A GPU box installs requirements.txt, every other machine requirements-cpu.txt.
REQUIREMENTS := $(if $(shell command -v nvidia-smi),requirements.txt,requirements-cpu.txt)
DEMO_IMAGES ?= 1600
DEMO_PORT ?= 8017

.PHONY: demo test install lint clean-demo

install: .venv/installed

.venv/installed: $(REQUIREMENTS)
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r $(REQUIREMENTS)
	@touch $@

demo: install
	$(PY) prepare_dataset.py phantoms --images $(DEMO_IMAGES) --out data/demo
	$(PY) train.py --data data/demo --model tiny --run demo --epochs 8 --batch 16 --accumulate 1 --lr 4e-3 --schedule cosine
	$(PY) evaluate.py outputs/demo --data data/demo --base tiny
	bash serve.sh outputs/demo --port $(DEMO_PORT) --then "$(PY) inference.py --endpoint http://127.0.0.1:$(DEMO_PORT)/v1 --data data/demo --question Q3 --json"

test: install
	$(PY) -m pytest

lint: install
	$(PY) -m ruff check . && $(PY) -m ruff format --check .
