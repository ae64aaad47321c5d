# make book | test | lab | serve | pdf | lint | clean.  Each recipe is what a person would type.
PYTHON ?= python3
PORT   ?= 8000
BIN    := .venv/bin
READY  := .venv/.ready

.PHONY: book test lab serve pdf lint clean

book: $(READY)
	$(BIN)/jupyter-book build . -W -n --keep-going
	@echo "The book is in _build/html: open _build/html/book/intro.html, or run 'make serve'."

# Everything, the walk through every page in a real browser included.
test: $(READY) node_modules/axe-core
	$(BIN)/python -m pytest

# The accessibility checker of the browser tests; they are skipped, and say so, where there is no npm.
node_modules/axe-core:
	@if command -v npm > /dev/null; then npm install --silent --no-save --no-package-lock --no-audit --no-fund --prefix . axe-core@4.14.1; fi

# A double click on a chapter opens it as a notebook, and no news are fetched (by settings of this environment, not of the reader's own).
# In a container the reader is often root, whom Jupyter turns away unless told.
VIEWER := {"@jupyterlab/docmanager-extension:plugin": {"defaultViewers": {"markdown": "Jupytext Notebook"}}, "@jupyterlab/apputils-extension:notification": {"fetchNews": "false"}}
lab: $(READY)
	@mkdir -p .venv/share/jupyter/lab/settings
	@echo '$(VIEWER)' > .venv/share/jupyter/lab/settings/overrides.json
	PYTHONPATH="$(CURDIR)" $(BIN)/jupyter lab --notebook-dir=book $(if $(filter 0,$(shell id -u)),--allow-root)

serve:
	@test -f _build/html/index.html || { echo "There is no book yet: run 'make book' first."; exit 1; }
	@echo "http://localhost:$(PORT)/book/intro.html"
	@$(PYTHON) -m http.server $(PORT) --bind 127.0.0.1 --directory _build/html

pdf: $(READY)
	$(BIN)/python book/_ext/pdf.py

lint: $(READY)
	$(BIN)/ruff check .

clean:
	rm -rf _build .pytest_cache .ruff_cache .hypothesis

# The environment: made once, made again when requirements.txt changes.
$(READY): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2> /dev/null || { \
	  echo "This book needs Python 3.11, 3.12 or 3.13; '$(PYTHON)' is $$($(PYTHON) --version 2> /dev/null || echo not there). Try: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2> /dev/null || { \
	  echo "Python's venv module is missing: install it (on Debian and Ubuntu: apt install python3-venv) and try again."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@
