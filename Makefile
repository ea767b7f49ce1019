# `make help` lists the targets and, in brackets, the variables that each of them reads. Works with GNU make 3.81 (macOS).
EXPERIMENT ?= toy
RUNS ?= runs
ARGS ?=
RESULTS ?= $(RUNS)/ablations/results
JOBS ?= 2
INDEX ?= $(ROOT)/ego_exo_clip
BASE_PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
# Where PyTorch comes from is remembered with the environment.
RECORDED := $(shell cat '$(VENV)/installed' 2>/dev/null)
TORCH_INDEX ?= $(RECORDED)

HASH := \#
# Refuse a variable on the command line that none of the named targets reads: a misspelt one would be ignored.
READ := BASE_PYTHON CONSTRAINTS PYTHON SHELL TORCH_INDEX VENV $(sort $(shell awk -v goals='$(MAKECMDGOALS)' '\
  /^[a-z0-9%-]+:.*$(HASH)$(HASH) .*\[.*\]$$/ { \
    target = $$1; sub(/%?:.*/, "", target); gsub(/.*\[|\]$$/, ""); count = split(goals, goal, " "); \
    for (n = 1; n <= count; n++) if (goal[n] == target || target == "stage" && goal[n] ~ /^stage/) print }' Makefile))
TYPED := $(foreach name,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(name)))),$(name)))
UNKNOWN := $(filter-out $(READ) MAKEFLAGS MAKEOVERRIDES,$(TYPED))
NEAREST = import difflib, sys; near = difflib.get_close_matches(sys.argv[1].upper(), sys.argv[2:], 1, 0.7); \
  print("did you mean %s?" % near[0] if near else "allowed: " + ", ".join(sys.argv[2:]))
ifneq ($(UNKNOWN),)
  $(error $(firstword $(UNKNOWN)): `make $(MAKECMDGOALS)` reads no such variable, $(shell \
    $(BASE_PYTHON) -c '$(NEAREST)' '$(firstword $(UNKNOWN))' $(READ) 2>/dev/null || echo 'allowed: $(READ)') \
    (what belongs to the environment goes in front of make: CUDA_VISIBLE_DEVICES=1 make ...))
endif

# $(call flag,FORCE): not empty for FORCE=1, empty for FORCE=0 and FORCE=; anything else is refused at once.
flag = $(if $(filter-out 0 1,$($1))$(word 2,$($1)),$(error $1: got $($1), allowed: $1=1 for yes, $1=0 for no),$(filter 1,$($1)))
FLAGS := $(call flag,FORCE)$(call flag,YES)$(call flag,SYNC)
# $(call path,NAME): the path as one word of the shell, whatever characters it has; a leading ~ is the home folder.
path = '$(subst ','\'',$(subst <path>,,$(subst <path>~/,$(HOME)/,<path>$1)))'
# The experiment is also taken as its folder, as tab completion gives it.
NAME := $(patsubst %/,%,$(patsubst experiments/%,%,$(EXPERIMENT)))
ifneq ($(words $(NAME)),1)
  $(error EXPERIMENT: got "$(EXPERIMENT)", expected one folder of experiments/, such as EXPERIMENT=toy)
endif

# `make PYTHON=/my/env/bin/python ...` uses that environment as it is and installs nothing.
ifneq ($(filter command,$(firstword $(origin PYTHON))),)
  READY := existing-environment
else
  PYTHON := $(VENV)/bin/python
  READY := $(VENV)/installed
  PINS := $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
  ifneq ($(words $(VENV)),1)
    $(error VENV: got "$(VENV)", but an environment cannot be in a path with spaces)
  endif
endif

FIT = $(PYTHON) -m lightning_modules fit experiments/$(NAME)
RUN = $(call path,$(RUNS))/$(NAME)
TRAINED = $(if $(MODEL),$(call path,$(MODEL)),$(RUN)/stage3)
SPAN = $(if $(START),--start '$(START)') $(if $(END),--end '$(END)')
OPTIONS = runs=$(call path,$(RUNS)) $(if $(filter runs=%,$(ARGS)),$(error ARGS: name the folder of the runs as RUNS=folder),$(ARGS)) \
  $(if $(call flag,FORCE),--force)
FINISHED = $$(cd $(RUN) 2>/dev/null && ls -d stage*/handoff/manifest.json 2>/dev/null | cut -d / -f 1)
EVALUATE_STAGES = test -z $(call path,$(DATA)) || { echo "error: DATA: goes with MODEL=folder; an experiment lists its benchmarks itself"; exit 2; }; \
  for stage in $(STAGES); do ls experiments/*/$$stage.yaml >/dev/null 2>&1 || { \
    echo "error: STAGES: got $$stage, expected names of stages such as STAGES=\"stage2 stage3\""; exit 2; }; done; \
  for stage in $(or $(STAGES),$(FINISHED)); do \
    $(PYTHON) -m lightning_modules evaluate experiments/$(NAME) $$stage $(OPTIONS) $(if $(BENCHMARKS),--benchmarks '$(BENCHMARKS)') || exit; done; \
  $(PYTHON) -m lightning_modules report $(RUN)
EVALUATE_MODEL = $(if $(filter command,$(firstword $(origin EXPERIMENT)) $(firstword $(origin STAGES))),\
  echo "error: MODEL: names the model already: leave out EXPERIMENT and STAGES"; exit 2;) \
  test -n "$(BENCHMARKS)" || { echo "error: name the benchmarks: make evaluate MODEL=exports/toy BENCHMARKS=all"; exit 2; }; \
  $(PYTHON) -m lightning_modules evaluate $(call path,$(or $(DATA),experiments/data/egobench.yaml)) $(ARGS) --model $(TRAINED) \
    --benchmarks '$(BENCHMARKS)' --out $(call path,$(RUNS)/evaluated) $(if $(call flag,FORCE),--force)
# Stage 0 gets the ARGS of stage 1 except those of stage 1's own classes and folders.
STAGE0_IF_MISSING = test -f $(RUN)/stage0/handoff/manifest.json || { set -- $(ARGS); \
  for word do shift; case $$word in --*=*) word=$${word$(HASH)--};; esac; case $$word in \
    handoffs.stage0=*) exit 0;; \
    model.*|data.*|run_dir=*|handoffs.*|start.*|-*) ;; \
    *) set -- "$$@" "$$word";; esac; done; \
  echo "No stage 0 in" $(RUN)": it runs first"; set -x; $(FIT) stage0 runs=$(call path,$(RUNS)) "$$@"; }
CHECK_PORT = @case '$(PORT)' in ''|*[!0-9]*|??????*) echo "error: PORT: got $(PORT), expected a number such as PORT=6006"; exit 2;; esac
# What is misspelt in ARGS is refused before a world is generated for it.
CHECK_KEYS = @for stage in $(filter stage%,$(MAKECMDGOALS)); do \
  $(PYTHON) -m lightning_modules check experiments/$(NAME) $$stage $(OPTIONS) || exit; done
# FILES are words of the shell, such as data/*.jsonl, or one path with spaces.
FILE_LIST = if test -e $(call path,$(FILES)); then set -- $(call path,$(FILES)); else eval set -- $(call path,$(FILES)); fi
# Experiments on a generated world generate it first.
FAIR := data/fair/ego_exo_clip/index.json
FAINT := data/faint/ego_exo_clip/index.json
TOY := data/toy/ego_exo_clip/index.json
RICH := data/rich/ego_exo_clip/index.json
OWN_WORLD_toy_fair := $(FAIR)
OWN_WORLD_toy_faint := $(FAINT)
OWN_WORLD_toy_real := $(RICH)
WORLD := $(or $(OWN_WORLD_$(NAME)),$(if $(filter toy%,$(NAME)),$(TOY)))
# A file of tests stays in one process, since its tests share the stages that they train.
PARALLEL = --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder
ABLATE = $(PYTHON) -m experiments.ablations experiments/ablations/sweep.yaml

# Threads that spin for long steal time from the decoding process, those that never spin are slow: spin briefly.
export GOMP_SPINCOUNT ?= 10000
export PYTHONUNBUFFERED = 1
export TOKENIZERS_PARALLELISM = false

serve: PORT ?= 8000
demo: PORT ?= 7860
tensorboard: PORT ?= 6006

.NOTPARALLEL:
.PHONY: help setup data ego-exoclip pairs egoit egoit-export egoit-leaks data-check reencode stage0 stage1 demonstrate stage2 stage3 ablations ablations-quick plan probe consolidate evaluate chat describe watch export serve demo score tensorboard test test-all test-real chaos lint format bench bench-answer bench-gpu bench-clips bench-step bench-egobench bench-index bench-mistakes bench-mix bench-remote bench-sync clean clean-runs existing-environment

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9% -]+:.*## / { variables = ""; \
	  if (match($$2, / \[[A-Z0-9_ ]+\]$$/)) { variables = substr($$2, RSTART + 2, RLENGTH - 3); $$2 = substr($$2, 1, RSTART - 1) } \
	  printf "  %-16s %s\n", $$1, $$2; if (variables) printf "  %-16s reads %s\n", "", variables }' Makefile
	@echo
	@echo 'All of them read PYTHON=/my/env/bin/python, to use that environment and install nothing; and for the environment'
	@echo 'that they create VENV=folder, BASE_PYTHON=python3.12, CONSTRAINTS=file of versions, and TORCH_INDEX=URL of wheels for CPUs or'
	@echo 'another CUDA (docs/install.md).'

setup: $(READY) ## create .venv and install, done by every other target on first use

ifneq ($(TORCH_INDEX),$(RECORDED))
.PHONY: $(VENV)/installed
endif
$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed, $(BASE_PYTHON) is older: make BASE_PYTHON=python3.12"; exit 2; }
	@echo "Installing about 110 packages into $(VENV): 6 GB on disk with CUDA, 1.6 GB with TORCH_INDEX= for CPUs."
	$(BASE_PYTHON) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --upgrade pip
	$(if $(TORCH_INDEX)$(RECORDED),$(PYTHON) -m pip install --force-reinstall --no-deps $(PINS) $(if $(TORCH_INDEX),--index-url '$(TORCH_INDEX)') torch torchvision)
	$(PYTHON) -m pip install $(if $(TORCH_INDEX),--extra-index-url '$(TORCH_INDEX)') $(PINS) --editable '.[dev]'
	@echo '$(TORCH_INDEX)' > $@

existing-environment:
	@$(PYTHON) .ci/environment.py

data: $(TOY) data/toy/egobench/egoexobench/EgoExoBench_MCQ.tsv ## generate the default dataset, or add what one of an earlier version lacks

data/toy/egobench/egoexobench/EgoExoBench_MCQ.tsv: | $(TOY)
	@test -f $@ || $(PYTHON) -m datamodules.toy_world --root data/toy

$(TOY): | $(READY)
	$(CHECK_KEYS)
	$(PYTHON) -m datamodules.toy_world --root data/toy

$(FAIR): | $(READY)
	$(CHECK_KEYS)
	$(PYTHON) -m datamodules.toy_world --root data/fair --preset fair --train-takes 330 --val-takes 100

$(FAINT): | $(READY)
	$(CHECK_KEYS)
	$(PYTHON) -m datamodules.toy_world --root data/faint --preset faint --train-takes 330 --val-takes 100

$(RICH): | $(READY)
	$(CHECK_KEYS)
	$(PYTHON) -m datamodules.toy_world --root data/rich --preset rich --size 224 --train-takes 80 --val-takes 20 --initialisation-takes 640 --practice-takes 160 --benchmark-takes 40

data/fair_quick/ego_exo_clip/index.json: | $(READY)
	$(PYTHON) -m datamodules.toy_world --root data/fair_quick --preset fair --train-takes 9 --val-takes 2 --initialisation-takes 6 --practice-takes 4

ego-exoclip: $(READY) ## build the index of the Ego-Exo4D release in EGOEXO4D=folder, ARGS="--probe --drop-unsure ..." [EGOEXO4D ARGS]
	@test -n $(call path,$(EGOEXO4D)) || { echo "error: name the release folder: make ego-exoclip EGOEXO4D=/data/egoexo4d"; exit 2; }
	$(PYTHON) -m datamodules.ego_exo_clip.build ego-exo4d $(call path,$(EGOEXO4D)) $(ARGS)

pairs: $(READY) ## build the index of pairs of SOURCE=file.csv|file.jsonl|module:Class or a named source from the videos in ROOT=folder [SOURCE ROOT OUT ARGS]
	@test -n $(call path,$(SOURCE)) && test -n $(call path,$(ROOT)) || { echo "error: name source and folder: make pairs SOURCE=pairs.csv ROOT=/data/mine"; exit 2; }
	$(PYTHON) -m datamodules.ego_exo_clip.build $(call path,$(SOURCE)) $(call path,$(ROOT)) --probe $(if $(OUT),--out $(call path,$(OUT))) $(ARGS)

egoit: $(READY) ## build the instruction file of SOURCE=egtea|ssv2|egotimeqa|openeqa|egoexolearn|module:Class from its files in ROOT=folder [SOURCE ROOT OUT ARGS]
	@test -n "$(SOURCE)" && test -n $(call path,$(ROOT)) || { echo "error: name source and folder: make egoit SOURCE=egtea ROOT=/data/EGTEA"; exit 2; }
	$(PYTHON) -m datamodules.egoit convert '$(SOURCE)' --root $(call path,$(ROOT)) $(if $(OUT),--out $(call path,$(OUT))) $(ARGS)

egoit-export: $(READY) ## export instruction FILES=... for other training stacks, TO=llava|videollama2|videollama3|llamafactory|swift|openai OUT=folder [FILES TO OUT ARGS]
	@test -n $(call path,$(FILES)) && test -n "$(TO)" && test -n $(call path,$(OUT)) || { echo "error: name all: make egoit-export FILES=data/egoit/egtea.jsonl TO=llava OUT=export"; exit 2; }
	$(FILE_LIST); $(PYTHON) -m datamodules.tools.export "$$@" --to '$(TO)' --out $(call path,$(OUT)) $(ARGS)

egoit-leaks: $(READY) ## count recordings that instruction FILES=... share with the benchmarks in BENCHMARKS=folder [FILES BENCHMARKS ARGS]
	@test -n $(call path,$(FILES)) && test -n $(call path,$(BENCHMARKS)) || { echo "error: name both: make egoit-leaks FILES=data/egoit/egtea.jsonl BENCHMARKS=/data/benchmarks"; exit 2; }
	$(FILE_LIST); $(PYTHON) -m datamodules.tools.leaks "$$@" --benchmarks $(call path,$(BENCHMARKS)) $(ARGS)

data-check: $(READY) ## check the videos below ROOT=folder that INDEX=folder or file.jsonl names, ARGS="--all ..."; SYNC=1 looks for views that are shifted in time [ROOT INDEX SYNC ARGS]
	@test -n $(call path,$(ROOT)) || { echo "error: name the data folder: make data-check ROOT=/data/egoexo4d"; exit 2; }
	$(PYTHON) -m datamodules.tools.$(if $(call flag,SYNC),sync,data_check) $(call path,$(INDEX)) --root $(call path,$(ROOT)) $(ARGS)

reencode: $(READY) ## re-encode the videos of INDEX below ROOT=folder to OUT=folder, so that clips are cheap to read [ROOT INDEX OUT ARGS]
	@test -n $(call path,$(ROOT)) && test -n $(call path,$(OUT)) || { echo "error: name both folders: make reencode ROOT=/data/egoexo4d OUT=/data/egoexo4d_336"; exit 2; }
	$(PYTHON) -m datamodules.tools.reencode --root $(call path,$(ROOT)) --index $(call path,$(INDEX)) --out $(call path,$(OUT)) $(ARGS)

stage0: $(READY) $(WORLD) ## initialisation: encoder, projector and language model learn to work together [EXPERIMENT RUNS ARGS FORCE]
	$(FIT) stage0 $(OPTIONS)

stage1: $(READY) $(WORLD) ## Demonstrator Self-Preparation; in the generated world after stage0 if that is missing [EXPERIMENT RUNS ARGS FORCE]
	@$(if $(WORLD),$(STAGE0_IF_MISSING))
	$(FIT) stage1 $(OPTIONS)

demonstrate: $(READY) $(WORLD) ## compute the demonstrator's answers once for a stage2 that reads them, needs stage1; resumes [EXPERIMENT RUNS ARGS FORCE]
	$(PYTHON) -m lightning_modules demonstrate experiments/$(NAME) stage2 $(OPTIONS)

stage2: $(READY) $(WORLD) ## Demonstrator-Learner Guidance, needs stage1 [EXPERIMENT RUNS ARGS FORCE]
	$(FIT) stage2 $(OPTIONS)

stage3: $(READY) $(WORLD) ## Learner Self-Practice, needs stage2 [EXPERIMENT RUNS ARGS FORCE]
	$(FIT) stage3 $(OPTIONS)

stage%: $(READY) $(WORLD) ## any other stage of the experiment, such as stage4 with a stage4.yaml [EXPERIMENT RUNS ARGS FORCE]
	$(FIT) $@ $(OPTIONS)

ablations: $(READY) $(FAIR) ## run experiments/ablations/sweep.yaml over SEEDS=3 or resume it; tables and figures go to RESULTS=folder [RUNS RESULTS SEEDS ARGS]
	$(ABLATE) $(ARGS) $(if $(SEEDS),--seeds $(SEEDS)) --out $(call path,$(RUNS)/ablations) --results $(call path,$(RESULTS))

ablations-quick: $(READY) data/fair_quick/ego_exo_clip/index.json ## the same in minutes, to check that it works [RUNS ARGS]
	$(ABLATE) --quick data_root=data/fair_quick $(ARGS) --out $(call path,$(RUNS)/ablations_quick) --results $(call path,$(RUNS)/ablations_quick/results)

plan: $(READY) $(WORLD) ## print parameters, memory, operations and hours of EXPERIMENT; allocates nothing [EXPERIMENT ARGS]
	@$(PYTHON) -m lightning_modules plan experiments/$(NAME) $(ARGS)

probe: $(READY) $(WORLD) ## print linear probes of y, x and F(x), bars of the KL and norms of gradients of a finished STAGE=stage2 [EXPERIMENT RUNS STAGE ARGS]
	@test -n "$(STAGE)" || { echo "error: name the stage: make probe STAGE=stage2"; exit 2; }
	@$(PYTHON) -m lightning_modules probe experiments/$(NAME) $(STAGE) runs=$(call path,$(RUNS)) $(ARGS)

consolidate: $(READY) ## export stage weights from the last checkpoint of an unfinished STAGE=stage2 [EXPERIMENT RUNS STAGE ARGS]
	@test -n "$(STAGE)" || { echo "error: name the stage: make consolidate STAGE=stage2"; exit 2; }
	$(PYTHON) -m lightning_modules consolidate experiments/$(NAME) $(STAGE) runs=$(call path,$(RUNS)) $(ARGS)

evaluate: $(READY) $(if $(MODEL),$(if $(filter %toy.yaml,$(DATA)),$(TOY)),$(WORLD)) ## validation QA of finished STAGES="stage3 ...", or BENCHMARKS=all|name,name; BENCHMARKS of any MODEL=folder in place of stages, listed in DATA=file.yaml [EXPERIMENT RUNS STAGES BENCHMARKS MODEL DATA ARGS FORCE]
	@$(if $(MODEL),$(EVALUATE_MODEL),$(EVALUATE_STAGES))

chat: $(READY) ## ask a trained model about VIDEO=file, QUESTION="..." or typed in; START= and END= in seconds, MODEL=folder or name [VIDEO QUESTION START END MODEL EXPERIMENT RUNS ARGS]
	@test -n $(call path,$(VIDEO)) || { echo "error: name the video: make chat VIDEO=kitchen.mp4"; exit 2; }
	@$(PYTHON) -m lightning_modules chat $(call path,$(VIDEO)) --model $(TRAINED) $(if $(QUESTION),--question $(call path,$(QUESTION))) $(SPAN) $(ARGS)

describe: $(READY) ## narrate VIDEO=file, a part of EVERY=2 seconds at a time, with subtitles in OUT=file.srt or .vtt [VIDEO EVERY OUT QUESTION START END MODEL EXPERIMENT RUNS ARGS]
	@test -n $(call path,$(VIDEO)) || { echo "error: name the video: make describe VIDEO=kitchen.mp4"; exit 2; }
	@$(PYTHON) -m lightning_modules describe $(call path,$(VIDEO)) --model $(TRAINED) $(if $(QUESTION),--question $(call path,$(QUESTION))) $(if $(EVERY),--every '$(EVERY)') $(if $(OUT),--out $(call path,$(OUT))) $(SPAN) $(ARGS)

watch: $(READY) ## answer live about SOURCE=camera number, rtsp:// or rtmp:// address, or file, every EVERY=2 seconds [SOURCE EVERY QUESTION MODEL EXPERIMENT RUNS ARGS]
	@test -n $(call path,$(SOURCE)) || { echo "error: name the source: make watch SOURCE=0 for the first camera"; exit 2; }
	@$(PYTHON) -m lightning_modules watch $(call path,$(SOURCE)) --model $(TRAINED) $(if $(QUESTION),--question $(call path,$(QUESTION))) $(if $(EVERY),--every '$(EVERY)') $(ARGS)

export: $(READY) ## write the trained STAGE=stage3 to OUT=folder, TO=hf|peft|videollama2|vllm; ARGS=--unmerged keeps LoRA apart [STAGE OUT TO EXPERIMENT RUNS ARGS]
	@test -n "$(STAGE)" && test -n $(call path,$(OUT)) || { echo "error: name both: make export STAGE=stage3 OUT=exports/toy"; exit 2; }
	$(PYTHON) -m lightning_modules export $(RUN)/$(STAGE) $(call path,$(OUT)) $(if $(TO),--to '$(TO)') $(ARGS)

serve: $(READY) ## answer OpenAI's chat completions on PORT=8000 with MODEL=folder, about videos below ROOT=folder, needs the extra serve [MODEL ROOT PORT EXPERIMENT RUNS ARGS]
	$(CHECK_PORT)
	$(PYTHON) -m lightning_modules serve $(TRAINED) $(if $(ROOT),--root $(call path,$(ROOT))) --port $(PORT) $(ARGS)

demo: $(READY) ## serve a web page on PORT=7860 to ask MODEL=folder about uploaded videos, needs the extra demo [MODEL PORT EXPERIMENT RUNS ARGS]
	$(CHECK_PORT)
	@$(PYTHON) -m lightning_modules demo $(TRAINED) --port $(PORT) $(ARGS)

score: $(READY) ## compute benchmark scores again from the predictions alone, ARGS="--judge file ..." [EXPERIMENT RUNS ARGS]
	@$(PYTHON) -m lightning_modules score $(RUN) $(ARGS)

tensorboard: $(READY) ## serve TensorBoard for all runs on PORT [RUNS PORT]
	$(CHECK_PORT)
	$(PYTHON) -m tensorboard.main --logdir $(call path,$(RUNS)) --port $(PORT)

test: $(READY) ## run the fast tests in JOBS=2 processes, about 10 minutes on 2 cores [JOBS]
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -m "not slow" $(PARALLEL)

test-all: $(READY) ## all tests, with the long end-to-end runs [JOBS]
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest $(PARALLEL)

test-real: $(READY) ## proofs with real weights in WEIGHTS=folder and on a frame of VIDEO=file, see docs/small.md [WEIGHTS VIDEO]
	@test -n $(call path,$(WEIGHTS)) || { echo "error: name the folder: make test-real WEIGHTS=weights VIDEO=kitchen.mp4"; exit 2; }
	EXO2EGO_WEIGHTS=$(call path,$(WEIGHTS)) EXO2EGO_VIDEO=$(call path,$(VIDEO)) OMP_NUM_THREADS=1 $(PYTHON) -m pytest -rs tests/test_real.py \
	  tests/test_contract.py::test_every_way_to_a_model_of_pretrained_parts_is_the_same

chaos: $(READY) ## kill stages at random moments and compare the exported weights, ARGS="--hits 100 --processes 2 --signal TERM" [ARGS]
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(PYTHON) tests/bench/chaos.py $(ARGS)

lint: $(READY) ## ruff and mypy
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

format: $(READY) ## format with ruff
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

bench: $(READY) $(TOY) ## measure memory of the loss, clip reading and training steps
	$(PYTHON) tests/bench/bench_steps.py

bench-gpu: $(READY) ## measure each stage's full-size training step on one GPU, ARGS=--smoke for tiny sizes on a CPU [ARGS]
	PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True PYTHONPATH=. $(PYTHON) tests/bench/bench_gpu.py $(ARGS)

bench-answer: $(READY) ## measure how fast a trained model answers, random weights where there is none [MODEL EXPERIMENT RUNS ARGS]
	$(PYTHON) tests/bench/bench_answer.py --experiment '$(NAME)' --runs $(call path,$(RUNS)) $(if $(MODEL),--model $(TRAINED)) $(ARGS)

bench-clips: $(READY) ## measure clip reading against other readers, pip install '.[bench]' for all of them [ARGS]
	$(PYTHON) tests/bench/bench_clips.py $(ARGS)

bench-step: $(READY) ## measure the overhead of the Trainer over a bare loop [ARGS]
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(PYTHON) tests/bench/bench_step.py $(ARGS)

bench-egobench: $(READY) ## measure scoring many captions of a clip that is read once [ARGS]
	$(PYTHON) tests/bench/bench_egobench.py $(ARGS)

bench-index: $(READY) ## measure building and holding an index of 1.1 million pairs [ARGS]
	$(PYTHON) tests/bench/bench_index.py $(ARGS)

bench-mistakes: $(READY) ## measure how soon --help and common mistakes are answered [ARGS]
	$(PYTHON) tests/bench/bench_mistakes.py $(ARGS)

bench-mix: $(READY) ## measure loading a mix of 600,000 instruction records [ARGS]
	$(PYTHON) tests/bench/bench_mix.py $(ARGS)

bench-sync: $(READY) ## measure how many planted shifts SYNC=1 finds, ARGS="--release folder" for takes of your own [ARGS]
	PYTHONPATH=. $(PYTHON) tests/bench/bench_sync.py $(ARGS)

bench-remote: $(READY) ## measure clips of videos on a web server against local disk, also while requests fail [ARGS]
	PYTHONPATH=. $(PYTHON) tests/bench/bench_remote.py $(ARGS)

clean: ## remove the generated data and caches; runs and .venv stay
	rm -rf data/toy data/fair data/faint data/rich data/fair_quick .pytest_cache .mypy_cache .ruff_cache
	find datamodules experiments lightning_modules tests -name __pycache__ -type d -prune -exec rm -rf {} +

clean-runs: ## remove the runs of all experiments in RUNS, after listing them and asking; YES=1 does not ask [RUNS YES]
	@runs() { for folder in $(call path,$(RUNS))/*/; do \
	  test -z "$$(find "$$folder" -mindepth 2 -maxdepth 3 -name config.yaml 2>/dev/null)" || "$$@" "$${folder%/}"; done; }; \
	test -n "$$(runs echo)" || { echo "no runs in" $(call path,$(RUNS)); exit 0; }; \
	runs du -sh; \
	test -n '$(call flag,YES)' || { printf 'Remove these folders? [y/N] '; read -r answer; \
	  case $$answer in y|Y|yes) ;; *) echo "nothing removed"; exit 1;; esac; }; \
	runs rm -rf
