"""The model that all stages share: two encoders, one projector, two mappings, one language model.

Letters: ``B`` clips, ``T`` frames, ``S`` frame side, ``h`` and ``w`` patch rows and columns, ``C`` encoder width,
``N`` visual tokens of one visual input, ``D`` language model width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_modules.model.encoders import (
    EncoderConfig,
    EncoderShape,
    VisionEncoder,
    build_encoder,
    encoder_shape,
)
from lightning_modules.model.language_model import LanguageModel, LanguageModelConfig
from lightning_modules.model.lora import LoRAConfig, add_lora
from lightning_modules.model.mapping import FeatureMapping, MapperConfig
from lightning_modules.model.projector import STCConnector, stc_tokens
from lightning_modules.model.quantize import hidden_count

VISUAL_INPUTS = ("ego", "mapped")
"""Features of an egocentric clip that the language model can read, in this order: x, and F(x)."""

PARTS = (
    "exo_encoder",
    "ego_encoder",
    "projector",
    "exo_projector",
    "ego_to_exo",
    "exo_to_ego",
    "language_model",
    "lora",
)


@dataclass
class ProjectorConfig:
    """Form of the STC connector, see `STCConnector`."""

    depth: int = 4
    mlp_depth: int = 2
    padding: int = 1


@dataclass
class NetworkConfig:
    """Shape of every part.

    Attributes:
        encoder: tower of both visual encoders.
        language_model: architecture or released weights.
        projector: connector shared by both views.
        mapper: form of F and G.
        lora: adapters of the language model in stage 3.
        visual_inputs: features of an egocentric clip that the language model reads, projected and concatenated:
            ``ego`` (x), ``mapped`` (F(x)), or both in this order.
    """

    encoder: EncoderConfig
    language_model: LanguageModelConfig
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    mapper: MapperConfig = field(default_factory=MapperConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    visual_inputs: list[str] = field(default_factory=lambda: list(VISUAL_INPUTS))

    def __post_init__(self) -> None:
        """Refuse unknown, repeated or unordered visual inputs."""
        if not self.visual_inputs or self.visual_inputs != [v for v in VISUAL_INPUTS if v in self.visual_inputs]:
            raise ValueError(
                f"network.visual_inputs: got [{', '.join(map(str, self.visual_inputs))}], allowed: [ego, mapped], "
                "[ego] or [mapped]"
            )

    @property
    def encoder_shape(self) -> EncoderShape:
        """Sizes of the encoders' input and output."""
        return encoder_shape(self.encoder)

    def visual_tokens(self, num_frames: int) -> int:
        """Number of visual tokens of one visual input of a clip of ``num_frames`` frames.

        Raises:
            ValueError: the projector would leave none.
        """
        return stc_tokens(self.projector.padding, num_frames, *self.encoder_shape.grid)


class Exo2EgoModel(nn.Module):
    """The parts of Exo2Ego (arXiv 2503.09143) that one stage uses.

    Encoders compute patch features; F and G map these, before the projector; the language model reads the projected
    visual inputs, concatenated. The paper does not state where F acts and how x and F(x) are joined.

    Args:
        network: shapes.
        vocab_size: of the tokenizer.
        parts: names out of ``PARTS`` to build; the others are absent and cost nothing.
        empty: parts that get no memory yet, since their weights are read from files, see ``load_weights``.
    """

    exo_encoder: VisionEncoder
    ego_encoder: VisionEncoder
    ego_to_exo: FeatureMapping
    exo_to_ego: FeatureMapping
    projector: STCConnector
    exo_projector: STCConnector
    """Projector for y alone, where a stage keeps a separate one, see `DemonstratorLearnerGuidance`."""
    word_head: nn.Linear
    """Head of stage 0 alone, see `Initialisation`; belongs to no part and is not exported."""

    def __init__(
        self, network: NetworkConfig, vocab_size: int, parts: Collection[str], empty: Collection[str] = ()
    ) -> None:
        super().__init__()
        self.parts = tuple(part for part in PARTS if part in parts)
        self.visual_inputs = tuple(network.visual_inputs)
        dim = network.encoder_shape.dim
        # The order of construction is the order of random draws.
        for part in ("exo_encoder", "ego_encoder"):
            if part in parts:
                with _memory_for(part, empty):
                    self.add_module(part, build_encoder(network.encoder))
        for part in ("ego_to_exo", "exo_to_ego"):
            if part in parts:
                with _memory_for(part, empty):
                    self.add_module(part, FeatureMapping(dim, network.mapper))
        with _memory_for("language_model", empty):
            self.language_model = LanguageModel(network.language_model, vocab_size)
        if "lora" in parts:
            with _memory_for("lora", empty):
                add_lora(self.language_model.causal_lm, network.lora)
        for part in ("projector", "exo_projector"):
            if part in parts:
                with _memory_for(part, empty):
                    self.add_module(part, STCConnector(dim, self.language_model.dim, **asdict(network.projector)))

    def forward(self, video: Tensor, view: str = "ego") -> Tensor:
        """Return the visual tokens that the language model reads.

        Args:
            video: uint8 [B, T, S, S, 3], RGB.
            view: ``ego`` or ``exo``, the camera that filmed it.

        Returns:
            float [B, N or 2 * N, D].

        Raises:
            ValueError: this model has no encoder for the view.
        """
        return self.encode(video, view)

    def encode(self, video: Tensor, view: str = "ego") -> Tensor:
        """Do what ``forward`` does; for use inside ``run``, where parameters are gathered already.

        Egocentric video goes through the learner where there is one, and through the demonstrator before there is.
        """
        if view == "ego" and "ego_encoder" in self.parts:
            return self.learner_tokens(video)
        if view not in ("ego", "exo") or "exo_encoder" not in self.parts:
            raise ValueError(f"view: got {view!r}, but this model has only {', '.join(self.parts)}")
        return self.project_exo(self.exo_encoder(video))

    def run(self, work: Callable[..., Any], *args: Any) -> Any:
        """Call ``work(*args)``, which may use any part in any order.

        A sharded model gathers its parameters in calls of ``forward`` and of this method, and only in these.
        """
        return work(*args)

    def units(self) -> Iterator[nn.Module]:
        """Yield the modules to load and shard one by one: blocks of each part, the parts around them, then the model.

        Several methods enter the language model, so its parameters outside the layers belong to the last unit.
        """
        for part, blocks in self.blocks().items():
            yield from blocks
            if part != "language_model":
                yield self.get_submodule(part)
        yield self

    def blocks(self) -> dict[str, list[nn.Module]]:
        """Return the repeated units of each part, for activation checkpointing and sharding."""
        modules = [part for part in self.parts if part != "lora"]
        return {part: self.get_submodule(part).blocks() for part in modules}  # type: ignore[operator]

    def checkpoint_activations(self, parts: Collection[str] | None = None) -> None:
        """Keep only the input of a block for the backward pass and recompute the rest there; results stay the same.

        Args:
            parts: the parts whose blocks do so; all by default.
        """
        chosen = [blocks for part, blocks in self.blocks().items() if parts is None or part in parts]
        for block in chain.from_iterable(chosen):
            block.forward = partial(_checkpointed, block.forward)  # type: ignore[method-assign]

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile the blocks with ``torch.compile``; results stay the same but for rounding.

        Blocks of one class and shape share their code. It is made for the shapes of training, one after another, and
        evaluation, whose shapes are many, runs the blocks as they are. Comes before ``checkpoint_activations``, and
        before sharding.

        Args:
            backend: of ``torch.compile``.
        """
        for block in chain.from_iterable(self.blocks().values()):
            compiled = torch.compile(block.forward, backend=backend, dynamic=False)
            block.forward = partial(_compiled_in_training, self, compiled, block.forward)  # type: ignore[method-assign]

    def project(self, *features: Tensor) -> Tensor:
        """Project each of the given features and concatenate the visual tokens.

        Args:
            features: one or more visual inputs, float [B, T, h, w, C] each.

        Returns:
            float [B, len(features) * N, D].
        """
        return torch.cat([self.projector(feature) for feature in features], dim=1)

    def project_exo(self, exo: Tensor) -> Tensor:
        """Project y, float [B, T, h, w, C] to [B, N, D], with its own projector if there is one."""
        return self.exo_projector(exo) if "exo_projector" in self.parts else self.project(exo)

    def demonstrator_tokens(self, video: Tensor) -> Tensor:
        """Return visual tokens of the demonstrator: uint8 [B, T, S, S, 3] to float [B, N, D]."""
        return self.project(self.exo_encoder(video))

    def learner_tokens(self, video: Tensor) -> Tensor:
        """Return visual tokens of the learner: uint8 [B, T, S, S, 3] to float [B, N or 2 * N, D]."""
        ego = self.ego_encoder(video)
        ego_as_exo = self.ego_to_exo(ego) if "mapped" in self.visual_inputs else ego
        return self.learner_view(ego, ego_as_exo)

    def learner_view(self, ego: Tensor, ego_as_exo: Tensor) -> Tensor:
        """Project those of x and F(x) that are visual inputs."""
        features = {"ego": ego, "mapped": ego_as_exo}
        return self.project(*(features[name] for name in self.visual_inputs))

    def part(self, name: str) -> dict[str, nn.Parameter]:
        """Return the parameters of one part by their names inside it; tied ones once.

        ``lora`` holds the adapters, named as inside the transformers model, and ``language_model`` the rest.
        """
        if name in ("language_model", "lora"):
            named = dict(self.language_model.causal_lm.named_parameters())
            return {key: p for key, p in named.items() if key.endswith((".lora_A", ".lora_B")) == (name == "lora")}
        return dict(self.get_submodule(name).named_parameters())

    def count(self, name: str) -> int:
        """Return the number of parameters of one part; quantised ones count as those that they stand for."""
        stored = sum(parameter.numel() for parameter in self.part(name).values())
        return stored + (hidden_count(self.language_model) if name == "language_model" else 0)


def _compiled_in_training(
    model: Exo2EgoModel, compiled: Callable[..., Any], eager: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    decoding = kwargs.get("past_key_values") is not None  # token by token, with a shape for each
    return (compiled if model.training and not decoding else eager)(*args, **kwargs)


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if torch.is_grad_enabled():
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    return forward(*args, **kwargs)


def _memory_for(part: str, empty: Collection[str]) -> AbstractContextManager[object]:
    return torch.device("meta") if part in empty else nullcontext()
