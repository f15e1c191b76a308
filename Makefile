# One target per workflow; `make help` lists them. Every target builds the virtual environment first if it has to.

# What `make deepseek` gets, unless MODEL is given: a tag of Ollama's registry.
R1      := $(if $(filter undefined,$(origin MODEL)),deepseek-r1:1.5b,$(MODEL))

PYTHON  ?= python3
MODEL   ?= smollm2-135m#     a name in checkpoints/registry.yaml, a Hub id, a Hugging Face folder or a .gguf file
DATA    ?= assistant#        assistant, hpo, general, pubmedqa, medquad, medqa, medmcqa, or jsonl with ARGS="--file mine.jsonl"
RUN     ?= demo#             everything a run makes goes to out/RUN
RUNS    ?= $(RUN)#           what `make report` shows side by side
HARDWARE ?=#              24gb, 80gb, 8x80gb: the recipes for these GPUs, of a MODEL that has such (docs/large-models.md)
DEVICES ?= $(if $(findstring x,$(HARDWARE)),$(firstword $(subst x, ,$(HARDWARE))),1)
NODES   ?= 1
ARGS    ?=#                  further options of the one step that is named: make lora ARGS="--train.max_steps 50"
PIP_ARGS ?=#                 further options of pip install, e.g. --extra-index-url for CPU builds of torch (see README)

MODEL := $(strip $(MODEL))
DATA  := $(strip $(DATA))
RUN   := $(strip $(RUN))
HARDWARE := $(strip $(HARDWARE))
ARGS  := $(strip $(ARGS))
NAME  := $(RUN)#             the model's name in Ollama; not from the environment, where WSL keeps the machine's name

# A text as one word of the shell's, and as a part of a file's name.
quoted     = '$(subst ','\'',$(1))'
comma     := ,
space     := $(subst ,, )
filename   = $(subst $(space),-,$(subst ',-,$(subst :,-,$(subst /,--,$(1)))))
# Words as the list that a step takes.
list       = '[$(subst $(space),$(comma),$(strip $(1)))]'
ifneq ($(word 2,$(RUN))$(word 2,$(DATA))$(word 2,$(NAME)),)
$(error RUN, DATA and NAME are names of files: no spaces)
endif
PY        := .venv/bin/python
STEP      := $(PY) -m workflows
PROJECT   := $(PY) -m custom_models
INSTALLED := .venv/.installed
OUT       := out/$(RUN)
# The folder of a downloaded model is known to Python only, so this small file holds its path.
BASE      := checkpoints/.paths/$(call filename,$(MODEL))
trained    = $(OUT)/$(1)/final/provenance.json
EXPORT    := $(OUT)/ollama/verification.json
# The name under which the registry first lists MODEL's weights, whether MODEL is a name (in any case) or a Hub id.
KNOWN_AS  := $(shell awk -v model=$(call quoted,$(MODEL)) '/^[a-z]/ {name = $$1; sub(/:.*/, "", name)} \
  $$1 == "hub_id:" {id = tolower($$2); id_of[name] = id; if (!(id in first)) first[id] = name} \
  END {id = tolower(model); if (id in id_of) id = id_of[id]; print (id in first) ? first[id] : id}' checkpoints/registry.yaml)
# Film reviews to learn from: real files where they are, else those that a package has; what reads them; what is read.
REVIEWS   ?= $(if $(wildcard $(WORKFLOW_DATA)/sentence_polarity),sentence_polarity,movie_snippets)
ENCODER   ?= scratch
TEXT      ?=
# Sentences with marked entities to learn from, and the T5 that learns: our own, or one by its folder or Hub id.
ENTITIES  ?= $(if $(wildcard $(WORKFLOW_DATA)/bc5cdr),bc5cdr,hpo_entities)
T5        ?= scratch
# What `make translate` learns from: what programs say, catalogues_fr or _de; python_javascript; opus_books_fr or _de.
PARALLEL  ?= catalogues_fr
# What a GPT is trained by: gpt, gpt-shakespeare, gpt-shakespeare-small (custom_models/recipes); it goes to out/RECIPE.
RECIPE    ?= gpt
PROMPT    ?=
# What is summarised, and how: by choosing sentences (extractive) or in words of the model's own (abstractive).
DOCUMENTS ?= $(if $(wildcard $(WORKFLOW_DATA)/scitldr),scitldr,docstrings)
METHOD    ?= extractive
# Questions about texts: hpo_spans, squad, or one's own; and the file that `make answer` answers from.
QUESTIONS ?= hpo_spans
CONTEXT   ?=
# The questions that `make ask` has answered, a line of JSON each; or a text for `make translate-text`.
FILE      ?=
# What a project makes: each model has its folder in that of the data that it learned from.
CLASSIFIER = out/sentiment/$(REVIEWS)/$(call filename,$(ENCODER))
TAGGER     = out/ner/$(ENTITIES)/$(call filename,$(T5))
AUTOTRAIN  = out/ner-autotrain/$(ENTITIES)/$(call filename,$(T5))
READER     = out/qa/$(QUESTIONS)/$(call filename,$(ENCODER))
SUMMARIZER = out/summarize/$(DOCUMENTS)/$(call filename,$(pretrained))$(if $(filter extractive,$(METHOD)),,-$(METHOD))
TRANSLATOR = out/translate/$(PARALLEL)
# The figures of a project's latest model are out/PROJECT/metrics.json, too: $(call latest,its folder) at the command's end.
latest     = && if test -f $(1)/metrics.json; then ln -sfn $(patsubst out/$@/%,%,$(1))/metrics.json out/$@/metrics.json; fi
# The encoder of projects that begin at pretrained weights.
pretrained = $(if $(filter scratch,$(ENCODER)),minilm,$(ENCODER))
project_recipe = $(firstword $(wildcard $(1:%=custom_models/recipes/%.yaml)) custom_models/recipes/$(2).yaml)
# A step's settings: the model's own recipe, for this very hardware or data if there is one, else the one that suits any
# small model.
recipe     = $(firstword $(wildcard $(addprefix workflows/recipes/$(KNOWN_AS)/$(1),$(HARDWARE:%=-%.yaml) -$(DATA).yaml) \
  workflows/recipes/default/$(1)-$(DATA).yaml workflows/recipes/$(KNOWN_AS)/$(1).yaml) workflows/recipes/default/$(1).yaml)
# What distill-lm trains on: the answers of the data, beside the teacher's distributions, or such as the teacher wrote.
ANSWERS   ?= data
ANSWERS   := $(strip $(ANSWERS))
ifeq ($(filter data teacher,$(ANSWERS)),)
$(error ANSWERS is data or teacher, not "$(ANSWERS)")
endif
# What make can prepare by itself, for the road and for projects, and what is scored: data sets with questions that have
# options.
COLLECTIONS := instruction_preference orca ultrafeedback_binarized ultramedical_preference
PREPARED  := assistant general hpo hpo_thoughts pubmedqa medquad medqa medmcqa $(COLLECTIONS)
PROJECT_DATA := movie_snippets sentence_polarity sst2 pubmedqa_decisions hpo_entities bc5cdr ncbi_disease wnut_17 conll2003 \
  docstrings scitldr meqsum pubmedqa_conclusions cnn_dailymail xsum hpo_spans squad catalogues_fr catalogues_de opus_books_fr \
  opus_books_de python_javascript
# Rows that `lora` mixes into its own, so that what MODEL could do stays: "general" is MODEL's own answers to everyday prompts,
# any other name is a folder of data/, none trains without. The answers are those of one model, so its name is in the folder's.
REPLAY    ?= $(if $(TRAINER),,$(if $(filter assistant,$(DATA)),general))
REPLAY    := $(strip $(REPLAY))
REPLAYED  := $(if $(filter general,$(REPLAY)),data/general-$(call filename,$(MODEL))_taught,$(REPLAY:%=data/%))
# MORE_TASKS are scored of MODEL and of the last stage alone: an assistant's findings that it was not taught.
MORE_TASKS := $(if $(filter undefined,$(origin TASKS)),$(if $(filter assistant,$(DATA)),hpo_mcq))
scored_apart := $(MORE_TASKS:%=data/%/manifest.json)
TASKS     ?= $(or $(addsuffix _mcq,$(filter hpo,$(DATA))),$(addsuffix _local,$(filter pubmedqa medqa medmcqa,$(DATA))),\
  $(if $(filter assistant,$(DATA)),assistant_questions $(notdir $(filter %_taught,$(REPLAYED)))),\
  $(if $(wildcard data/$(DATA)_mcq/test.jsonl),$(DATA)_mcq))
# The kind of row that a data set's questions ask for (hpo: definition -> name); KINDS= trains on all kinds.
KINDS     ?= $(if $(filter hpo,$(DATA)),name,$(if $(filter medqa medmcqa,$(DATA)),answer))
# Preferences about the same questions, or a collection of preferences that was named itself.
PAIRS     ?= $(or $(filter $(COLLECTIONS),$(DATA)),$(addsuffix _pairs,$(if $(wildcard data/$(DATA)_pairs/train.jsonl),$(DATA),\
  $(filter assistant hpo,$(DATA)))))
# Questions whose answers grpo samples and judges: those of an assistant are in wordings of their own.
ASKED     := $(DATA)$(if $(filter assistant,$(DATA)),_questions)
# The training of a run, step by step: each goes on from the one before it, the first from MODEL. lora is part of it, unless
# DATA is preferences; of the others those that are named now or have run, and for a demo whatever the data is good for.
goes       = $(or $(filter $(1),$(MAKECMDGOALS)),$(if $(filter demo,$(MAKECMDGOALS)),$(2),$(wildcard $(call trained,$(1)))))
STAGES    ?= $(if $(filter $(COLLECTIONS),$(DATA)),,lora) \
  $(if $(and $(or $(PAIRS),$(filter dpo,$(MAKECMDGOALS))),$(call goes,dpo,$(PAIRS))),dpo) \
  $(if $(call goes,ppo),ppo) $(if $(call goes,grpo,$(filter assistant hpo,$(DATA))),grpo)
STAGES    := $(strip $(STAGES))
# What a step goes on from: its predecessor among the stages, a reward model and all of distillation from the lora stage,
# which is the teacher, the student from its layers; nothing stands for MODEL.
upto       = $(if $(filter $(1),$(firstword $(2))),,$(firstword $(2)) $(if $(2),$(call upto,$(1),$(wordlist 2,$(words $(2)),$(2)))))
from       = $(if $(filter distill-lm,$(1)),shrink,$(if $(filter reward shrink teach,$(1)),$(filter lora,$(STAGES)),$(lastword \
  $(call upto,$(1),$(STAGES)))))
input      = $(if $(call from,$(1)),$(call trained,$(call from,$(1))),$(BASE))
input_dir  = $(if $(call from,$(1)),$(OUT)/$(call from,$(1))/final,"$$(cat $(BASE))")
LAST      := $(lastword $(STAGES))

# A step that has run keeps in OUT/.settings/STEP what it ran with; it is stale when that has changed. DEVICES and NODES
# are not part of it: they change how fast a result comes, not which.
variables_of_lora     = MODEL=$(MODEL) DATA=$(DATA) KINDS=$(KINDS) TRAINER=$(TRAINER)$(if $(REPLAY), REPLAY=$(REPLAY))
variables_of_dpo      = MODEL=$(MODEL) PAIRS=$(PAIRS) FROM=$(call from,dpo)
variables_of_reward   = MODEL=$(MODEL) PAIRS=$(PAIRS) FROM=$(call from,reward)
variables_of_ppo      = MODEL=$(MODEL) PAIRS=$(PAIRS) FROM=$(call from,ppo)
variables_of_grpo     = MODEL=$(MODEL) DATA=$(DATA) KINDS=$(KINDS) FROM=$(call from,grpo)
variables_of_shrink   = MODEL=$(MODEL) FROM=$(call from,shrink)
variables_of_teach    = MODEL=$(MODEL) DATA=$(DATA) KINDS=$(KINDS) FROM=$(call from,teach)
variables_of_distill-lm = MODEL=$(MODEL) DATA=$(DATA) KINDS=$(KINDS) ANSWERS=$(ANSWERS) FROM=$(call from,teach)
variables_of_evaluate = MODEL=$(MODEL) DATA=$(DATA) TASKS=$(TASKS)$(if $(MORE_TASKS), MORE_TASKS=$(MORE_TASKS))
variables_of_export   = NAME=$(NAME) FROM=$(LAST)
# ARGS belong to the step that is named on the command line. One that runs on the way to another keeps those it had, and
# `make demo` means the recipes as they are, but for those that would take too long for a demo.
args_for   = $(if $(filter $(1),$(MAKECMDGOALS)),$(ARGS),$(if $(filter demo,$(MAKECMDGOALS)),$(demo_args_$(1)),$(shell \
  sed -n 's/.* ARGS=//p' $(OUT)/.settings/$(1) 2>/dev/null)))
demo_args_dpo  := $(if $(filter hpo,$(DATA)),--max_test_rows 200)
demo_args_grpo := $(if $(filter hpo,$(DATA)),--train.max_steps 24 --train.eval_interval 24 --max_test_rows 200)
settings   = $(variables_of_$(1))$(if $(filter %-$(HARDWARE).yaml,$(call recipe,$(1))), HARDWARE=$(HARDWARE)) ARGS=$(call args_for,$(1))
# FORCE if a step is to run although its files are new: its settings are others, or ARGS ask for it again.
changed    = $(if $(and $(ARGS),$(filter $(1),$(MAKECMDGOALS))),FORCE,$(shell \
  test "$$(cat $(OUT)/.settings/$(1) 2>/dev/null)" = $(call quoted,$(call settings,$(1))) || echo FORCE))
announce   = @echo $(call quoted,$(1): $(call settings,$(1)))
# What `make demo` says before each of its stages.
STAGED    := data download $(if $(REPLAY),replay) $(STAGES) $(if $(TASKS),evaluate) export
stage      = $(if $(filter demo,$(MAKECMDGOALS)),@$(STEP) stage --name $(1) --stages $(call list,$(STAGED)) --run_dir $(OUT) \
  --model $(call quoted,$(KNOWN_AS)) --data $(DATA)$(REPLAYED:%= --replay %))
remember   = @mkdir -p $(OUT)/.settings && printf '%s\n' $(call quoted,$(call settings,$(1))) > $(OUT)/.settings/$(1)

# What `make plan` plans: a step with its recipe, as it would be run; MODEL need not have been downloaded.
PLANNED   ?= lora
MEMORY    ?=
TFLOPS    ?=
planned_model = $(or $(wildcard $(shell cat $(BASE) 2>/dev/null)),$(KNOWN_AS))
# A student is that of the run, if it was made; MODEL stands for it, and for its teacher, if not.
student = $(if $(filter distill-lm,$(1)),$(wildcard $(OUT)/shrink/final))
planned_options = $(if $(wildcard $(call recipe,$(1))),--config $(call recipe,$(1))) \
  --checkpoint_dir $(call quoted,$(or $(call student,$(1)),$(planned_model))) \
  $(if $(filter $(TRAINING) distill-lm,$(1)),--data $(call rows_of,$(1)) --devices $(DEVICES) --num_nodes $(NODES)) \
  $(if $(or $(filter $(TRAINING),$(1)),$(call student,$(1))),$(options_of_$(1)),$(if $(filter distill-lm,$(1)),$(asked_kinds))) \
  $(if $(filter evaluate,$(1)),--tasks $(call list,$(TASKS))) $(if $(MEMORY),--memory $(call quoted,$(MEMORY))) $(if $(TFLOPS),--tflops $(TFLOPS))

BENCHES   := bench-lora bench-eval bench-export bench-dpo bench-grpo bench-bpe bench-flash bench-distill bench-gpt bench-plan
# Long samples for the training bench: MedQuAD where its raw files are, else what the default data set has.
BENCH_DATA := $(if $(WORKFLOW_DATA),medquad,hpo)
BENCH_RAW  := $(if $(WORKFLOW_DATA),--raw_dir $(call quoted,$(WORKFLOW_DATA)/medquad))

TRAINING  := lora dpo reward ppo grpo
PROJECTS  := sentiment pretrain distill predict attention-map gpt gpt-sample gpt-dpo expert-load lora-scratch \
  pretrain-t5 ner ner-predict ner-autotrain summarize qa answer translate translate-text
TAKE_ARGS := download data $(TRAINING) merge evaluate evaluate-ollama export chat ask deepseek report status shrink teach distill-lm \
  plan test test-fast test-slow test-gpu soak \
  $(PROJECTS) $(BENCHES)
ifneq ($(and $(ARGS),$(filter demo,$(MAKECMDGOALS))),)
$(error `make demo` takes no ARGS, it has several steps. Use the variables MODEL, DATA, KINDS, PAIRS, STAGES, TASKS, TRAINER, \
  REPLAY, RUN and NAME, or run the steps one by one, e.g. make lora ARGS="$(ARGS)")
endif
ifneq ($(and $(ARGS),$(filter-out help,$(MAKECMDGOALS)),$(filter-out 1,$(words $(filter $(TAKE_ARGS),$(MAKECMDGOALS))))),)
$(error ARGS are options of one step, so with them `make` takes exactly one of: $(TAKE_ARGS))
endif
# What a model is asked must be there before it is trained for that.
refuse_without = $(if $(and $(filter $(1),$(MAKECMDGOALS)),$(if $(strip $(2)),,none)),$(error `make $(1)` needs $(3)))
readable   = $(if $(1),$(shell test -r $(call quoted,$(1)) && test ! -d $(call quoted,$(1)) && echo yes))
$(call refuse_without,ask,$(FILE),a file with a line such as {"question": "…"} for each question: make ask FILE=questions.jsonl NAME=$(NAME))
$(call refuse_without,predict,$(TEXT),a text: make predict TEXT="two hours of my life")
$(call refuse_without,ner-predict,$(TEXT),a text: make ner-predict TEXT="Seizures after lithium")
$(call refuse_without,answer,$(and $(TEXT),$(call readable,$(CONTEXT))),a question and a file that can be read: \
  make answer TEXT="question" CONTEXT=file)
$(call refuse_without,translate-text,$(if $(FILE),$(call readable,$(FILE)),$(TEXT)),a text or a file that can be read: \
  make translate-text TEXT="…" or make translate-text FILE=file)
$(call refuse_without,summarize,$(if $(TEXT),$(call readable,$(TEXT)),training),a file that can be read: make summarize TEXT=file)
ifneq ($(and $(filter evaluate evaluate-ollama,$(MAKECMDGOALS)),$(if $(TASKS),,none)),)
$(error $(DATA) has no questions with options to score a model on; `make lora` reports its loss on held-out rows. \
  To score on something else name it, e.g. make evaluate DATA=$(DATA) TASKS=medical)
endif

ifneq ($(and $(HARDWARE),$(filter $(TRAINING) demo,$(MAKECMDGOALS))),)
ifeq ($(wildcard workflows/recipes/$(KNOWN_AS)/*-$(HARDWARE).yaml),)
$(error $(MODEL) has no recipes for HARDWARE=$(HARDWARE). There are: $(patsubst workflows/recipes/%.yaml,%,\
  $(sort $(foreach size,24gb 80gb,$(wildcard workflows/recipes/*/*$(size).yaml)))))
endif
endif

ifneq ($(or $(filter dpo ppo,$(STAGES)),$(filter reward,$(MAKECMDGOALS))),)
ifeq ($(PAIRS),)
$(error $(DATA) has no preferences to learn from. Name some: PAIRS=orca (or another of $(COLLECTIONS)), or your own, \
  prepared by make data DATA=jsonl ARGS="--file pairs.jsonl --name mine_pairs")
endif
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.SUFFIXES:
.PHONY: help setup demo test test-fast test-slow test-gpu soak lint bench $(BENCHES) download data $(TRAINING) merge evaluate export chat \
  ask deepseek evaluate-ollama report status shrink teach distill-lm plan $(PROJECTS) clean FORCE

help:  ## list the targets
	@awk -F ':.*## ' '/^##@ /{printf "\n%s\n", substr($$0, 5)} /^[a-z0-9-]+:.*## /{printf "  make %-15s %s\n", $$1, $$2}' Makefile
	@printf '\nVariables (now): MODEL=%s DATA=%s RUN=%s DEVICES=%s NODES=%s ARGS=%s\n' "$(MODEL)" "$(DATA)" "$(RUN)" "$(DEVICES)" "$(NODES)" "$(ARGS)"
	@echo 'Less often: STAGES="lora dpo" (training steps, in turn), TASKS="hpo_mcq medical" (what evaluate scores), KINDS=name'
	@echo '            (rows to train on), PAIRS=orca (preferences), TRAINER=litgpt, REPLAY=general (MODEL'"'"'s own answers'
	@echo '            among the rows), ANSWERS=teacher (to distill from), NAME=mine (in Ollama),'
	@echo '            PYTHON=python3.12, PIP_ARGS="--extra-index-url ADDRESS", TEXT="…" and ENCODER=minilm (projects),'
	@echo '            REVIEWS=sst2, ENTITIES=ncbi_disease, DOCUMENTS=xsum, QUESTIONS=squad, PARALLEL=catalogues_de (what they read),'
	@echo '            T5=google-t5/t5-small (ner, ner-autotrain), METHOD=abstractive (summarize), RECIPE=gpt-shakespeare and'
	@echo '            PROMPT="…" (gpt, gpt-sample), RUNS="demo bigger" (report), FILE=questions.jsonl (ask), HARDWARE=8x80gb'
	@echo '            (recipes for large GPUs: docs/large-models.md), PLANNED=dpo, MEMORY=24GB and TFLOPS=200 (plan)'

##@ Set-up
setup: $(INSTALLED)  ## build .venv with everything in it (other targets do that by themselves)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 ...")'
	@printf '%s\n' 'setup: builds .venv with PyTorch, LitGPT, lm-eval and the tools of the tests: 3.5 GB on the disk with the CPU build of' \
	  '       torch, about 4 GB more with the CUDA build, which pip takes on Linux (README.md names the option for the other).' \
	  '       It takes some minutes. Ollama (0.6 GB) comes with the first export, if there is none on this machine.'
	$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(PY) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@

clean:  ## delete what the runs made (out/, data/); downloads, checkpoints and .venv stay
	rm -rf out data

plan: $(INSTALLED)  ## say what a step would take and what fits: PLANNED=dpo MEMORY=24GB TFLOPS=200 (before MODEL is downloaded, too)
	@$(STEP) plan $(PLANNED) $(call planned_options,$(PLANNED)) $(ARGS)

##@ The road: from an open checkpoint to your own model in Ollama
demo: $(OUT)/summary.json  ## make an assistant of a small model: every stage's answers and scores side by side
	@$(STEP) demo --run_dir $(OUT) --show true

download: $(INSTALLED)  ## get MODEL and bring it into LitGPT's form
	@mkdir -p checkpoints/.paths
	@$(STEP) download --model "$(MODEL)" --path_file $(BASE) $(ARGS)

data: $(INSTALLED)  ## prepare DATA as JSONL with a manifest
	@$(STEP) data --data $(DATA) $(ARGS)

lora: $(call trained,lora)  ## fine-tune MODEL on DATA with LoRA (TRAINER=litgpt: by LitGPT's own command)

dpo: $(call trained,dpo)  ## align it with preferences, PAIRS: better answers against worse ones

grpo: $(call trained,grpo)  ## align it with rewards: answers of its own, of which the better ones become likelier

reward: $(call trained,reward)  ## train a reward model on PAIRS

ppo: $(call trained,ppo)  ## align it with that reward model (RLHF)

shrink: $(call trained,shrink)  ## make a student of half the teacher's layers; the teacher is RUN's fine-tuned MODEL

distill-lm: $(call trained,distill-lm)  ## train the student to say what its teacher would (ANSWERS=teacher: on answers that it wrote)

teach: $(OUT)/taught/manifest.json  ## let the teacher write those answers

merge: $(call trained,$(LAST))  ## fold the adapters of RUN's last training step into a plain checkpoint
	@$(STEP) merge --checkpoint_dir $(OUT)/$(LAST)/final $(ARGS)

evaluate: $(STAGES:%=$(OUT)/evaluate/%/metrics.json)  ## score MODEL and what each training step made of it, and test the difference

export: $(EXPORT)  ## write GGUF and Modelfile, create the model in Ollama, verify it

chat: $(INSTALLED)  ## talk to the exported model
	@$(STEP) chat --model $(NAME) $(ARGS)

report: $(INSTALLED)  ## write a page about RUN: curves, scores, answers, checks (RUNS="demo other": side by side)
	@$(STEP) report --runs $(call list,$(RUNS)) $(ARGS)

status: $(INSTALLED)  ## show what runs, what was stopped and how it goes on, what is finished
	@$(STEP) status $(ARGS)

ask: $(INSTALLED)  ## have the questions in FILE answered by it, a line of JSON each (ARGS="--schema form.json": in that form)
	@$(STEP) ask --model $(NAME) --file $(call quoted,$(FILE)) $(ARGS)

evaluate-ollama: data/$(DATA)/manifest.json $(scored_apart)  ## score what Ollama serves under NAME, each of its types, beside LitGPT where RUN made it
	@$(STEP) evaluate-ollama --model $(NAME) --tasks $(call list,$(or $(MORE_TASKS),$(TASKS))) \
	  $(if $(and $(filter $(RUN),$(NAME)),$(wildcard $(call trained,$(LAST)))),--checkpoint_dir $(OUT)/$(LAST)/final) $(ARGS)

deepseek: $(if $(or $(findstring :,$(R1)),$(filter %.gguf,$(R1))),$(INSTALLED),data/$(DATA)/manifest.json)  ## get DeepSeek-R1 into Ollama: MODEL=deepseek-r1:7b (a tag), a model of the Hub, a checkpoint or a .gguf file
	@$(STEP) deepseek --config $(call recipe,deepseek) --model $(call quoted,$(R1)) \
	  --data data/$(DATA) --name $(if $(filter command%,$(origin NAME)),$(NAME),deepseek) $(ARGS)

##@ From scratch: what custom_models/ is about (custom_models/README.md has the reading order)
sentiment: data/$(REVIEWS)/manifest.json  ## train a classifier of film reviews: ENCODER=scratch, minilm, or a BERT from the Hub
	@$(PROJECT) sentiment --config $(call project_recipe,sentiment-$(ENCODER),sentiment-pretrained) --data data/$(REVIEWS) \
	  --encoder $(call quoted,$(ENCODER)) --out_dir $(CLASSIFIER) $(ARGS) $(call latest,$(CLASSIFIER))

predict: $(CLASSIFIER)/final/config.json  ## name the class of TEXT by that classifier
	@$(PROJECT) predict --checkpoint_dir $(CLASSIFIER)/final --text $(call quoted,$(TEXT)) $(ARGS)

distill: out/sentiment/$(REVIEWS)/minilm/final/config.json data/$(REVIEWS)/manifest.json  ## distil the fine-tuned MiniLM into a student of half its layers
	@$(PROJECT) distill --config custom_models/recipes/distill.yaml --data data/$(REVIEWS) \
	  --teacher_dir out/sentiment/$(REVIEWS)/minilm/final --out_dir out/distill/$(REVIEWS) $(ARGS) $(call latest,out/distill/$(REVIEWS))

# A model that is asked for, and not there yet, is trained first.
out/sentiment/$(REVIEWS)/%/final/config.json:
	@$(MAKE) --no-print-directory sentiment ENCODER=$(if $(filter minilm,$*),minilm,$(call quoted,$(ENCODER))) ARGS=

pretrain: $(INSTALLED)  ## pretrain an encoder by hiding tokens, RoBERTa's way (ARGS="--style bert" for BERT's)
	@$(PROJECT) pretrain --config custom_models/recipes/pretrain.yaml $(ARGS)

gpt: $(INSTALLED)  ## train a GPT on definitions (RECIPE=gpt-shakespeare: Shakespeare; ARGS="--text FILE": a text of yours)
	@$(PROJECT) gpt --config custom_models/recipes/$(RECIPE).yaml --out_dir out/$(RECIPE) --devices $(DEVICES) \
	  --num_nodes $(NODES) $(ARGS)

gpt-sample: out/$(RECIPE)/final/config.json  ## let it write on from PROMPT
	@$(PROJECT) gpt-sample --checkpoint_dir out/$(RECIPE)/final --prompt $(call quoted,$(PROMPT)) $(ARGS)

out/$(RECIPE)/final/config.json: | $(INSTALLED)
	@$(MAKE) --no-print-directory $(if $(filter gpt-dpo,$(RECIPE)),gpt-dpo,gpt) ARGS=

gpt-dpo: $(INSTALLED)  ## a GPT of our own learns to answer, and by DPO to prefer better answers
	@test -f data/hpo/manifest.json || $(STEP) data --data hpo
	@$(PROJECT) gpt-dpo --config custom_models/recipes/gpt-dpo.yaml --out_dir out/gpt-dpo $(ARGS)

summarize: $(if $(TEXT),$(SUMMARIZER)/final/config.json,data/$(DOCUMENTS)/manifest.json)  ## train a summariser of documents; TEXT=file: summarise it (METHOD=abstractive: in own words)
	@$(PROJECT) $(if $(TEXT),summary --checkpoint_dir $(SUMMARIZER)/final --file $(call quoted,$(TEXT)),$(train_summarizer)) $(ARGS) \
	  $(if $(TEXT),,$(call latest,$(SUMMARIZER)))

summarize_recipe = $(if $(filter extractive,$(METHOD)),$(call project_recipe,summarize-$(pretrained),summarize-pretrained),\
  custom_models/recipes/summarize-$(METHOD).yaml)
train_summarizer = summarize --config $(strip $(summarize_recipe)) --data data/$(DOCUMENTS) \
  --encoder $(call quoted,$(pretrained)) --out_dir $(SUMMARIZER)

$(SUMMARIZER)/final/config.json:
	@$(MAKE) --no-print-directory summarize TEXT= ARGS=

qa: data/$(QUESTIONS)/manifest.json  ## train a model that finds answers in texts: ENCODER=scratch, minilm, or a BERT from the Hub
	@$(PROJECT) qa --config $(call project_recipe,qa-$(ENCODER),qa-pretrained) --data data/$(QUESTIONS) \
	  --encoder $(call quoted,$(ENCODER)) --out_dir $(READER) $(ARGS) $(call latest,$(READER))

answer: $(READER)/final/config.json  ## let it answer TEXT, a question, from CONTEXT, a file
	@$(PROJECT) answer --checkpoint_dir $(READER)/final --question $(call quoted,$(TEXT)) \
	  --context $(call quoted,$(CONTEXT)) $(ARGS)

$(READER)/final/config.json:
	@$(MAKE) --no-print-directory qa ARGS=

attention-map: $(INSTALLED)  ## draw what each head of MiniLM looks at in TEXT
	@$(PROJECT) attention-map $(if $(TEXT),--text $(call quoted,$(TEXT))) $(ARGS)

expert-load: $(INSTALLED)  ## draw how a mixture's experts share out the tokens while it learns, balanced and not
	@$(PROJECT) expert-load $(ARGS)

lora-scratch: data/$(DATA)/manifest.json $(BASE)  ## fine-tune our Llama by our LoRA, by all weights, and by LitGPT's road
	@$(PROJECT) lora-scratch --config custom_models/recipes/lora-scratch.yaml --checkpoint_dir "$$(cat $(BASE))" \
	  --data data/$(DATA) $(asked_kinds) $(ARGS)

pretrain-t5: $(INSTALLED)  ## pretrain a small T5 by span corruption on definitions (ARGS="--file FILE": on a text of yours)
	@$(PROJECT) pretrain-t5 --config custom_models/recipes/pretrain-t5.yaml $(ARGS)

ner: data/$(ENTITIES)/manifest.json  ## name the entities of sentences by a T5 of our own (ARGS="--head tokens": by its encoder), or by T5=google-t5/t5-small
	@$(PROJECT) ner --config $(call project_recipe,ner-$(T5),ner-pretrained) --data data/$(ENTITIES) --model $(call quoted,$(T5)) \
	  --out_dir $(TAGGER) $(ARGS) $(call latest,$(TAGGER))

ner-predict: $(TAGGER)/final/config.json  ## name the entities of TEXT by that model
	@$(PROJECT) ner-predict --checkpoint_dir $(TAGGER)/final --text $(call quoted,$(TEXT)) $(ARGS)

ner-autotrain: data/$(ENTITIES)/manifest.json  ## the same T5 (or T5=google-t5/t5-small) taught by Hugging Face's AutoTrain, in an environment of its own
	@$(PROJECT) ner-autotrain --config $(call project_recipe,ner-autotrain-$(T5),ner-autotrain-pretrained) --data data/$(ENTITIES) \
	  --model $(call quoted,$(T5)) --out_dir $(AUTOTRAIN) \
	  $(if $(PIP_ARGS),--pip_args=$(call quoted,$(PIP_ARGS))) $(ARGS) $(call latest,$(AUTOTRAIN))

$(TAGGER)/final/config.json:
	@$(MAKE) --no-print-directory ner ARGS=

translate: data/$(PARALLEL)/manifest.json  ## train a translator: PARALLEL=catalogues_fr, catalogues_de, python_javascript, opus_books_fr
	@$(PROJECT) translate --config $(call project_recipe,translate-$(patsubst opus_books_%,opus_books,$(PARALLEL)),translate) \
	  --data data/$(PARALLEL) --out_dir $(TRANSLATOR) $(ARGS) $(call latest,$(TRANSLATOR))

$(TRANSLATOR)/final/config.json:
	@$(MAKE) --no-print-directory translate ARGS=

translate-text: $(TRANSLATOR)/final/config.json  ## translate TEXT, or a FILE, by it
	@$(PROJECT) translate-text --checkpoint_dir $(TRANSLATOR)/final \
	  $(if $(FILE),--file $(call quoted,$(FILE)),--text $(call quoted,$(TEXT))) $(ARGS)

##@ Quality
test: $(INSTALLED)  ## all that a fresh machine can run
	$(PY) -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

test-fast: $(INSTALLED)  ## most of the tests, in a minute: no checkpoint, no Ollama, nothing trained
	$(PY) -m pytest -m "not checkpoint and not ollama and not slow and not rough and not long" $(ARGS)

test-slow: $(INSTALLED)  ## the long tests
	$(PY) -m pytest -m slow $(ARGS)

test-gpu: $(INSTALLED)  ## what only a machine with an NVIDIA GPU can run
	WORKFLOW_TEST_GPU=1 $(PY) -m pytest -m gpu $(ARGS)

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

bench-dpo: $(BASE)  ## alignment with pairs: ours and TRL in turn
	@test -f data/hpo_pairs/manifest.json || $(STEP) data --data hpo
	$(PY) -m bench.dpo --checkpoint_dir "$$(cat $(BASE))" $(ARGS)

bench-grpo: $(BASE)  ## whole steps of alignment with rewards: ours and TRL in turn
	@test -f data/hpo/manifest.json || $(STEP) data --data hpo
	$(PY) -m bench.grpo --checkpoint_dir "$$(cat $(BASE))" $(ARGS)

bench-bpe: $(INSTALLED)  ## learning byte-pair merges: ours, the textbook loop and tokenizers; encoding beside tiktoken
	$(PY) -m bench.bpe $(ARGS)

bench-flash: $(INSTALLED)  ## attention: our FlashAttention against the textbook's, time and memory, with curves
	$(PY) -m bench.flash $(ARGS)

bench-distill: $(INSTALLED)  ## the distilled student against its teacher
	$(PY) -m bench.distill --student_dir out/distill/$(REVIEWS)/final --teacher_dir out/sentiment/$(REVIEWS)/minilm/final \
	  --data data/$(REVIEWS) $(ARGS)

bench-gpt: $(INSTALLED)  ## a small GPT on Shakespeare: time to the loss of nanoGPT's own setting (needs WORKFLOW_DATA)
	$(PY) -m bench.gpt $(ARGS)

bench-plan: $(BASE)  ## peak memory as planned beside that of the steps, at three model sizes
	@test -f data/hpo/manifest.json || $(STEP) data --data hpo
	$(PY) -m bench.plan --checkpoint_dir "$$(cat $(BASE))" $(ARGS)

# ---- the files behind the targets ----

no_data    = echo 'error: there is no data/$(1). Prepare it from a file of yours: make data DATA=$(2) ARGS="--file FILE --name $(1)"' >&2; exit 1

$(BASE): $(if $(word 2,$(MODEL)),,$(wildcard $(filter %.gguf,$(MODEL)))) | $(INSTALLED)
	$(call stage,download)
	@mkdir -p $(@D)
	@$(STEP) download --model "$(MODEL)" --path_file $@

data/$(DATA)/manifest.json: | $(INSTALLED)
	$(call stage,data)
ifneq ($(filter $(PREPARED),$(DATA)),)
	@$(STEP) data --data $(patsubst hpo_%,hpo,$(DATA))
else
	@$(call no_data,$(DATA),jsonl)
endif

# The raw files of a project's data lie in a folder of its name, or of the name of what they are part of.
raw_of = $(firstword $(subst _conclusions,,$(subst _decisions,,$(1))))
prepare_raw = $(STEP) data --data $(1) $(if $(wildcard $(WORKFLOW_DATA)/$(call raw_of,$(1))),--raw_dir $(call quoted,$(WORKFLOW_DATA)/$(call raw_of,$(1))))
define project_data
data/$(1)/manifest.json: | $(INSTALLED)
	@$$(if $$(filter $$(PROJECT_DATA),$(1)),$$(call prepare_raw,$(1)),$$(call no_data,$(1),$(if $(filter $(1),$(ENTITIES)),iob,jsonl)))
endef
$(foreach name,$(filter-out $(DATA),$(sort $(REVIEWS) $(ENTITIES) $(DOCUMENTS) $(QUESTIONS) $(PARALLEL))),$(eval $(call project_data,$(name))))

# What belongs to a prepared data set is written together with it: pairs, questions, and the questions of MORE_TASKS.
ifneq ($(PAIRS),$(DATA))
data/$(PAIRS)/manifest.json: | $(INSTALLED) $(patsubst %,data/%/manifest.json,$(filter $(DATA),$(filter $(PAIRS:_pairs=),assistant hpo)))
ifneq ($(filter $(COLLECTIONS),$(PAIRS)),)
	@$(STEP) data --data $(PAIRS)
else ifneq ($(filter assistant_pairs hpo_pairs,$(PAIRS)),)
	@test -f $@ || $(STEP) data --data $(PAIRS:_pairs=)
else
	@$(call no_data,$(PAIRS),jsonl)
endif
endif

ifneq ($(ASKED),$(DATA))
data/$(ASKED)/manifest.json: | data/$(DATA)/manifest.json
	@test -f $@ || $(STEP) data --data $(DATA)
endif

ifneq ($(scored_apart),)
$(scored_apart): | $(INSTALLED)
	@$(STEP) data --data $(patsubst data/%_mcq/manifest.json,%,$@)
endif

# MODEL's own answers to everyday prompts, mixed into what it learns; any other folder of rows is prepared already.
ifeq ($(REPLAY),general)
ifneq ($(DATA),general)
data/general/manifest.json: | $(INSTALLED)
	@$(STEP) data --data general
endif
$(REPLAYED)/manifest.json: data/general/manifest.json $(BASE) $(call recipe,teach-replay) | $(INSTALLED)
	$(call stage,replay)
	@$(STEP) teach --config $(call recipe,teach-replay) --checkpoint_dir "$$(cat $(BASE))" --data data/general --out_dir $(@D) || \
	  { echo '`make ... REPLAY=` trains without such answers; the model then loses more of what it could do before.' >&2; exit 1; }
else ifneq ($(filter-out $(DATA) $(PAIRS) $(ASKED),$(REPLAY)),)
$(REPLAYED)/manifest.json:
	@$(call no_data,$(REPLAY),jsonl)
endif

rows_of      = $(if $(filter dpo reward ppo,$(1)),data/$(PAIRS),$(if $(filter distill-lm-teacher,$(1)-$(ANSWERS)),$(OUT)/taught,$(if \
  $(filter grpo,$(1)),data/$(ASKED),data/$(DATA))))
asked_kinds := $(if $(KINDS),--kinds $(call list,$(KINDS)))
options_of_lora := $(asked_kinds) $(if $(TRAINER),--trainer $(TRAINER))
options_of_grpo := $(asked_kinds)
options_of_ppo  := --rewards '[{reward: $(OUT)/reward/final}]'

# On the teacher's own answers the student is fine-tuned as on any other.
options_of_distill-lm := $(asked_kinds) --teacher_dir $(call input_dir,teach) $(if $(filter teacher,$(ANSWERS)),--divergence none)

define training_step
$(call trained,$(1)): $(call rows_of,$(1))/manifest.json $(call input,$(1)) $(call recipe,$(1)) $(call changed,$(1)) | $(INSTALLED)
	$$(call stage,$(1))
	$$(call announce,$(1))
	@$$(STEP) $(1) --config $$(call recipe,$(1)) --checkpoint_dir $$(call input_dir,$(1)) --data $(call rows_of,$(1)) \
	  --out_dir $(OUT)/$(1) --devices $(DEVICES) --num_nodes $(NODES) $$(options_of_$(1)) \
	  $(if $(filter lora,$(1)),$(REPLAYED:%=--replay %)) $$(call args_for,$(1))
	$$(call remember,$(1))
endef
$(foreach step,$(TRAINING) distill-lm,$(eval $(call training_step,$(step))))
$(call trained,ppo): $(call trained,reward)
$(call trained,lora): $(REPLAYED:%=%/manifest.json)

$(call trained,shrink): $(call input,shrink) $(call recipe,shrink) $(call changed,shrink) | $(INSTALLED)
	$(call announce,shrink)
	@$(STEP) shrink --config $(call recipe,shrink) --checkpoint_dir $(call input_dir,shrink) --out_dir $(OUT)/shrink \
	  $(call args_for,shrink)
	$(call remember,shrink)

$(OUT)/taught/manifest.json: data/$(DATA)/manifest.json $(call input,teach) $(call recipe,teach) $(call changed,teach) | $(INSTALLED)
	$(call announce,teach)
	@$(STEP) teach --config $(call recipe,teach) --checkpoint_dir $(call input_dir,teach) --data data/$(DATA) --out_dir $(@D) \
	  $(asked_kinds) $(call args_for,teach)
	$(call remember,teach)

$(OUT)/evaluate/base/metrics.json: data/$(DATA)/manifest.json $(BASE) $(call recipe,evaluate) $(call changed,evaluate) \
    $(if $(filter $(notdir $(REPLAYED)),$(TASKS)),$(REPLAYED)/manifest.json) | $(INSTALLED) $(scored_apart)
	$(call stage,evaluate)
	$(call announce,evaluate)
	@$(STEP) evaluate --config $(call recipe,evaluate) --checkpoint_dir "$$(cat $(BASE))" \
	  --tasks $(call list,$(TASKS) $(MORE_TASKS)) --out_dir $(@D) $(call args_for,evaluate)
	$(call remember,evaluate)

$(OUT)/evaluate/%/metrics.json: $(OUT)/%/final/provenance.json $(OUT)/evaluate/base/metrics.json | $(INSTALLED)
	@$(STEP) evaluate --config $(call recipe,evaluate) --checkpoint_dir $(OUT)/$*/final \
	  --tasks $(call list,$(TASKS) $(if $(filter $(LAST),$*),$(MORE_TASKS))) \
	  --baseline $(OUT)/evaluate/base --out_dir $(@D) $(call args_for,evaluate)

$(EXPORT): $(call trained,$(LAST)) data/$(DATA)/manifest.json $(call recipe,export) $(call changed,export) | $(INSTALLED)
	$(call stage,export)
	$(call announce,export)
	@$(STEP) export --config $(call recipe,export) --checkpoint_dir $(OUT)/$(LAST)/final --name $(NAME) --data data/$(DATA) \
	  --out_dir $(@D) $(call args_for,export)
	$(call remember,export)

# The first answers of a trained model beside MODEL's, before all else that is to come.
FIRST     := $(firstword $(STAGES))
LOOK      := $(if $(FIRST),$(OUT)/panel/metrics.json)
options_of_panel = --run_dir $(OUT) --base_dir "$$(cat $(BASE))" --data data/$(DATA) --name $(NAME)

$(LOOK): $(call trained,$(FIRST)) | $(INSTALLED)
	@$(STEP) panel $(options_of_panel) --stages $(call list,base $(FIRST))

# Everything in turn. Without tasks the summary has validation losses only.
$(OUT)/summary.json: data/$(DATA)/manifest.json $(if $(filter general,$(REPLAY)),data/general/manifest.json) $(BASE) \
    $(REPLAYED:%=%/manifest.json) $(LOOK) $(foreach step,$(STAGES),$(call trained,$(step))) \
    $(if $(TASKS),$(STAGES:%=$(OUT)/evaluate/%/metrics.json)) $(EXPORT) | $(INSTALLED)
	@$(STEP) demo $(options_of_panel) --stages $(call list,$(STAGES)) --prepared $(call list,$(sort data/$(DATA) \
	  $(if $(filter general,$(REPLAY)),data/general $(REPLAYED)) $(scored_apart:%/manifest.json=%))) $(if $(TASKS),,--scored false)
