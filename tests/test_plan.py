"""The plan against what real steps do, and against figures worked out by hand for the full size."""

import math

import pytest
import tiny
import torch
import torch.distributed as dist
import torch.distributed.fsdp._fully_shard._fsdp_param_group as fsdp_groups
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

from datamodules.batch import VIDEO_TOKEN_ID, ClipBatch, Demonstration
from lightning_modules.cli import main
from lightning_modules.config import compose
from lightning_modules.plan.stages import (
    _FLOPS,
    PartActivations,
    PlanConfig,
    StagePlan,
    _state_bytes,
    plan_stage,
    plan_table,
)
from lightning_modules.run import build_stage
from lightning_modules.stages.guidance import CycleConfig
from lightning_modules.strategy import shard

TEXT, LABELS = 5, 3  # of the first row of tiny.clip_batch, its placeholder apart
SEVEN_B = tiny.EXPERIMENTS / "exo2ego_7b"


def config(name, **changes):
    return {
        "stage": name,
        "experiment": "tiny",
        "clips": {"num_frames": tiny.FRAMES, "image_size": tiny.SIZE},
        "data": {"init_args": {"global_batch_size": 8}},
        "trainer": {"devices": 2, "max_epochs": 3},
        "plan": {"samples": 100, "text_tokens": TEXT, "label_tokens": LABELS},
        **changes,
    }


def one_clip():
    """The first clip of the batch that the other tests train on."""
    batch = tiny.clip_batch()
    text = batch.text
    text.input_ids, text.labels, text.attention_mask = text.input_ids[:1], text.labels[:1], text.attention_mask[:1]
    return ClipBatch(batch.ids[:1], text, 3.0, batch.ego_video[:1], batch.exo_video[:1], valid=batch.valid[:1])


def counted_flops(stage, batch):
    """Operations of a real forward and backward pass."""
    torch.backends.mha.set_fastpath_enabled(False)  # the counter does not know that fused kernel
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=_FLOPS) as counter:
            sum(stage.losses(batch).values()).backward()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["stage1", "stage2", "stage3"])
def test_operations_are_those_of_a_real_step(toy_tokenizer, name):
    real = tiny.make_stage(name, toy_tokenizer)
    real.configure_model()
    real.train()
    planned = plan_stage(config(name), tiny.make_stage(name, toy_tokenizer))
    assert planned.flops == counted_flops(real, one_clip())
    assert planned.flops < planned.flops_recomputed < 4 / 3 * planned.flops


def planned_answers(toy_tokenizer, fraction, layers=2):
    """The plan of stage 2 with the KL on answers, where that fraction of the takes is narrated."""
    narration = {"ego_text_fraction": fraction}
    data = {"init_args": {"global_batch_size": 8, "narration": narration}}
    network = tiny.network()
    network.language_model.overrides["num_hidden_layers"] = layers
    stage = tiny.make_stage("answers", toy_tokenizer, answer_tokens=6, network=network)
    return plan_stage(config("stage2", data=data, trainer={"devices": 2, "strategy": "fsdp2"}), stage)


def test_operations_of_a_kl_on_answers_are_those_of_a_real_step(toy_tokenizer):
    real = tiny.make_stage("answers", toy_tokenizer, answer_tokens=6)
    real.configure_model()
    real.train()
    counted = {}
    for narrated in (True, False):
        batch = one_clip()
        batch.narrated = None if narrated else torch.tensor([False])
        assumed = PlanConfig(**config("stage2")["plan"])
        batch.prompt = torch.full((assumed.text_tokens - assumed.label_tokens + 1,), 5)
        batch.prompt[0] = VIDEO_TOKEN_ID
        counted[narrated] = counted_flops(real, batch)
    narrated, mixed = (planned_answers(toy_tokenizer, fraction) for fraction in (1.0, 0.25))
    assert narrated.flops == counted[True]
    # The last token of a caption is not read, and a row of one clip is not padded.
    assert mixed.flops == pytest.approx(0.25 * counted[True] + 0.75 * counted[False], rel=0.03)
    assert mixed.flops > 1.05 * narrated.flops
    assert (narrated.captions, mixed.captions) == (0.0, 3.0)


def test_stored_answers_cost_no_demonstrator(toy_tokenizer):
    stored = {"demonstrations": "demonstrations", "init": {"exo_projector": "handoff:projector"}, "top_k": 3}
    stored["cycle"] = CycleConfig(weight=0.0)
    real = tiny.make_stage("answers", toy_tokenizer, **stored)
    real.configure_model()
    real.train()
    batch = one_clip()
    batch.exo_video = None
    likeliest, log_probs = torch.zeros(3, 3, dtype=torch.int64), torch.zeros(3, 3)
    batch.demonstration = Demonstration(batch.text, likeliest, log_probs, log_probs[:, 0])
    sharded = config("stage2", trainer={"devices": 2, "strategy": "fsdp2"})
    planned = plan_stage(sharded, tiny.make_stage("answers", toy_tokenizer, **stored))
    assert planned.flops == counted_flops(real, batch)
    assert planned.gathers == 2
    assert "exo_encoder" not in planned.parts and "exo_projector" not in planned.parts


@pytest.fixture
def two_ranks():
    """Make this process the first of two; what it gathers from the other one is undefined."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,), mesh_dim_names=("data_parallel",))
    dist.destroy_process_group()


def test_the_language_model_is_gathered_once_for_all_captions(toy_tokenizer, two_ranks, monkeypatch):
    """Three times in all: for the demonstrator, for the learner, and for its backward pass."""
    stage = tiny.make_stage("answers", toy_tokenizer, answer_tokens=6)
    stage.configure_model()
    for unit in stage.model.units():
        shard(unit, two_ranks, "32-true")
    gathered = []
    all_gather = fsdp_groups.foreach_all_gather

    def counted(parameters, *args, **options):
        gathered.append(id(parameters[0].sharded_param))
        return all_gather(parameters, *args, **options)

    monkeypatch.setattr(fsdp_groups, "foreach_all_gather", counted)
    first, last = (id(next(layer.parameters())) for layer in stage.model.language_model.blocks())
    for narrated in (None, torch.tensor([True, False])):
        batch = tiny.clip_batch()
        batch.prompt, batch.narrated = torch.tensor([1, VIDEO_TOKEN_ID, 5]), narrated
        sum(stage.model.run(stage.losses, batch).values()).backward()
        # FSDP takes the demonstrator's last layer for the next one that the backward pass needs.
        assert (gathered.count(first), gathered.count(last)) == (3, 4)
        gathered.clear()
    narrated, mixed = (planned_answers(toy_tokenizer, fraction, layers=9) for fraction in (1.0, 0.25))
    assert narrated.gathers == mixed.gathers == 3
    assert narrated.gathered == mixed.gathered > 0
    # Nine layers lie on each device for a while, where else two of the largest units do.
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
    projector = stage.on_meta().projector
    inside = {id(p) for block in projector.blocks() for p in block.parameters()}
    largest = max(layer, sum(p.numel() for p in projector.parameters() if id(p) not in inside))
    assert mixed.states - narrated.states == 4 * (9 * layer - 2 * largest)


@pytest.mark.parametrize("name", ["stage1", "stage2", "stage3"])
def test_held_bytes_are_those_of_a_real_step(toy_tokenizer, name):
    real = tiny.make_stage(name, toy_tokenizer, activation_checkpointing=True)
    real.configure_model()
    real.train()
    batch = one_clip()
    known = {p.untyped_storage()._cdata for p in (*real.parameters(), *real.buffers(), batch.ego_video)}
    held = {}

    def pack(tensor):
        if tensor.untyped_storage()._cdata not in known and tensor.is_floating_point():
            held[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = real.losses(batch)
    size = sum(tensor.untyped_storage().nbytes() for tensor in held.values())
    assert losses
    planned = plan_stage(config(name), tiny.make_stage(name, toy_tokenizer))
    assert planned.activations_checkpointed == pytest.approx(size, rel=0.15)  # the real one pads and splices rows
    assert planned.activations_checkpointed + planned.transient < planned.activations


def test_frozen_parts_cost_no_weight_gradients(toy_tokenizer):
    flops = {}
    for train in (["exo_encoder", "projector"], ["projector"]):
        planned = plan_stage(config("stage1"), tiny.make_stage("stage1", toy_tokenizer, train=train))
        flops[len(train)] = planned.flops
        assert {part for part, (_, trained) in planned.parts.items() if trained} == set(train)
    assert flops[1] < flops[2]


def test_steps_and_split_follow_from_the_configuration(toy_tokenizer):
    planned = plan_stage(config("stage1"), tiny.make_stage("stage1", toy_tokenizer))
    assert (planned.devices, planned.micro_batch, planned.accumulate, planned.global_batch) == (2, 4, 1, 8)
    assert (planned.steps_per_epoch, planned.steps, planned.warmup_steps) == (12, 36, 0)
    split = config("stage1", data={"init_args": {"global_batch_size": 8, "micro_batch_size": 1}})
    assert plan_stage(split, tiny.make_stage("stage1", toy_tokenizer)).accumulate == 4
    bad = config("stage1", data={"init_args": {"global_batch_size": 8, "micro_batch_size": 3}})
    with pytest.raises(ValueError, match=r"micro_batch_size: 8 samples do not split into 2 devices times 3"):
        plan_stage(bad, tiny.make_stage("stage1", toy_tokenizer))
    with pytest.raises(ValueError, match=r"trainer.devices: got 'auto'"):
        plan_stage(config("stage1", trainer={"devices": "auto"}), tiny.make_stage("stage1", toy_tokenizer))


def plan_of(**changes):
    settings = {
        "name": "stage2",
        "parts": {"projector": (10**9, True), "language_model": (7 * 10**9, False)},
        "visual_tokens": 100,
        "text_tokens": 20,
        "flops": 10**14,
        "flops_recomputed": 13 * 10**13,
        "activations": 10 * 2**30,
        "activations_checkpointed": 2**30,
        "transient": 2**29,
        "states": 30 * 2**30,
        "frozen_itemsize": 4,
        "checkpointing": True,
        "devices": 4,
        "micro_batch": 16,
        "accumulate": 1,
        "steps_per_epoch": 1000,
        "steps": 2000,
        "warmup_steps": 60,
    }
    return StagePlan(**settings | changes)


def test_hours_are_samples_times_operations_over_what_devices_do():
    # 2000 steps x 64 samples x 100 TFLOP over 4 devices x 100 TFLOP/s x 0.5
    assert plan_of().hours(100, 0.5) == pytest.approx(2000 * 64 * 100 / 200 / 3600)
    assert plan_of(steps=None).hours(100, 0.5) is None


def test_a_plan_that_cannot_fit_is_refused_with_the_keys_to_change():
    # 1.1 x (30 + 16 x 1.5) + 1.5 = 60.9 GiB; with 8 clips a device 47.7
    plan_of().require_fit(61)
    plan_of().require_fit(None)
    with pytest.raises(ValueError, match=r"stage2: needs 61 GiB .* is 48: lower data.*micro_batch_size to 8, or"):
        plan_of().require_fit(48)
    with pytest.raises(ValueError, match=r"needs \d+ GiB .*: set model.init_args.activation_checkpointing: true"):
        plan_of(checkpointing=False).require_fit(100)
    with pytest.raises(ValueError, match=r"shard weights.*\(trainer.strategy\), or keep frozen parts in bfloat16"):
        plan_of(states=100 * 2**30).require_fit(48)
    with pytest.raises(ValueError, match=r"shard weights.*\(trainer.strategy\)$"):
        plan_of(states=100 * 2**30, frozen_itemsize=2).require_fit(48)


def test_the_table_shows_every_stage():
    table = plan_table([plan_of(), plan_of(name="stage3", steps=None)], [PlanConfig(peak_tflops=100), PlanConfig()])
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in table.splitlines()}
    assert rows["million parameters"] == ["stage2", "stage3"]
    assert rows["projector"] == ["1,000.00 *", "1,000.00 *"]
    assert rows["trained"] == ["1,000.0", "1,000.0"]
    assert rows["devices x micro-batch x accumulated"] == ["4 x 16 x 1"] * 2
    assert rows["hours"] == [f"{plan_of().hours(100, 0.4):,.1f}", ""]


@pytest.mark.parametrize("changes", [{"label_tokens": 80}, {"label_tokens": 0}, {"mfu": 0.0}])
def test_impossible_assumptions_are_refused(changes):
    with pytest.raises(ValueError, match=r"plan\.\w+: got .*, allowed: "):
        PlanConfig(**changes)


def test_the_default_experiment_has_a_plan(toy_world, capsys):
    assert main(["plan", str(tiny.EXPERIMENTS / "toy"), "stage0", f"data_root={toy_world}"]) == 0
    assert "| of them warm-up                     |         22 |" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------- full size


COUNTS = {
    "exo_encoder": 290_909_184,  # 23 of 24 blocks, patches, positions, class token, first norm
    "ego_encoder": 290_909_184,
    "projector": 489_188_608,
    "exo_projector": 489_188_608,
    "language_model": 7_241_732_096,
    "lora": 335_544_320,
}


@pytest.fixture(scope="module")
def seven_b():
    return {name: build_stage(compose(SEVEN_B, name)) for name in ("stage1", "stage2", "stage3")}


@pytest.mark.parametrize("name", ["stage1", "stage2", "stage3"])
def test_parameters_of_the_paper_s_model(seven_b, name):
    stage = seven_b[name]
    model = stage.on_meta()
    counts = {part: sum(p.numel() for p in model.part(part).values()) for part in model.parts}
    assert counts.keys() == set(stage.uses)
    mappings = {counts.pop(part) for part in ("ego_to_exo", "exo_to_ego") if part in counts}
    assert {round(count / 1e6, 2) for count in mappings} <= {182.23}
    assert counts == {part: COUNTS[part] for part in counts}
    assert len(model.part("language_model")) == 291 and len(model.part("projector")) == 113
    assert stage.network.visual_tokens(16) * stage.num_visual_inputs == (1521 if name == "stage1" else 3042)


def test_costs_of_the_paper_s_second_stage(capsys):
    # 150.3 TFLOP and 46 hours by the closed formulas, which apply the head at every position and train the projector;
    # GiB counted apart.
    train = "model.init_args.train=[ego_encoder, projector, ego_to_exo, exo_to_ego]"
    assert main(["plan", str(SEVEN_B), "stage2", train]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in lines if line.startswith("|")}
    assert float(rows["TFLOP a sample"]) == pytest.approx(150.3, rel=0.02)
    assert float(rows["with recomputation"]) == pytest.approx(150.3 + 63.0, rel=0.1)
    assert float(rows["GiB a sample, checkpointed"]) == pytest.approx(2.4, rel=0.1)
    assert float(rows["hours"]) == pytest.approx(46, rel=0.02)
    assert rows["steps an epoch"] == str(f"{1_100_000 // 256:,}")
    assert rows["of them warm-up"] == str(math.ceil(0.03 * 2 * (1_100_000 // 256)))


def test_as_little_as_fits_is_recomputed():
    parts = {
        "ego_encoder": PartActivations(held=4 * 2**30, inputs=2**28, transient=2**28, flops=10),
        "language_model": PartActivations(held=5 * 2**30, inputs=2**28, transient=2**29, flops=100),
        "exo_encoder": PartActivations(held=0, inputs=0, transient=0, flops=0),
    }
    plan = plan_of(checkpointing=(), activations_by_part=parts, micro_batch=1)
    # 1.1 x (30 + 10) + 1.5 = 45.5 GiB with everything held; 41.6 and 40.8 GiB with one part recomputed; 36.7 with both
    assert plan.least_recomputation(46) == ()
    assert plan.least_recomputation(42) == ("ego_encoder",)  # cheaper than the language model
    assert plan.least_recomputation(41) == ("language_model",)
    assert plan.least_recomputation(37) == plan.least_recomputation(1) == ("ego_encoder", "language_model")
    assert plan.least_recomputation(None) == ("ego_encoder", "language_model")


@pytest.mark.parametrize("name", ["stage2"])
def test_recomputing_all_parts_is_what_checkpointing_everything_is(toy_tokenizer, name):
    whole = plan_stage(config(name), tiny.make_stage(name, toy_tokenizer, activation_checkpointing=True))
    parts = list(whole.activations_by_part)
    listed = plan_stage(config(name), tiny.make_stage(name, toy_tokenizer, activation_checkpointing=parts))
    assert listed.flops_recomputed == whole.flops_recomputed
    assert listed.needed(4, listed.checkpointing) == pytest.approx(whole.needed(4, True))
    auto = plan_stage(
        config(name, plan={"gpu_memory_gib": 80}),
        tiny.make_stage(name, toy_tokenizer, activation_checkpointing="auto"),
    )
    assert auto.checkpointing == () and auto.flops_recomputed == auto.flops
    assert "recomputed blocks" in plan_table([auto], [PlanConfig()])


def test_a_part_that_a_stage_lacks_cannot_be_recomputed(toy_tokenizer):
    with pytest.raises(ValueError, match=r"model.activation_checkpointing: got lora_encoder, allowed: exo_encoder"):
        tiny.make_stage("stage1", toy_tokenizer, activation_checkpointing=["lora_encoder"])


def test_the_largest_stage_fits_a_card_of_24_gb(capsys):
    assert main(["plan", str(tiny.EXPERIMENTS / "exo2ego_7b_24gb"), "stage3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in lines if line.startswith("|")}
    assert float(rows["GiB a device"][0]) < 20
    # By hand: 16 bytes for what trains and 2 for what else is frozen, without the 32 decoder layers of 218.1 M weights.
    layers = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    frozen = 2 * (COUNTS["language_model"] - layers + COUNTS["projector"])
    trained = COUNTS["ego_encoder"] + 182_225_664 + 335_544_320
    assert float(rows["on the CPU"][-1]) == pytest.approx((16 * trained + frozen) / 2**30, rel=0.001)
    assert float(rows["GiB of weights and optimiser"][-1]) > layers / 2**30


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        # The whole optimiser on the device: 18 bytes for what trains, or 12 with moments in 8 bits.
        ([], 18 * 489.19e6 + 2 * 7532.64e6),
        (["model.init_args.optim.algorithm=adamw8bit"], 12 * 489.19e6 + 2 * 7532.64e6),
        (["model.init_args.frozen_dtype=int8"], 18 * 489.19e6 + 2 * 553.3e6 + 6979.3e6 + 2 * 4096 * 14336),
        (["model.init_args.frozen_dtype=nf4"], 18 * 489.19e6 + 2 * 553.3e6 + 6979.3e6 * 9 / 16 + 2 * 4096 * 14336),
    ],
)
def test_bytes_of_quantised_weights_and_moments(seven_b, override, expected):
    given = ["trainer.devices=1", "trainer.num_nodes=1", "trainer.strategy=auto", *override]
    configuration = compose(SEVEN_B, "stage1", given)
    stage = build_stage(configuration)
    stage.model = stage.on_meta()
    trained = sum(p.numel() for p in stage.model.part("projector").values())
    frozen = sum(p.numel() for part in ("exo_encoder", "language_model") for p in stage.model.part(part).values())
    assert _state_bytes(stage, trained, frozen, "auto", 1)[0] == pytest.approx(expected, rel=0.001)


@pytest.mark.slow
def test_the_small_experiment_fits_cards_of_8_and_24_gb():
    configuration = compose(tiny.EXPERIMENTS / "exo2ego_small", "stage2")
    plan = plan_stage(configuration, build_stage(configuration))
    memory = configuration["plan"]["gpu_memory_gib"]
    plan.require_fit(memory)
    assert memory < 8 and plan.checkpointing == plan.least_recomputation(memory) != ()
    assert plan.least_recomputation(23.5) == ()  # on 24 GB, nothing is recomputed
