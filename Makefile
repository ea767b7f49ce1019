# `make help` lists the targets. Any stage takes EXPERIMENT=name, ARGS="key=value ..." and FORCE=1.
EXPERIMENT ?= toy
RUNS ?= runs
ARGS ?=
SEEDS ?=
RESULTS ?= $(RUNS)/ablations/results
PORT ?= 6006
JOBS ?= 2
STAGES ?= $(sort $(notdir $(patsubst %/handoff/manifest.json,%,$(wildcard $(RUNS)/$(EXPERIMENT)/stage*/handoff/manifest.json))))
INDEX ?= $(ROOT)/ego_exo_clip
BASE_PYTHON ?= python3
VENV ?= .venv

PYTHON := $(VENV)/bin/python
FIT = $(PYTHON) -m lightning_modules fit experiments/$(EXPERIMENT)
OPTIONS = runs=$(RUNS) $(ARGS) $(if $(FORCE),--force)
# Experiments on a generated world generate it first.
FAIR := data/fair/ego_exo_clip/index.json
TOY := data/toy/ego_exo_clip/index.json
WORLD := $(if $(filter toy_fair,$(EXPERIMENT)),$(FAIR),$(if $(filter toy%,$(EXPERIMENT)),$(TOY)))
# A file of tests stays in one process, since its tests share the stages that they train.
PARALLEL = --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder
ABLATE = $(PYTHON) -m experiments.ablations experiments/ablations/sweep.yaml

# Threads that spin for long steal time from the decoding process, those that never spin are slow: spin briefly.
export GOMP_SPINCOUNT ?= 10000
export PYTHONUNBUFFERED = 1
export TOKENIZERS_PARALLELISM = false

.NOTPARALLEL:
.PHONY: help setup data ego-exoclip egoit egoit-export egoit-leaks data-check reencode stage0 stage1 stage2 stage3 ablations ablations-quick plan consolidate evaluate score tensorboard test test-all chaos lint format bench bench-gpu bench-clips bench-step bench-egobench bench-index bench-mix clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9% -]+:.*## / {printf "  %-30s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/installed ## create .venv and install, done by every other target on first use

$(VENV)/installed: pyproject.toml constraints.txt
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed, $(BASE_PYTHON) is older: make BASE_PYTHON=python3.12"; exit 2; }
	$(BASE_PYTHON) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --upgrade pip
	$(PYTHON) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

data: $(TOY) ## generate the default dataset

$(TOY): | $(VENV)/installed
	$(PYTHON) -m datamodules.toy_world --root data/toy

$(FAIR): | $(VENV)/installed
	$(PYTHON) -m datamodules.toy_world --root data/fair --preset fair --train-takes 330 --val-takes 100

data/fair_quick/ego_exo_clip/index.json: | $(VENV)/installed
	$(PYTHON) -m datamodules.toy_world --root data/fair_quick --preset fair --train-takes 9 --val-takes 2 --initialisation-takes 6 --practice-takes 4

ego-exoclip: $(VENV)/installed ## build the index of the Ego-Exo4D release in EGOEXO4D=folder, ARGS="--probe --drop-unsure ..."
	@test -n "$(EGOEXO4D)" || { echo "error: name the release folder: make ego-exoclip EGOEXO4D=/data/egoexo4d"; exit 2; }
	$(PYTHON) -m datamodules.ego_exo_clip.build ego-exo4d $(EGOEXO4D) $(ARGS)

egoit: $(VENV)/installed ## build the instruction file of SOURCE=egtea|ssv2|egotimeqa|openeqa|egoexolearn|module:Class from its files in ROOT=folder
	@test -n "$(SOURCE)" && test -n "$(ROOT)" || { echo "error: name source and folder: make egoit SOURCE=egtea ROOT=/data/EGTEA"; exit 2; }
	$(PYTHON) -m datamodules.egoit convert $(SOURCE) --root "$(ROOT)" $(if $(OUT),--out "$(OUT)") $(ARGS)

egoit-export: $(VENV)/installed ## export instruction FILES=... for other training stacks, TO=llava|videollama2|videollama3|llamafactory|swift|openai OUT=folder
	@test -n "$(FILES)" && test -n "$(TO)" && test -n "$(OUT)" || { echo "error: name all: make egoit-export FILES=data/egoit/egtea.jsonl TO=llava OUT=export"; exit 2; }
	$(PYTHON) -m datamodules.tools.export $(FILES) --to $(TO) --out "$(OUT)" $(ARGS)

egoit-leaks: $(VENV)/installed ## count recordings that instruction FILES=... share with the benchmarks in BENCHMARKS=folder
	@test -n "$(FILES)" && test -n "$(BENCHMARKS)" || { echo "error: name both: make egoit-leaks FILES=data/egoit/egtea.jsonl BENCHMARKS=/data/benchmarks"; exit 2; }
	$(PYTHON) -m datamodules.tools.leaks $(FILES) --benchmarks "$(BENCHMARKS)" $(ARGS)

data-check: $(VENV)/installed ## check the videos below ROOT=folder that INDEX=folder or file.jsonl names, ARGS="--all ..."
	@test -n "$(ROOT)" || { echo "error: name the data folder: make data-check ROOT=/data/egoexo4d"; exit 2; }
	$(PYTHON) -m datamodules.tools.data_check $(INDEX) --root $(ROOT) $(ARGS)

reencode: $(VENV)/installed ## re-encode the videos of INDEX below ROOT=folder to OUT=folder, so that clips are cheap to read
	@test -n "$(ROOT)" && test -n "$(OUT)" || { echo "error: name both folders: make reencode ROOT=/data/egoexo4d OUT=/data/egoexo4d_336"; exit 2; }
	$(PYTHON) -m datamodules.tools.reencode --root $(ROOT) --index $(INDEX) --out $(OUT) $(ARGS)

stage0: $(VENV)/installed $(WORLD) ## initialisation: encoder, projector and language model learn to work together
	$(FIT) stage0 $(OPTIONS)

stage1: $(VENV)/installed $(WORLD) ## Demonstrator Self-Preparation; in the generated world after stage0 if that is missing
	@$(if $(WORLD),test -f $(RUNS)/$(EXPERIMENT)/stage0/handoff/manifest.json || $(FIT) stage0 runs=$(RUNS))
	$(FIT) stage1 $(OPTIONS)

stage2: $(VENV)/installed $(WORLD) ## Demonstrator-Learner Guidance, needs stage1
	$(FIT) stage2 $(OPTIONS)

stage3: $(VENV)/installed $(WORLD) ## Learner Self-Practice, needs stage2
	$(FIT) stage3 $(OPTIONS)

stage%: $(VENV)/installed $(WORLD) ## any other stage of the experiment, such as stage4 with a stage4.yaml
	$(FIT) $@ $(OPTIONS)

ablations: $(VENV)/installed $(FAIR) ## run experiments/ablations/sweep.yaml over SEEDS=3 or resume it; tables and figures go to RESULTS=folder
	$(ABLATE) $(ARGS) $(if $(SEEDS),--seeds $(SEEDS)) --out $(RUNS)/ablations --results $(RESULTS)

ablations-quick: $(VENV)/installed data/fair_quick/ego_exo_clip/index.json ## the same in minutes, to check that it works
	$(ABLATE) --quick data_root=data/fair_quick $(ARGS) --out $(RUNS)/ablations_quick --results $(RUNS)/ablations_quick/results

plan: $(VENV)/installed $(WORLD) ## print parameters, memory, operations and hours of EXPERIMENT; allocates nothing
	@$(PYTHON) -m lightning_modules plan experiments/$(EXPERIMENT) $(ARGS)

consolidate: $(VENV)/installed ## export stage weights from the last checkpoint of an unfinished STAGE=stage2
	@test -n "$(STAGE)" || { echo "error: name the stage: make consolidate STAGE=stage2"; exit 2; }
	$(PYTHON) -m lightning_modules consolidate experiments/$(EXPERIMENT) $(STAGE) runs=$(RUNS) $(ARGS)

evaluate: $(VENV)/installed $(WORLD) ## validation QA of finished STAGES="stage3 ...", or BENCHMARKS=all|name,name; print the tables
	@for stage in $(STAGES); do \
	  $(PYTHON) -m lightning_modules evaluate experiments/$(EXPERIMENT) $$stage $(OPTIONS) $(if $(BENCHMARKS),--benchmarks $(BENCHMARKS)) || exit; done
	@$(PYTHON) -m lightning_modules report $(RUNS)/$(EXPERIMENT)

score: $(VENV)/installed ## compute benchmark scores again from the predictions alone, ARGS="--judge file ..."
	@$(PYTHON) -m lightning_modules score $(RUNS)/$(EXPERIMENT) $(ARGS)

tensorboard: $(VENV)/installed ## serve TensorBoard for all runs on PORT
	$(VENV)/bin/tensorboard --logdir $(RUNS) --port $(PORT)

test: $(VENV)/installed ## run the fast tests in JOBS=2 processes, less than 10 minutes on 2 cores
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -m "not slow" $(PARALLEL)

test-all: $(VENV)/installed ## all tests, with the long end-to-end runs
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest $(PARALLEL)

chaos: $(VENV)/installed ## kill stages at random moments and compare the exported weights, ARGS="--hits 100 --processes 2 --signal TERM"
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(PYTHON) tests/bench/chaos.py $(ARGS)

lint: $(VENV)/installed ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/installed ## format with ruff
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(VENV)/installed $(TOY) ## measure memory of the loss, clip reading and training steps
	$(PYTHON) tests/bench/bench_steps.py

bench-gpu: $(VENV)/installed ## measure each stage's full-size training step on one GPU, ARGS=--smoke for tiny sizes on a CPU
	PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True PYTHONPATH=. $(PYTHON) tests/bench/bench_gpu.py $(ARGS)

bench-clips: $(VENV)/installed ## measure clip reading against other readers, pip install '.[bench]' for all of them
	$(PYTHON) tests/bench/bench_clips.py $(ARGS)

bench-step: $(VENV)/installed ## measure the overhead of the Trainer over a bare loop
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(PYTHON) tests/bench/bench_step.py $(ARGS)

bench-egobench: $(VENV)/installed ## measure scoring many captions of a clip that is read once
	$(PYTHON) tests/bench/bench_egobench.py $(ARGS)

bench-index: $(VENV)/installed ## measure building and holding an index of 1.1 million pairs
	$(PYTHON) tests/bench/bench_index.py $(ARGS)

bench-mix: $(VENV)/installed ## measure loading a mix of 600,000 instruction records
	$(PYTHON) tests/bench/bench_mix.py $(ARGS)

clean: ## remove runs and the generated data; .venv stays
	rm -rf $(RUNS) data/toy data/fair data/fair_quick
