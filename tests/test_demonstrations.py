"""The demonstrator's answers, computed once: the same losses as without them, the same bytes, and nothing stale."""

import shutil
from types import SimpleNamespace

import pytest
import tiny
import torch
from ranks import run_together
from safetensors.torch import load_file

import datamodules.ego_exo_clip.demonstrations as files
from datamodules.clips.sampler import BatchRequest
from lightning_modules.cli import main
from lightning_modules.config import compose
from lightning_modules.demonstrations import _Work, demonstrator_config, settings, use_demonstrations
from lightning_modules.run import build, build_stage
from lightning_modules.weights.handoff import full_tensors, write_stage_weights

TOY = tiny.EXPERIMENTS / "toy"
PARTS = ("exo_encoder", "projector", "language_model")


def write_weights(folder, seed):
    """Write the weights of a stage 1, moved off their initial values."""
    stage = build_stage(compose(TOY, "stage1", [*tiny.OVERRIDES, "model.init_args.init=null", *WORLD]))
    stage.configure_model()
    tiny.scatter(stage.model, seed)
    parts = [(part, full_tensors(stage.model.part(part))) for part in PARTS]
    write_stage_weights(folder, parts, stage.network.lora, {"stage": "stage1", "started_from": {}})


WORLD: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def small_shards():
    """Several shards, though there are few pairs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "SHARD_PAIRS", 48)
        yield


@pytest.fixture(scope="module")
def weights(toy_world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage1") / "handoff"
    WORLD[:] = [f"data_root={toy_world}"]
    write_weights(folder, seed=0)
    return folder


@pytest.fixture(scope="module")
def overrides(toy_world, weights, tmp_path_factory):
    """Stage 2 with the KL on answers, half of its takes narrated, and answers with all probabilities."""
    runs = tmp_path_factory.mktemp("runs")
    return [
        *tiny.OVERRIDES,
        f"data_root={toy_world}",
        f"runs={runs}",
        f"handoffs.stage1={weights}",
        f"start.language_model={weights}",
        "model.class_path=lightning_modules.AnswerGuidance",
        "model.init_args.init.exo_projector=${handoffs.stage1}:projector",
        "model.init_args.answer_tokens=5",
        "model.init_args.top_k=1000",
        "model.init_args.cycle.weight=0",
        "model.init_args.kl.detach_input=false",
        "model.init_args.demonstrations=${runs}/demonstrations",
        "data.init_args.narration={ego_text_fraction: 0.5}",
        "data.init_args.held_out=null",
        "trainer.val_check_interval=100",
        "trainer.logger=false",
    ]


@pytest.fixture(scope="module")
def stored(overrides):
    """Compute all answers once, and return their folder."""
    run = build(compose(TOY, "stage2", overrides))
    assert main(["demonstrate", str(TOY), "stage2", *overrides]) == 0
    return files.Path(run.stage.demonstrations)


@pytest.fixture
def copy(stored, tmp_path):
    """Return a copy of the demonstrations, and the override that names it."""
    shutil.copytree(stored, tmp_path / "copy")
    return tmp_path / "copy", f"model.init_args.demonstrations={tmp_path / 'copy'}"


def bytes_of(folder):
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def prepared(overrides, *more):
    """Return stage and training set of a run, ready to compute losses."""
    run = build(compose(TOY, "stage2", [*overrides, *more]))
    use_demonstrations(run)
    run.datamodule.setup("fit")
    run.stage.configure_model()
    run.stage.train()
    run.stage.total_steps = lambda: 2
    return run.stage, run.datamodule.train_set


def batch_of(dataset, epoch=0):
    """Return four samples, narrated and not, from the first and the last shard."""
    indices = [int(dataset.with_text[0]), *dataset.without_text[[0, -1]].tolist(), int(dataset.with_text[-1])]
    return dataset.__getitems__(BatchRequest(epoch, indices, indices, 1))


# ------------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("policy", [pytest.param("all", marks=pytest.mark.slow), "random"])
def test_losses_with_all_probabilities_stored_are_those_without(overrides, stored, policy):
    policy = f"data.init_args.exo_policy={policy}"
    cached, read = prepared(overrides, policy)
    computed, decoded = prepared(overrides, policy, "model.init_args.demonstrations=null")
    with torch.no_grad():
        for name in ("ego_encoder", "projector"):  # so that the learner is not the demonstrator
            for one, other in zip(cached.model.part(name).values(), computed.model.part(name).values(), strict=True):
                one.mul_(1.3)
                other.copy_(one)
    for epoch in (0, 1):
        losses = []
        for stage, dataset in ((cached, read), (computed, decoded)):
            batch = batch_of(dataset, epoch)
            assert batch.narrated.tolist() == [True, False, False, True]
            losses.append(stage.losses(batch.to("cpu")))
        assert batch_of(read).exo_video is None and batch_of(decoded).exo_video is not None
        assert losses[0].keys() == losses[1].keys() == {"vtg", "kl"}
        for name, loss in losses[0].items():
            torch.testing.assert_close(loss, losses[1][name], rtol=1e-5, atol=1e-6)
        assert losses[0]["kl"] > 1e-3
    assert not {"exo_encoder", "exo_projector"} & set(cached.model.parts)


@pytest.mark.slow
def test_the_likeliest_tokens_alone_lower_the_kl(overrides, stored, tmp_path):
    few = ["model.init_args.top_k=3", f"model.init_args.demonstrations={tmp_path / 'few'}"]
    assert main(["demonstrate", str(TOY), "stage2", *overrides, *few]) == 0
    sizes = [sum(map(len, bytes_of(folder).values())) for folder in (tmp_path / "few", stored)]
    assert sizes[0] < sizes[1] / 4
    kl = []
    for more in (few, []):
        stage, dataset = prepared(overrides, *more)
        kl.append(stage.losses(batch_of(dataset))["kl"].item())
    assert 0 < kl[0] < kl[1]


def test_exocentric_video_is_read_where_another_loss_needs_it(overrides, stored):
    stage, dataset = prepared(overrides, "model.init_args.cycle.weight=0.5")
    batch = batch_of(dataset)
    assert batch.exo_video is not None and "exo_projector" not in stage.model.parts
    losses = stage.losses(batch)
    assert losses.keys() == {"vtg", "kl", "cycle"} and "guidance/kl" in stage.step_log
    stage, dataset = prepared(overrides, "model.init_args.cycle={weight: 0.5, backward: false}")
    assert stage.losses(batch_of(dataset)).keys() == {"vtg", "kl", "cycle"}
    assert "exo_encoder" not in stage.model.parts


def test_a_run_needs_neither_exocentric_videos_nor_the_demonstrator_s_parts(overrides, stored, toy_world, tmp_path):
    shutil.copytree(toy_world, tmp_path / "world", ignore=shutil.ignore_patterns("cam*.mp4"))
    more = [f"data_root={tmp_path / 'world'}", f"run_dir={tmp_path / 'run'}"]
    assert main(["fit", str(TOY), "stage2", *overrides, *more]) == 0
    assert (tmp_path / "run/handoff/manifest.json").is_file()


# -------------------------------------------------------------------------------------------------------------- files


def test_an_interrupted_computation_resumes_with_the_same_bytes(overrides, stored, tmp_path, monkeypatch):
    expected = bytes_of(stored)
    assert len(expected) >= 3
    elsewhere = [*overrides, f"model.init_args.demonstrations={tmp_path / 'new'}"]
    write, written = files.Demonstrations.write, []

    def interrupted(demonstrations, pairs, answers):
        if len(written) == 1:
            raise OSError("interrupted")
        write(demonstrations, pairs, answers)
        written.append(pairs)

    with monkeypatch.context() as patch:
        patch.setattr(files.Demonstrations, "write", interrupted)
        assert main(["demonstrate", str(TOY), "stage2", *elsewhere]) == 2
    assert len(bytes_of(tmp_path / "new")) == 1
    (tmp_path / "new/.000001.safetensors.0.partial").write_bytes(b"torn")
    assert main(["demonstrate", str(TOY), "stage2", *elsewhere, "data.init_args.num_workers=1"]) == 0
    assert bytes_of(tmp_path / "new") == expected
    assert not list((tmp_path / "new").glob(".*"))


def test_pairs_that_are_missing_are_refused_and_added(overrides, copy, capsys):
    folder, here = copy
    expected = bytes_of(folder)
    (folder / "000001.safetensors").unlink()
    assert main(["fit", str(TOY), "stage2", *overrides, here]) == 2
    message = capsys.readouterr().err
    assert (
        f"{folder}: 48 of " in message
        and "pairs have no demonstration: run `make demonstrate EXPERIMENT=toy RUNS=" in message
    )
    assert main(["demonstrate", str(TOY), "stage2", *overrides, here]) == 0
    assert bytes_of(folder) == expected


@pytest.mark.slow
def test_another_policy_reads_the_answers_that_it_needs(overrides, stored, tmp_path):
    best = [*overrides, "data.init_args.exo_policy=best", f"model.init_args.demonstrations={tmp_path / 'best'}"]
    assert main(["demonstrate", str(TOY), "stage2", *best]) == 0
    assert sum(map(len, bytes_of(tmp_path / "best").values())) < sum(map(len, bytes_of(stored).values()))
    prepared(best)
    with pytest.raises(files.DemonstrationsError, match="pairs have no demonstration"):
        prepared([*best, "data.init_args.exo_policy=all"])
    prepared(overrides, "data.init_args.exo_policy=best")


OTHER = {
    "answer_tokens": "model.init_args.answer_tokens=6",
    "clips": "clips.frame_fit=squash",
    "kl.tau": "model.init_args.kl.tau=2.0",
    "narrated takes": "data.init_args.narration={ego_text_fraction: 0.3}",
    "prompt": "data.init_args.instruction=What is the hand?",
}


def test_answers_made_with_other_settings_are_refused_by_name(overrides, stored):
    names = ", ".join(OTHER)
    with pytest.raises(
        files.DemonstrationsError, match=rf"{stored}: .* with different {names}: run `make demonstrate E"
    ):
        prepared(overrides, *OTHER.values())


def test_answers_in_8_bits_are_not_those_in_bfloat16(overrides):
    mixed = [*overrides, "trainer.precision=bf16-mixed"]
    datamodule = build(compose(TOY, "stage2", overrides)).datamodule
    datamodule.setup("fit")
    precisions = [
        settings(compose(TOY, "stage2", [*mixed, f"model.init_args.frozen_dtype={kind}"]), datamodule)["precision"]
        for kind in ("int8", "bfloat16")
    ]
    assert precisions == [["bf16-mixed", "int8"], ["bf16-mixed", "torch.bfloat16"]]


@pytest.mark.slow
def test_a_language_model_in_8_bits_gives_answers(overrides, tmp_path):
    changes = ["trainer.precision=bf16-mixed", "model.init_args.frozen_dtype=int8"]
    small = [*overrides, *changes, f"model.init_args.demonstrations={tmp_path}"]
    assert main(["demonstrate", str(TOY), "stage2", *small]) == 0
    prepared(small)


def test_answers_of_another_demonstrator_are_refused_until_they_are_computed_again(overrides, copy, tmp_path, capsys):
    folder, here = copy
    write_weights(tmp_path / "handoff", seed=1)
    changed = [*overrides, here, f"handoffs.stage1={tmp_path / 'handoff'}"]
    for verb in ("fit", "demonstrate"):
        assert main([verb, str(TOY), "stage2", *changed]) == 2
        message = capsys.readouterr().err
        assert "made with different weights of exo_encoder, weights of exo_projector: run `make demonstrate" in message
        assert "FORCE=1`" in message
    before = bytes_of(folder)
    assert main(["demonstrate", str(TOY), "stage2", *changed, "--force"]) == 0
    assert bytes_of(folder).keys() == before.keys() and bytes_of(folder) != before
    prepared(changed)


def test_a_damaged_shard_is_named(overrides, copy):
    folder, here = copy
    (folder / "000001.safetensors").write_bytes(b"no tensors")
    with pytest.raises(
        files.DemonstrationsError, match=r"000001.safetensors: cannot be read .*: delete it and run `make"
    ):
        prepared(overrides, here)


def test_a_shard_of_another_folder_is_refused(overrides, copy):
    folder, here = copy
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"answer_tokens": 5', '"answer_tokens": 6'))
    with pytest.raises(files.DemonstrationsError, match=r"is not of the demonstrator that manifest\.json describes"):
        prepared(overrides, here, "model.init_args.answer_tokens=6")


def test_there_are_no_demonstrations_yet(overrides, tmp_path):
    with pytest.raises(
        files.DemonstrationsError, match=r"^No demonstrations in .*/new. Run `make demonstrate EXPERIMENT="
    ):
        prepared(overrides, f"model.init_args.demonstrations={tmp_path / 'new'}")


def test_a_clip_that_the_demonstrator_could_not_read_takes_no_part(overrides, toy_world, tmp_path):
    shutil.copytree(toy_world, tmp_path / "world")
    broken = sorted((tmp_path / "world/takes/toy_train_0001").rglob("cam*.mp4"))[0]
    broken.write_bytes(b"")
    more = [f"data_root={tmp_path / 'world'}", f"model.init_args.demonstrations={tmp_path / 'new'}"]
    more += ["data.init_args.max_corrupt_fraction=0.5"]
    assert main(["demonstrate", str(TOY), "stage2", *overrides, *more]) == 0
    stage, dataset = prepared(overrides, *more)
    bad = next(index for index in range(len(dataset)) if dataset.problem(index, 0))
    batch = dataset.__getitems__(BatchRequest(0, [bad, 0], [bad, 0], 1))
    assert batch.valid.tolist() == [False, True]
    assert batch.corrupt[0].startswith(f"{dataset.name(bad)}: no demonstration ({broken}")
    assert stage.losses(batch)["kl"].isfinite()
    nothing = dataset.__getitems__(BatchRequest(0, [bad], [bad], 1))
    assert stage.losses(nothing)["kl"].item() == 0


# ------------------------------------------------------------------------------------------------------ configuration


def test_answers_that_would_change_are_not_stored(toy_tokenizer):
    with pytest.raises(ValueError, match=r"^model.demonstrations: y passes through the projector that trains"):
        tiny.make_stage("answers", toy_tokenizer, demonstrations="demonstrations")


def test_the_mean_over_cameras_is_not_stored(overrides, stored, capsys):
    mean = "data.init_args.exo_policy=mean"
    for command in ("demonstrate", "fit"):
        assert main([command, str(TOY), "stage2", *overrides, mean]) == 2
        assert (
            "data.init_args.exo_policy: got mean, but demonstrations are of one camera each" in capsys.readouterr().err
        )


def test_a_batch_without_answers_is_refused(overrides, stored):
    stage, dataset = prepared(overrides)
    batch = batch_of(dataset)
    batch.demonstration = None
    with pytest.raises(ValueError, match=r"model\.demonstrations: the batch has no demonstrations"):
        stage.losses(batch)


def test_only_a_stage_that_reads_answers_has_them_computed(overrides, capsys):
    assert main(["demonstrate", str(TOY), "stage2", *overrides, "model.init_args.demonstrations=null"]) == 2
    assert "model.init_args.demonstrations: got null in stage2 of toy" in capsys.readouterr().err


def test_processes_compute_different_shards(overrides, stored, tmp_path):
    """One that would have none computes a batch that nobody keeps, as gathering needs every process."""
    config = compose(TOY, "stage2", [*overrides, f"model.init_args.demonstrations={tmp_path / 'new'}"])
    run = build(demonstrator_config(config))
    run.datamodule.setup("fit")
    pairs = []
    for rank in range(5):
        work = _Work(config, run, force=False)
        work.trainer = SimpleNamespace(global_rank=rank, world_size=5)
        assert len(work.predict_dataloader()) > 0
        kept = {shard for shard, _, is_last in work.batches if is_last}
        pairs += [pair for shard, batch, _ in work.batches if shard in kept for pair in batch.tolist()]
    assert sorted(pairs) == run.datamodule.train_set.used_pairs().tolist() and not kept


@pytest.mark.slow
def test_two_sharded_processes_write_what_one_does(overrides, stored, tmp_path):
    """Shards have their usual size there, so that one process has nothing to do."""
    here = f"model.init_args.demonstrations={tmp_path / 'two'}"
    arguments = ["demonstrate", str(TOY), "stage2", *overrides, here, "trainer.devices=2", "trainer.strategy=fsdp2"]
    run_together(2, [arguments], tmp_path)
    whole = load_file(tmp_path / "two/000000.safetensors")
    parts = [load_file(file) for file in sorted(stored.glob("*.safetensors"))]
    for name in ("pairs", "words", "likeliest", "log_probs", "log_rest"):
        assert torch.equal(whole[name], torch.cat([part[name] for part in parts])), name
