# One target per workflow; `make help` lists them. Every target builds the virtual environment first if it has to.

PYTHON  ?= python3
MODEL   ?= smollm2-135m#     a name in checkpoints/registry.yaml, a Hub id, a Hugging Face folder or a .gguf file
DATA    ?= hpo#              hpo, pubmedqa, medquad, medqa, medmcqa, or jsonl with ARGS="--file mine.jsonl"
RUN     ?= demo#             everything a run makes goes to out/RUN
DEVICES ?= 1
NODES   ?= 1
ARGS    ?=#                  further options of the step, e.g. ARGS="--train.max_steps 50"
PIP_ARGS ?=#                 further options of pip install, e.g. an index with CPU builds of torch

MODEL := $(strip $(MODEL))
DATA  := $(strip $(DATA))
RUN   := $(strip $(RUN))
NAME  ?= $(RUN)#             the model's name in Ollama

PY        := .venv/bin/python
STEP      := $(PY) -m workflows
INSTALLED := .venv/.installed
OUT       := out/$(RUN)
# The folder of a downloaded model is known to Python only, so this small file holds its path.
BASE      := checkpoints/.paths/$(subst /,--,$(MODEL))
LORA      := $(OUT)/lora/final/provenance.json
EXPORT    := $(OUT)/ollama/verification.json
# A step's settings: the model's own recipe if there is one, else the one that suits any small model.
recipe     = $(firstword $(wildcard workflows/recipes/$(MODEL)/$(1).yaml) workflows/recipes/default/$(1).yaml)
TASKS     ?= $(if $(filter hpo,$(DATA)),hpo_mcq,$(DATA)_local)
# hpo's shortest kind of row, definition -> name, is what its questions ask for; KINDS= trains on all kinds.
KINDS     ?= $(if $(filter hpo,$(DATA)),name)
# Options on the command line mean: do it again with these.
AGAIN     := $(if $(strip $(ARGS)),FORCE)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:
.PHONY: help setup demo test test-fast test-slow lint bench download data lora merge evaluate export chat clean FORCE

help:  ## list the targets
	@awk -F ':.*## ' '/^##@ /{printf "\n%s\n", substr($$0, 5)} /^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' Makefile
	@printf '\nVariables (now): MODEL=%s DATA=%s RUN=%s DEVICES=%s NODES=%s ARGS=%s\n' "$(MODEL)" "$(DATA)" "$(RUN)" "$(DEVICES)" "$(NODES)" "$(ARGS)"

##@ Set-up
setup: $(INSTALLED)  ## build .venv with everything in it (other targets do that by themselves)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 ...")'
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@

clean:  ## delete what the runs made (out/, data/); downloads, checkpoints and .venv stay
	rm -rf out data

##@ The road: from an open checkpoint to your own model in Ollama
demo: $(OUT)/summary.json  ## all of it with a small real model, and a table of what changed
	@$(STEP) demo --run_dir $(OUT) --show true

download: $(INSTALLED)  ## get MODEL and bring it into LitGPT's form
	@mkdir -p checkpoints/.paths
	@$(STEP) download --model "$(MODEL)" --path_file $(BASE) $(ARGS)

data: $(INSTALLED)  ## prepare DATA as JSONL with a manifest
	@$(STEP) data --data $(DATA) $(ARGS)

lora: $(LORA)  ## fine-tune MODEL on DATA with LoRA (TRAINER=litgpt: by LitGPT's own command)

merge: $(INSTALLED)  ## fold the adapters of RUN into a plain checkpoint
	@$(STEP) merge --checkpoint_dir $(OUT)/lora/final $(ARGS)

evaluate: $(OUT)/evaluate/lora/metrics.json  ## score base and tuned model, and test the difference

export: $(EXPORT)  ## write GGUF and Modelfile, create the model in Ollama, verify it

chat: $(INSTALLED)  ## talk to the exported model
	@$(STEP) chat --model $(NAME) $(ARGS)

##@ Custom models: the transformer family from scratch, see custom_models/README.md

##@ Quality
test: $(INSTALLED)  ## all that a fresh machine can run
	$(PY) -m pytest $(ARGS)

test-fast: $(INSTALLED)  ## tests without a real checkpoint or Ollama, under a minute
	$(PY) -m pytest -m "not checkpoint and not ollama and not slow" $(ARGS)

test-slow: $(INSTALLED)  ## the long tests
	$(PY) -m pytest -m slow $(ARGS)

lint: $(INSTALLED)  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: $(INSTALLED)  ## measure ours against LitGPT and TRL in one run
	$(PY) -m bench.lora $(ARGS)

# ---- the files behind the targets ----

$(BASE): | $(INSTALLED)
	@mkdir -p $(@D)
	@$(STEP) download --model "$(MODEL)" --path_file $@

data/$(DATA)/manifest.json: | $(INSTALLED)
	@$(STEP) data --data $(DATA)

$(LORA): $(BASE) data/$(DATA)/manifest.json $(call recipe,lora) $(AGAIN) | $(INSTALLED)
	@$(STEP) lora --config $(call recipe,lora) --checkpoint_dir "$$(cat $(BASE))" --data data/$(DATA) \
	  --out_dir $(OUT)/lora --devices $(DEVICES) --num_nodes $(NODES) $(if $(KINDS),--kinds '[$(KINDS)]') \
	  $(if $(TRAINER),--trainer $(TRAINER)) $(ARGS)

$(OUT)/evaluate/base/metrics.json: $(BASE) data/$(DATA)/manifest.json $(call recipe,evaluate) | $(INSTALLED)
	@$(STEP) evaluate --config $(call recipe,evaluate) --checkpoint_dir "$$(cat $(BASE))" --tasks '[$(TASKS)]' \
	  --out_dir $(@D)

$(OUT)/evaluate/lora/metrics.json: $(LORA) $(OUT)/evaluate/base/metrics.json $(call recipe,evaluate) $(AGAIN) | $(INSTALLED)
	@$(STEP) evaluate --config $(call recipe,evaluate) --checkpoint_dir $(OUT)/lora/final --tasks '[$(TASKS)]' \
	  --baseline $(OUT)/evaluate/base --out_dir $(@D) $(ARGS)

$(EXPORT): $(LORA) data/$(DATA)/manifest.json $(call recipe,export) $(AGAIN) | $(INSTALLED)
	@$(STEP) export --config $(call recipe,export) --checkpoint_dir $(OUT)/lora/final --name $(NAME) --data data/$(DATA) \
	  --out_dir $(@D) $(ARGS)

$(OUT)/summary.json: $(OUT)/evaluate/base/metrics.json $(OUT)/evaluate/lora/metrics.json $(EXPORT) | $(INSTALLED)
	@$(STEP) demo --run_dir $(OUT) --base_dir "$$(cat $(BASE))" --data data/$(DATA) --name $(NAME)
