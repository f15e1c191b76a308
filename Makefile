# One target per workflow; `make help` lists them. Every target builds the virtual environment first if it has to.

PYTHON  ?= python3
MODEL   ?= smollm2-135m#     a name in checkpoints/registry.yaml, a Hub id, a Hugging Face folder or a .gguf file
DATA    ?= hpo#              hpo, pubmedqa, medquad, medqa, medmcqa, or jsonl with ARGS="--file mine.jsonl"
RUN     ?= demo#             everything a run makes goes to out/RUN
DEVICES ?= 1
NODES   ?= 1
ARGS    ?=#                  further options of the one step that is named: make lora ARGS="--train.max_steps 50"
PIP_ARGS ?=#                 further options of pip install, e.g. --extra-index-url for CPU builds of torch (see README)

MODEL := $(strip $(MODEL))
DATA  := $(strip $(DATA))
RUN   := $(strip $(RUN))
ARGS  := $(strip $(ARGS))
NAME  := $(RUN)#             the model's name in Ollama; not from the environment, where WSL keeps the machine's name

# A text as one word of the shell's, and as a part of a file's name.
quoted     = '$(subst ','\'',$(1))'
comma     := ,
space     := $(subst ,, )
filename   = $(subst $(space),-,$(subst ',-,$(subst /,--,$(1))))
# Words as the list that a step takes.
list       = '[$(subst $(space),$(comma),$(strip $(1)))]'
ifneq ($(word 2,$(RUN))$(word 2,$(DATA))$(word 2,$(NAME)),)
$(error RUN, DATA and NAME are names of files: no spaces)
endif
PY        := .venv/bin/python
STEP      := $(PY) -m workflows
INSTALLED := .venv/.installed
OUT       := out/$(RUN)
# The folder of a downloaded model is known to Python only, so this small file holds its path.
BASE      := checkpoints/.paths/$(call filename,$(MODEL))
LORA      := $(OUT)/lora/final/provenance.json
EXPORT    := $(OUT)/ollama/verification.json
# The name under which the registry first lists MODEL's weights, whether MODEL is a name (in any case) or a Hub id.
KNOWN_AS  := $(shell awk -v model=$(call quoted,$(MODEL)) '/^[a-z]/ {name = $$1; sub(/:.*/, "", name)} \
  $$1 == "hub_id:" {id = tolower($$2); id_of[name] = id; if (!(id in first)) first[id] = name} \
  END {id = tolower(model); if (id in id_of) id = id_of[id]; print (id in first) ? first[id] : id}' checkpoints/registry.yaml)
# A step's settings: the model's own recipe if there is one, else the one that suits any small model.
recipe     = $(firstword $(wildcard workflows/recipes/$(KNOWN_AS)/$(1).yaml) workflows/recipes/default/$(1).yaml)
# What make can prepare by itself, and what is scored: data sets with questions that have options.
PREPARED  := hpo pubmedqa medquad medqa medmcqa
TASKS     ?= $(or $(addsuffix _mcq,$(filter hpo,$(DATA))),$(addsuffix _local,$(filter pubmedqa medqa medmcqa,$(DATA))),\
  $(if $(wildcard data/$(DATA)_mcq/test.jsonl),$(DATA)_mcq))
# hpo's shortest kind of row, definition -> name, is what its questions ask for; KINDS= trains on all kinds.
KINDS     ?= $(if $(filter hpo,$(DATA)),name)

# A step that has run keeps in OUT/.settings/STEP what it ran with; it is stale when that has changed. DEVICES and NODES
# are not part of it: they change how fast a result comes, not which.
variables_of_lora     = MODEL=$(MODEL) DATA=$(DATA) KINDS=$(KINDS) TRAINER=$(TRAINER)
variables_of_evaluate = MODEL=$(MODEL) DATA=$(DATA) TASKS=$(TASKS)
variables_of_export   = NAME=$(NAME)
# ARGS belong to the step that is named on the command line. One that runs on the way to another keeps those it had, and
# `make demo` means the recipes as they are.
args_for   = $(if $(filter $(1) demo,$(MAKECMDGOALS)),$(ARGS),$(shell \
  sed -n 's/.* ARGS=//p' $(OUT)/.settings/$(1) 2>/dev/null))
settings   = $(variables_of_$(1)) ARGS=$(call args_for,$(1))
# FORCE if a step is to run although its files are new: its settings are others, or ARGS ask for it again.
changed    = $(if $(and $(ARGS),$(filter $(1),$(MAKECMDGOALS))),FORCE,$(shell \
  test "$$(cat $(OUT)/.settings/$(1) 2>/dev/null)" = $(call quoted,$(call settings,$(1))) || echo FORCE))
announce   = @echo $(call quoted,$(1): $(call settings,$(1)))
remember   = @mkdir -p $(OUT)/.settings && printf '%s\n' $(call quoted,$(call settings,$(1))) > $(OUT)/.settings/$(1)

BENCHES   := bench-lora bench-eval bench-export
# Long samples for the training bench: MedQuAD where its raw files are, else what the default data set has.
BENCH_DATA := $(if $(WORKFLOW_DATA),medquad,hpo)
BENCH_RAW  := $(if $(WORKFLOW_DATA),--raw_dir $(call quoted,$(WORKFLOW_DATA)/medquad))

TAKE_ARGS := download data lora merge evaluate export chat test test-fast test-slow soak $(BENCHES)
ifneq ($(and $(ARGS),$(filter demo,$(MAKECMDGOALS))),)
$(error `make demo` takes no ARGS, it has several steps. Use the variables MODEL, DATA, KINDS, TASKS, TRAINER, RUN and \
  NAME, or run the steps one by one, e.g. make lora ARGS="$(ARGS)")
endif
ifneq ($(and $(ARGS),$(filter-out help,$(MAKECMDGOALS)),$(filter-out 1,$(words $(filter $(TAKE_ARGS),$(MAKECMDGOALS))))),)
$(error ARGS are options of one step, so with them `make` takes exactly one of: $(TAKE_ARGS))
endif
ifneq ($(and $(filter evaluate,$(MAKECMDGOALS)),$(if $(TASKS),,none)),)
$(error $(DATA) has no questions with options to score a model on; `make lora` reports its loss on held-out rows. \
  To score on something else name it, e.g. make evaluate DATA=$(DATA) TASKS=medical)
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:
.PHONY: help setup demo test test-fast test-slow soak lint bench $(BENCHES) download data lora merge evaluate export chat clean FORCE

help:  ## list the targets
	@awk -F ':.*## ' '/^##@ /{printf "\n%s\n", substr($$0, 5)} /^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' Makefile
	@printf '\nVariables (now): MODEL=%s DATA=%s RUN=%s DEVICES=%s NODES=%s ARGS=%s\n' "$(MODEL)" "$(DATA)" "$(RUN)" "$(DEVICES)" "$(NODES)" "$(ARGS)"
	@echo 'Less often: TASKS="hpo_mcq medical" (what evaluate scores), KINDS=name (rows to train on), TRAINER=litgpt,'
	@echo '            NAME=mine (in Ollama), PYTHON=python3.12, PIP_ARGS="--extra-index-url ADDRESS"'

##@ Set-up
setup: $(INSTALLED)  ## build .venv with everything in it (other targets do that by themselves)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 ...")'
	$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
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

merge: $(LORA)  ## fold the adapters of RUN into a plain checkpoint
	@$(STEP) merge --checkpoint_dir $(OUT)/lora/final $(ARGS)

evaluate: $(OUT)/evaluate/lora/metrics.json  ## score base and tuned model, and test the difference

export: $(EXPORT)  ## write GGUF and Modelfile, create the model in Ollama, verify it

chat: $(INSTALLED)  ## talk to the exported model
	@$(STEP) chat --model $(NAME) $(ARGS)

##@ Quality
test: $(INSTALLED)  ## all that a fresh machine can run
	$(PY) -m pytest $(ARGS)

test-fast: $(INSTALLED)  ## tests without a real checkpoint or Ollama: half the time
	$(PY) -m pytest -m "not checkpoint and not ollama and not slow and not rough" $(ARGS)

test-slow: $(INSTALLED)  ## the long tests
	$(PY) -m pytest -m slow $(ARGS)

soak: $(INSTALLED)  ## kill the steps 100 times at random moments, and print what became of that
	$(PY) -m tests.kills $(ARGS)

lint: $(INSTALLED)  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: $(BENCHES)  ## all of the following, one after the other

bench-lora: $(BASE)  ## training: ours, LitGPT and TRL in turn
	@test -f data/$(BENCH_DATA)/manifest.json || $(STEP) data --data $(BENCH_DATA) $(BENCH_RAW)
	$(PY) -m bench.lora --checkpoint_dir "$$(cat $(BASE))" --data data/$(BENCH_DATA) $(ARGS)

bench-eval: $(BASE)  ## scoring: ours and lm-eval's hf in turn
	@test -f data/hpo_mcq/manifest.json || $(STEP) data --data hpo
	$(PY) -m bench.eval --checkpoint_dir "$$(cat $(BASE))" $(ARGS)

bench-export: $(BASE)  ## memory and time of an export at two model sizes
	$(PY) -m bench.export --checkpoint_dir "$$(cat $(BASE))" $(ARGS)

# ---- the files behind the targets ----

$(BASE): $(if $(word 2,$(MODEL)),,$(wildcard $(filter %.gguf,$(MODEL)))) | $(INSTALLED)
	@mkdir -p $(@D)
	@$(STEP) download --model "$(MODEL)" --path_file $@

data/$(DATA)/manifest.json: | $(INSTALLED)
ifneq ($(filter $(PREPARED),$(DATA)),)
	@$(STEP) data --data $(DATA)
else
	@echo 'error: there is no data/$(DATA). Prepare it from a file of yours: make data DATA=jsonl ARGS="--file FILE --name $(DATA)"' >&2; exit 1
endif

$(LORA): data/$(DATA)/manifest.json $(BASE) $(call recipe,lora) $(call changed,lora) | $(INSTALLED)
	$(call announce,lora)
	@$(STEP) lora --config $(call recipe,lora) --checkpoint_dir "$$(cat $(BASE))" --data data/$(DATA) \
	  --out_dir $(OUT)/lora --devices $(DEVICES) --num_nodes $(NODES) $(if $(KINDS),--kinds $(call list,$(KINDS))) \
	  $(if $(TRAINER),--trainer $(TRAINER)) $(call args_for,lora)
	$(call remember,lora)

$(OUT)/evaluate/base/metrics.json: data/$(DATA)/manifest.json $(BASE) $(call recipe,evaluate) $(call changed,evaluate) | $(INSTALLED)
	$(call announce,evaluate)
	@$(STEP) evaluate --config $(call recipe,evaluate) --checkpoint_dir "$$(cat $(BASE))" --tasks $(call list,$(TASKS)) \
	  --out_dir $(@D) $(call args_for,evaluate)

$(OUT)/evaluate/lora/metrics.json: $(LORA) $(OUT)/evaluate/base/metrics.json | $(INSTALLED)
	@$(STEP) evaluate --config $(call recipe,evaluate) --checkpoint_dir $(OUT)/lora/final --tasks $(call list,$(TASKS)) \
	  --baseline $(OUT)/evaluate/base --out_dir $(@D) $(call args_for,evaluate)
	$(call remember,evaluate)

$(EXPORT): $(LORA) data/$(DATA)/manifest.json $(call recipe,export) $(call changed,export) | $(INSTALLED)
	$(call announce,export)
	@$(STEP) export --config $(call recipe,export) --checkpoint_dir $(OUT)/lora/final --name $(NAME) --data data/$(DATA) \
	  --out_dir $(@D) $(call args_for,export)
	$(call remember,export)

# Without tasks the summary has validation losses only.
$(OUT)/summary.json: $(if $(TASKS),$(OUT)/evaluate/base/metrics.json $(OUT)/evaluate/lora/metrics.json) $(EXPORT) | $(INSTALLED)
	@$(STEP) demo --run_dir $(OUT) --base_dir "$$(cat $(BASE))" --data data/$(DATA) --name $(NAME) $(if $(TASKS),,--scored false)
