"""Several processes, sharded or not, learn the same as one, and resume from checkpoints of another number of them."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from ranks import run_together
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_modules.callbacks.checkpoint import check_files, newest
from lightning_modules.cli import main
from lightning_modules.config import compose
from lightning_modules.plan.stages import plan_stage
from lightning_modules.run import build_stage
from lightning_modules.signals import STOPPED

TOY = str(tiny.EXPERIMENTS / "toy")
STAGES = list(tiny.STAGES)
STEPS = 4
ROUNDING = 2e-5
ANSWERS = ["model.class_path=lightning_modules.AnswerGuidance", "model.init_args.answer_tokens=4"]
ANSWERS += ["model.init_args.init.exo_projector=${handoffs.stage1}:projector", "model.init_args.kl.detach_input=false"]
ANSWERS += ["data.init_args.narration={ego_text_fraction: 0.5}"]  # some ranks have captions to generate, others none
GROUNDING = ["model.init_args.grounding_weight=0.5", "model.init_args.grounding_steps=2"]
UNUSED = ["fsdp2", "ddp_find_unused_parameters_true"]  # strategies that do not wait for gradients that never come
SMALL = ["trainer.precision=bf16-mixed", "model.init_args.frozen_dtype=int8"]
BF16 = ["trainer.precision=bf16-mixed", "model.init_args.frozen_dtype=bfloat16"]


def arguments(stage, world, runs, starts, *more):
    options = [f"data_root={world}", f"runs={runs}", "network.lora.dropout=0", f"trainer.max_steps={STEPS}"]
    options += [f"handoffs.{stage}={starts}/toy/{stage}/handoff" for stage in STAGES[:3]]
    options += ["data.init_args.held_out=null", "checkpoint_every_n_steps=0", "trainer.val_check_interval=100"]
    return ["fit", TOY, stage, *tiny.OVERRIDES, *options, *more]


def weights(runs, stage):
    folder = runs / "toy" / stage / "handoff"
    files = {path.name: load_file(path) for path in sorted(folder.rglob("*.safetensors"))}
    named = {f"{file}:{name}": tensor for file, tensors in files.items() for name, tensor in tensors.items()}
    for name, tensor in named.items():
        if name.endswith("in_proj_bias"):
            # The keys' bias shifts all scores of a query alike: its gradient is rounding, which Adam scales to steps.
            tensor.view(3, -1)[1] = 0
    return named


def losses(runs, stage):
    events = EventAccumulator(str(runs / "toy" / stage)).Reload()
    return torch.tensor([event.value for event in events.Scalars("1_train/loss")])


def largest_difference(one, other):
    assert one.keys() == other.keys() and one
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.fixture(scope="module")
def alone(toy_world, tmp_path_factory):
    """Runs of one process."""
    runs = tmp_path_factory.mktemp("alone")
    for stage in STAGES:
        assert main(arguments(stage, toy_world, runs, runs)) == 0
    return runs


def memory_for_some(runs, world):
    """Return GiB of two devices: of one that holds everything, and of one for which a single part is recomputed."""
    _, folder, stage, *overrides = arguments("stage2", world, runs, runs, "trainer.devices=2", "trainer.strategy=fsdp2")
    config = compose(Path(folder), stage, overrides)
    plan = plan_stage(config, build_stage(config))
    return [8, plan.needed(plan.micro_batch, ("language_model",)) / 2**30]


@pytest.fixture(scope="module")
def by_two(alone, toy_world, tmp_path_factory):
    """The same stages by two processes, each from the stage weights that one process wrote, and one stage by four."""
    names = ["ddp", "fsdp2", "chain", "four", "bf16", "small", "answers", "auto", *(f"grounding {s}" for s in UNUSED)]
    runs = {name: tmp_path_factory.mktemp(name.replace(" ", "_")) for name in names}
    two = "trainer.devices=2"
    commands = [
        arguments(stage, toy_world, runs[strategy], alone, two, f"trainer.strategy={strategy}")
        for strategy in ("ddp", "fsdp2")
        for stage in STAGES
    ]
    commands += [
        arguments(stage, toy_world, runs["chain"], runs["chain"], two, "trainer.strategy=fsdp2") for stage in STAGES[:2]
    ]
    commands += [
        arguments(stage, toy_world, runs["bf16"], alone, two, "trainer.strategy=fsdp2", *BF16) for stage in STAGES[2:]
    ]
    commands += [
        arguments("stage3", toy_world, runs["small"], alone, two, *SMALL, "trainer.strategy=fsdp2_cpu_offload")
    ]
    commands += [arguments("stage2", toy_world, runs["answers"], alone, two, "trainer.strategy=fsdp2", *ANSWERS)]
    commands += [
        arguments("stage0", toy_world, runs[f"grounding {s}"], alone, two, f"trainer.strategy={s}", *GROUNDING)
        for s in UNUSED
    ]
    recorder = [{"class_path": "ranks.RecomputedParts", "init_args": {"folder": str(runs["auto"])}}]
    commands += [
        arguments(
            "stage2",
            toy_world,
            runs["auto"],
            alone,
            two,
            "trainer.strategy=fsdp2",
            "model.init_args.activation_checkpointing=auto",
            [f"plan.gpu_memory_gib={memory_gib}" for memory_gib in memory_for_some(alone, toy_world)],
            f"trainer.callbacks={json.dumps(recorder)}",
        )
    ]
    runs["printed"] = run_together(2, commands, tmp_path_factory.mktemp("two"))
    commands = [arguments("stage2", toy_world, runs["four"], alone, "trainer.devices=4", "trainer.strategy=fsdp2")]
    run_together(4, commands, tmp_path_factory.mktemp("four_ranks"))
    return runs


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_learn_what_one_does(alone, by_two, strategy, stage):
    difference = largest_difference(weights(alone, stage), weights(by_two[strategy], stage))
    print(f"{stage} {strategy}: largest difference of a weight {difference:.1e}")
    assert difference < ROUNDING
    torch.testing.assert_close(losses(by_two[strategy], stage), losses(alone, stage), rtol=1e-5, atol=1e-5)


def test_strategies_agree_on_steps_without_the_language_model(by_two, alone):
    """They compare the clips of each rank, which one process would not."""
    sharded, whole = (weights(by_two[f"grounding {strategy}"], "stage0") for strategy in UNUSED)
    assert largest_difference(sharded, whole) < ROUNDING < largest_difference(whole, weights(alone, "stage0"))


def test_every_process_recomputes_what_the_smallest_device_needs(alone, by_two):
    """With other parts on each rank, they would gather shards in different orders, and wait for each other for ever."""
    first, second = (json.loads((by_two["auto"] / f"rank_{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert 0 < len(first) < 6
    assert f"blocks of {', '.join(first)} are recomputed" in by_two["printed"][-1]
    assert largest_difference(weights(alone, "stage2"), weights(by_two["auto"], "stage2")) < ROUNDING


def test_sharded_processes_follow_the_demonstrator_s_captions(alone, by_two, toy_world, tmp_path):
    """One that the KL follows token by token, through a projector that nothing trains."""
    assert main(arguments("stage2", toy_world, tmp_path, alone, *ANSWERS)) == 0
    assert largest_difference(weights(tmp_path, "stage2"), weights(by_two["answers"], "stage2")) < ROUNDING
    assert not torch.isclose(losses(tmp_path, "stage2"), losses(alone, "stage2"), rtol=1e-3).all()


def test_four_processes_learn_what_one_does(alone, by_two):
    assert largest_difference(weights(alone, "stage2"), weights(by_two["four"], "stage2")) < ROUNDING


@pytest.mark.parametrize("stage", STAGES[2:])
def test_bfloat16_is_gathered_and_float32_kept_and_summed(alone, by_two, toy_world, tmp_path, stage):
    """Trained weights stay float32; losses are those of one process in bfloat16, which differ from float32 as much."""
    assert main(arguments(stage, toy_world, tmp_path, alone, *BF16)) == 0
    sharded = weights(by_two["bf16"], stage)
    assert {tensor.dtype for tensor in sharded.values()} == {torch.float32}
    torch.testing.assert_close(losses(by_two["bf16"], stage), losses(tmp_path, stage), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(losses(by_two["bf16"], stage), losses(alone, stage), rtol=2e-2, atol=2e-2)
    # A weight of bfloat16 would have lost the small steps: most of ours are no numbers of that type.
    moved = torch.cat([tensor.flatten() for tensor in sharded.values()])
    assert float((moved != moved.bfloat16().float()).float().mean()) > 0.5


def test_quantised_weights_are_not_sharded_and_the_rest_may_stay_on_the_cpu(alone, by_two, toy_world, tmp_path):
    assert main(arguments("stage3", toy_world, tmp_path, alone, *SMALL)) == 0
    torch.testing.assert_close(losses(by_two["small"], "stage3"), losses(tmp_path, "stage3"), rtol=2e-3, atol=2e-3)
    assert not torch.equal(losses(tmp_path, "stage3"), losses(alone, "stage3"))


def test_training_moves_weights_further_than_rounding(alone):
    """Else the comparisons above would hold without any training."""
    started = weights(alone, "stage0")["exo_encoder.safetensors:tower.conv1.weight"]
    trained = weights(alone, "stage1")["exo_encoder.safetensors:tower.conv1.weight"]
    assert float((started - trained).abs().max()) > 20 * ROUNDING


def test_one_process_starts_from_the_stage_weights_of_two(alone, by_two, toy_world, tmp_path):
    shutil.copytree(by_two["chain"], tmp_path, dirs_exist_ok=True)
    assert main(arguments("stage2", toy_world, tmp_path, tmp_path)) == 0
    assert largest_difference(weights(alone, "stage2"), weights(tmp_path, "stage2")) < 5 * ROUNDING


def test_clips_that_only_one_rank_lacks_change_nothing_for_the_others(toy_world, alone, tmp_path):
    """Half of the recordings are gone: ranks meet batches without any valid clip, and none waits for another."""
    world = tmp_path / "world"
    shutil.copytree(toy_world, world)
    index = (world / "ego_exo_clip" / "groups.jsonl").read_text().splitlines()
    for line in index[::2]:
        (world / json.loads(line)["views"]["ego"]["path"]).unlink()
    options = ["data.init_args.max_corrupt_fraction=1", "data.init_args.global_batch_size=2"]
    assert main(arguments("stage2", world, tmp_path / "one", alone, *options)) == 0
    two = ["trainer.devices=2", "trainer.strategy=fsdp2"]
    (printed,) = run_together(2, [arguments("stage2", world, tmp_path / "two", alone, *options, *two)], tmp_path)
    assert "corrupt sample" in printed
    assert largest_difference(weights(tmp_path / "one", "stage2"), weights(tmp_path / "two", "stage2")) < ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_rank_with_text_alone_waits_for_no_module(toy_world, alone, tmp_path, strategy):
    """Ranks of one sample a step: often one has a clip and the other has none, and they learn what one process does."""
    turns = [{"from": "human", "value": "What colour is the box?"}, {"from": "gpt", "value": "red"}]
    rows = [{"id": str(number), "conversations": turns} for number in range(24)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = f"[{toy_world}/instructions/egtea.jsonl, {tmp_path}/texts.jsonl]"
    options = [f"data.init_args.sources={sources}", "data.init_args.text_only=true"]
    options += ["data.init_args.global_batch_size=2", "trainer.max_steps=6"]
    assert main(arguments("stage3", toy_world, tmp_path / "one", alone, *options)) == 0
    two = ["trainer.devices=2", f"trainer.strategy={strategy}"]
    run_together(2, [arguments("stage3", toy_world, tmp_path / "two", alone, *options, *two)], tmp_path)
    assert largest_difference(weights(tmp_path / "one", "stage3"), weights(tmp_path / "two", "stage3")) < ROUNDING


def test_another_number_of_micro_batches_learns_the_same(alone, toy_world, tmp_path):
    for stage in STAGES:
        assert main(arguments(stage, toy_world, tmp_path, alone, "data.init_args.micro_batch_size=1")) == 0
        assert largest_difference(weights(alone, stage), weights(tmp_path, stage)) < ROUNDING, stage


def test_the_parts_table_shows_whole_sizes(by_two):
    one_encoder = "| exo_encoder    |     14,944 |  14,944 |"
    assert one_encoder in by_two["printed"][0] and one_encoder in by_two["printed"][4]


# ------------------------------------------------------------------------------------------------------------- faults


class Launched:
    """``fit`` with two processes, the second one started by the first, as on a laptop or a node."""

    def __init__(self, stage, world, runs, starts, *more):
        options = ["trainer.max_steps=5000", "checkpoint_every_n_steps=10", "trainer.devices=2", *more]
        words = [sys.executable, "-m", "lightning_modules", *arguments(stage, world, runs, starts, *options)]
        self.folder = runs / "toy" / stage
        self.errors = runs / "errors.txt"
        runs.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"PYTHONPATH": str(tiny.EXPERIMENTS.parent), "OMP_NUM_THREADS": "1"}
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
        self.until(lambda: newest(self.folder / "checkpoints"), 120)
        (self.other,) = [int(pid) for pid in self.children()]

    def children(self):
        task = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        pids = task.read_text().split()
        return [pid for pid in pids if "lightning_modules" in Path(f"/proc/{pid}/cmdline").read_text()]

    def until(self, true, seconds):
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline and self.process.poll() is None, self.errors.read_text()
            time.sleep(0.02)

    def ended(self, seconds):
        """Exit status of the first process; the other one is gone as well."""
        try:
            status = self.process.wait(seconds)
            deadline = time.monotonic() + 20
            while Path(f"/proc/{self.other}").exists():
                assert time.monotonic() < deadline, "the other process lives on"
                time.sleep(0.1)
        finally:
            for pid in (self.process.pid, self.other):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        return status


def test_an_error_in_one_process_is_printed_and_ends_the_other(alone, toy_world, tmp_path):
    """One recording is gone and no corrupt sample is allowed: the process that meets it first reports it."""
    world = tmp_path / "world"
    shutil.copytree(toy_world, world)
    (line, *_) = (world / "ego_exo_clip" / "groups.jsonl").read_text().splitlines()
    (world / json.loads(line)["views"]["ego"]["path"]).unlink()
    options = ["data.init_args.max_corrupt_fraction=0", "trainer.devices=2", "trainer.strategy=fsdp2"]
    words = arguments("stage2", world, tmp_path / "runs", alone, *options, "trainer.max_steps=100")
    environment = os.environ | {"PYTHONPATH": str(tiny.EXPERIMENTS.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lightning_modules", *words]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode != 0
    assert re.search(r"error: rank \d: \d of \d+ samples of this rank could not be used", run.stderr)


@pytest.mark.parametrize("signalled", [pytest.param("first", marks=pytest.mark.slow), "other"])
def test_a_signal_to_one_process_saves_and_stops_both(alone, toy_world, tmp_path, signalled):
    run = Launched("stage3", toy_world, tmp_path, alone, "trainer.strategy=fsdp2")
    os.kill(run.process.pid if signalled == "first" else run.other, signal.SIGTERM)
    assert run.ended(60) == STOPPED
    assert re.search(r"stopped: stage3 stopped at step \d+; run it again to resume", run.errors.read_text())
    reached = newest(run.folder / "checkpoints")
    check_files(reached)


def test_another_number_of_processes_resumes(alone, toy_world, tmp_path):
    """One process makes two steps, two the next two, one the last two: the weights are those of one process alone."""
    six = ["trainer.max_steps=6", "checkpoint_every_n_steps=2"]
    assert main(arguments("stage2", toy_world, tmp_path / "straight", alone, *six)) == 0
    two = ["trainer.devices=2", "trainer.strategy=fsdp2"]
    folder = tmp_path / "turns" / "toy" / "stage2"
    for turn, options in enumerate(([], two, [])):
        command = arguments("stage2", toy_world, tmp_path / "turns", alone, *six, *options)
        run_together(2, [command], tmp_path) if options else main(command)
        for step in range(2 * turn + 4, 8, 2):  # as if it had been killed two steps after it resumed
            shutil.rmtree(folder / "checkpoints" / f"{step:07d}", ignore_errors=True)
        if turn < 2:
            shutil.rmtree(folder / "handoff")
    straight, in_turns = (weights(tmp_path / runs, "stage2") for runs in ("straight", "turns"))
    assert largest_difference(straight, in_turns) < ROUNDING


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp2"])
def test_a_process_that_is_gone_ends_the_other(alone, toy_world, tmp_path, strategy):
    run = Launched("stage1", toy_world, tmp_path, alone, f"trainer.strategy={strategy}")
    os.kill(run.other, signal.SIGKILL)
    assert run.ended(60) != 0
    check_files(newest(run.folder / "checkpoints"))


@pytest.mark.parametrize("stalled", ["first", pytest.param("other", marks=pytest.mark.slow)])
def test_a_process_that_hangs_is_named_and_ends_all(alone, toy_world, tmp_path, stalled):
    run = Launched("stage1", toy_world, tmp_path, alone, "trainer.strategy=fsdp2", "stall_timeout_s=5")
    os.kill(run.process.pid if stalled == "first" else run.other, signal.SIGSTOP)
    if stalled == "first":  # it cannot be waited for while it sleeps: the other one has to notice
        run.until(lambda: "error: no progress for 5 s" in run.errors.read_text(), 60)
        os.kill(run.process.pid, signal.SIGCONT)
    assert run.ended(60) != 0
    shown = run.errors.read_text()
    assert "error: no progress for 5 s (stall_timeout_s)" in shown
    named = re.search(r"rank (\d) \d+ s ago in step \d+, (?:computing|waiting for the batch after) \S+", shown)
    assert named or "nothing is known of rank 0" in shown
