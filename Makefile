# Two commands do all of their own set-up: `make demo` and `make test`.
PYTHON ?= python3
PY := .venv/bin/python
# A GPU box installs requirements.txt, every other machine requirements-cpu.txt.
REQUIREMENTS := $(if $(shell command -v nvidia-smi),requirements.txt,requirements-cpu.txt)
DEMO_IMAGES ?= 2400
DEMO_PORT ?= 8017

.PHONY: demo test install lint experiments-table

install: .venv/installed

.venv/installed: $(REQUIREMENTS)
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r $(REQUIREMENTS)
	@touch $@

# About fifteen minutes on two cores. It owns data/demo and outputs/demo, and starts them anew.
demo: install
	rm -rf data/demo data/demo-source outputs/demo outputs/tiny/eval-test
	$(PY) prepare_dataset.py phantoms --images $(DEMO_IMAGES) --size 400x300 --out data/demo
	$(PY) train.py --data data/demo --model tiny --run demo --epochs 5 --batch 16 --accumulate 1 --lr 4e-3 --schedule cosine
	$(PY) evaluate.py tiny --data data/demo --no-blind
	$(PY) evaluate.py outputs/demo --data data/demo
	bash serve.sh outputs/demo --port $(DEMO_PORT) --then \
	  "$(PY) inference.py --endpoint http://127.0.0.1:$(DEMO_PORT)/v1 --data data/demo --question Q3 --json"
	@echo "data/demo: images and answers; outputs/demo: adapter/ merged/ run.json; outputs/demo/eval-test: scores.json report.html"

test: install
	$(PY) -m pytest

lint: install
	$(PY) -m ruff check . && $(PY) -m ruff format --check .

experiments-table: install
	$(PY) -m sonovqa.tables
