"""Build a network of a few thousand parameters, batches and stages for several test files."""

import os
from pathlib import Path

import torch

from datamodules.batch import IGNORE_INDEX, VIDEO_TOKEN_ID, ClipBatch, TextBatch
from datamodules.clips.dataset import ClipConfig
from datamodules.text import TextEncoder
from lightning_modules import (
    AnswerGuidance,
    DemonstratorLearnerGuidance,
    DemonstratorSelfPreparation,
    Exo2Ego,
    Initialisation,
    LearnerSelfPractice,
    OptimConfig,
)
from lightning_modules.inference.description import ModelDescription
from lightning_modules.model.encoders import EncoderConfig
from lightning_modules.model.exo2ego import Exo2EgoModel, NetworkConfig, ProjectorConfig
from lightning_modules.model.language_model import LanguageModelConfig
from lightning_modules.model.lora import LoRAConfig
from lightning_modules.model.mapping import MapperConfig
from lightning_modules.model.quantize import stored_parameters

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
STAGES = {
    "stage0": Initialisation,
    "stage1": DemonstratorSelfPreparation,
    "stage2": DemonstratorLearnerGuidance,
    "stage3": LearnerSelfPractice,
}
FRAMES, SIZE, WIDTH = 2, 16, 32
# The same network as overrides of an experiment.
OVERRIDES = [
    "threads=1",
    f"clips.num_frames={FRAMES}",
    f"clips.image_size={SIZE}",
    "network.encoder.patch_size=8",
    f"network.encoder.width={WIDTH}",
    "network.encoder.layers=2",
    "network.encoder.heads=2",
    "network.mapper.width=8",
    "network.mapper.num_blocks=1",
    "network.mapper.num_downsamplings=0",
    "network.language_model.overrides.hidden_size=32",
    "network.language_model.overrides.intermediate_size=48",
    "network.language_model.overrides.num_hidden_layers=2",
    "network.lora.rank=4",
    "data.init_args.num_workers=0",
    "data.init_args.global_batch_size=4",
    "trainer.max_steps=2",
    "trainer.val_check_interval=2",
    "trainer.enable_progress_bar=false",
    "monitor.every_n_steps=1",
    "checkpoint_every_n_steps=1",
]


REAL_WEIGHTS = Path(os.environ.get("EXO2EGO_WEIGHTS") or "no folder")
REAL_PARTS = (
    ("facebook/dinov2-small", "dinov2_vits14"),
    ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2_135m_instruct"),
)


def real_weights():
    """Return the folders of a DINOv2-S/14 tower and of SmolLM2-135M-Instruct in EXO2EGO_WEIGHTS, or None."""
    found = [next((REAL_WEIGHTS / n for n in names if (REAL_WEIGHTS / n).is_dir()), None) for names in REAL_PARTS]
    return found if all(found) else None


def network(width=WIDTH, dropout=0.1, tied=True, visual_inputs=("ego", "mapped")):
    overrides = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": None,
        "tie_word_embeddings": tied,
    }
    return NetworkConfig(
        encoder=EncoderConfig(image_size=SIZE, patch_size=8, width=width, layers=2, heads=2, mlp_ratio=2.0),
        language_model=LanguageModelConfig("mistral", overrides=overrides),
        projector=ProjectorConfig(depth=1, padding=0),
        mapper=MapperConfig(width=8, num_blocks=1, num_downsamplings=0),
        lora=LoRAConfig(rank=4, alpha=8, dropout=dropout),
        visual_inputs=list(visual_inputs),
    )


def video(clips, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (clips, FRAMES, SIZE, SIZE, 3), generator=generator, dtype=torch.uint8)


def clip_batch(seed=0):
    """Return two clips with five supervised tokens."""
    ids = torch.tensor([[1, VIDEO_TOKEN_ID, 5, 6, 7, 2], [1, VIDEO_TOKEN_ID, 8, 9, 2, 0]])
    labels = torch.tensor([[IGNORE_INDEX] * 3 + [6, 7, 2], [IGNORE_INDEX] * 3 + [9, 2, IGNORE_INDEX]])
    mask = torch.arange(6)[None] < torch.tensor([[6], [5]])
    return ClipBatch(["a", "b"], TextBatch(ids, mask, labels), 5.0, video(2, seed), video(2, seed + 1))


def make_stage(name, tokenizer, learning_rate=1e-2, optim=None, **changes):
    """A stage by name; ``answers`` is stage 2 with the KL on answers."""
    optim = optim or OptimConfig(learning_rate=learning_rate, warmup_fraction=0.0)
    stage = {**STAGES, "answers": AnswerGuidance}[name](
        **{"network": network(), "tokenizer": str(tokenizer), "optim": optim, **changes}
    )
    stage.num_frames = FRAMES  # as `check` learns from the data
    return stage


def answering_model(tokenizer, kind=Exo2Ego, **options):
    """Return a model of class ``kind`` with random weights, which answers anything."""
    encoder = TextEncoder(str(tokenizer), 64)
    parts = ("ego_encoder", "ego_to_exo", "projector", "language_model", "lora")
    description = ModelDescription(network(), len(encoder.tokenizer), parts, ClipConfig(FRAMES, SIZE))
    with torch.random.fork_rng():
        torch.manual_seed(3)  # its answers from x and from F(x) differ
        built = Exo2EgoModel(description.network, description.vocab_size, parts).eval()
    scatter(built)
    return kind(built, encoder, description, "tiny", **options)


@torch.no_grad()
def scatter(model, seed=0):
    """Move every parameter off its initial value, so that zero-initialised ones take part; not packed bits."""
    generator = torch.Generator().manual_seed(seed)
    quantised = stored_parameters(model)
    for parameter in model.parameters():
        if parameter in quantised:
            continue
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
