# Targets: install, demo, tour, chat, test, test-faults, test-slow, check, format
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: install demo tour chat test test-processes test-rest test-faults test-clusters test-kills test-slow check format clean

install: $(VENV)/.installed

$(VENV)/.installed: requirements.lock pyproject.toml
	@echo "installing the packages of requirements.lock into $(VENV): 2.4 GB or more, some minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

demo: install
	$(BIN)/bwlm grid run grids/demo.yaml

tour: install
	$(BIN)/bwlm grid run grids/tour.yaml
	$(BIN)/bwlm runs tree tour

chat: install
	$(BIN)/bwlm grid run grids/chat.yaml
	@echo "The models are small: they know the form of an answer and of these docs, spell some words, and seldom add right."
	$(BIN)/bwlm serve --open $(foreach phase,sft base,$(foreach direction,forward bidirectional,\
		chat_$(direction)_d4_lr2_s0-$(phase)))

# small matrices wait longer for a second thread than it saves, the more so beside other work
test test-faults test-slow: export OMP_NUM_THREADS := 1

# two halves of about the same length run side by side; each part is printed when it is done
test: install
	$(MAKE) --jobs 2 --keep-going --output-sync=target test-processes test-rest

test-processes:
	$(BIN)/pytest -m "processes and not faults and not slow" -o cache_dir=.pytest_cache/processes
	$(BIN)/pytest -m "not processes and not faults and not slow" -o cache_dir=.pytest_cache/records \
		tests/record tests/plan tests/storage

test-rest:
	$(BIN)/pytest -m "not processes and not faults and not slow" -o cache_dir=.pytest_cache/rest tests \
		--ignore tests/record --ignore tests/plan --ignore tests/storage

# real kills, Ray heads of their own, jobs, servers: they mostly wait for processes, so two parts run side by side
test-faults: install
	$(MAKE) --jobs 2 --keep-going --output-sync=target test-clusters test-kills

test-clusters:
	$(BIN)/pytest -m "faults and not slow" -o cache_dir=.pytest_cache/clusters tests/cluster tests/faults tests/chat

test-kills:
	$(BIN)/pytest -m "faults and not slow" -o cache_dir=.pytest_cache/kills tests \
		--ignore tests/cluster --ignore tests/faults --ignore tests/chat

test-slow: install
	$(BIN)/pytest -m slow

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
