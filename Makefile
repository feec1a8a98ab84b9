PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo demo-rounds test soak lint mutants clean

# pip would compile every file of torch and transformers, most of which nobody imports. Python compiles those that are
# imported, and an empty value lets it keep the result.
export PYTHONDONTWRITEBYTECODE :=

# .venv is made anew whenever the requirements change; the stamp is written last, so a broken install is not kept.
.venv/train: requirements.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check --no-compile -r requirements.txt
	touch $@

.venv/dev: .venv/train requirements-dev.txt
	$(BIN)/pip install -q --disable-pip-version-check --no-compile -r requirements-dev.txt
	touch $@

demo: .venv/train
	$(BIN)/python -m tools.demo

demo-rounds: .venv/train
	$(BIN)/python -m tools.rounds.demo

test: .venv/dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

soak: .venv/dev
	$(BIN)/python -m pytest -n 2 --soak tests/test_resume.py tests/test_resume_sharded.py tests/test_trainers_sharded.py tests/test_hostile.py \
		tests/tools/test_demo.py tests/tools/rounds/test_rounds_loop.py tests/test_families.py

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

mutants: .venv/dev
	$(BIN)/python tests/mutants.py --share 0.02

clean:
	rm -rf .venv .cache .mypy_cache mutants
