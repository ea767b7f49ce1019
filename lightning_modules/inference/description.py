"""Description of a trained model, which stage weights keep so that they stand alone.

::

    <run>/handoff/
      manifest.json    field ``answering``: the fields of ``ModelDescription`` and the place of every frozen part
      tokenizer/       files of the tokenizer
      frozen/          parts that the stage did not train, as far as they are small: <part>.safetensors

A large frozen part, such as a released language model, is not copied. The manifest names its absolute source and
digest, and ``make export`` writes a folder that holds everything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from datamodules.clips.dataset import ClipConfig
from datamodules.io.hub import is_hub_name
from datamodules.text import CHAT, PromptConfig
from lightning_modules.model.exo2ego import PARTS, NetworkConfig
from lightning_modules.model.language_model import LanguageModelConfig, transformers_config
from lightning_modules.weights.clip import OPEN_CLIP
from lightning_modules.weights.resolve import split_source
from lightning_modules.weights.tensors import FoundWeights, WeightsError

if TYPE_CHECKING:
    from lightning_modules.stages.base import Stage

FROZEN, TOKENIZER = "frozen", "tokenizer"
MAX_COPIED_PARAMETERS = 100_000_000
"""Larger frozen parts stay where they are: 400 MB in float32."""


@dataclass(frozen=True)
class ModelDescription:
    """A model that answers questions about video, without its weights.

    Attributes:
        network: shapes; its language model is given by architecture, never by a path.
        vocab_size: tokens that the language model has embeddings for.
        parts: parts that answering uses.
        clips: frames of a clip, as in training.
        prompt: form of questions and answers, as in training.
        max_text_tokens: longest text with an answer.
        dtype: type in which the model answers on a GPU.
    """

    network: NetworkConfig
    vocab_size: int
    parts: tuple[str, ...]
    clips: ClipConfig
    prompt: PromptConfig = CHAT
    max_text_tokens: int = 2048
    dtype: Literal["float32", "bfloat16"] = "float32"

    def record(self) -> dict[str, Any]:
        """Return all fields as a JSON object."""
        return asdict(self)


_DESCRIPTION = TypeAdapter(ModelDescription)
_NETWORK, _CLIPS, _PROMPT = TypeAdapter(NetworkConfig), TypeAdapter(ClipConfig), TypeAdapter(PromptConfig)


def read_description(record: object, where: str) -> ModelDescription:
    """Read the JSON object that ``ModelDescription.record`` returned.

    Raises:
        WeightsError: it lacks a field, or a field has a wrong value.
    """
    try:
        return _DESCRIPTION.validate_python(record)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        field = ".".join(map(str, problem["loc"]))
        raise WeightsError(f"{where}: field {field}: {problem['msg']}: write these weights again") from None


def describe(
    network: NetworkConfig,
    vocab_size: int,
    uses: Sequence[str],
    clips: ClipConfig,
    prompt: PromptConfig = CHAT,
    max_text_tokens: int = 2048,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> ModelDescription:
    """Describe the model of a stage.

    Args:
        uses: parts that the stage has; those that answering does not need are left out.
        network, vocab_size, clips, prompt, max_text_tokens, dtype: see ``ModelDescription``.
    """
    if clips.pad_rgb is None:
        clips = replace(clips, pad_rgb=network.encoder_shape.mean_rgb)
    network = replace(network, language_model=_without_path(network.language_model, vocab_size))
    parts = answering_parts(uses, network.visual_inputs)
    return ModelDescription(network, vocab_size, parts, clips, prompt, max_text_tokens, dtype)


def describe_config(config: Mapping[str, Any], uses: Sequence[str], vocab_size: int) -> ModelDescription:
    """Describe the model of a stage from the resolved configuration of its run.

    Raises:
        ValueError: a key is missing or has a wrong value.
    """
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    return describe(
        _NETWORK.validate_python(model["network"]),
        vocab_size,
        uses,
        _CLIPS.validate_python(data["clips"]),
        _PROMPT.validate_python(data.get("prompt") or {}),
        data.get("max_text_tokens", 2048),
        answering_dtype(config["trainer"].get("precision")),
    )


def answering_parts(uses: Sequence[str], visual_inputs: Sequence[str]) -> tuple[str, ...]:
    """Return the parts that egocentric video goes through: the learner's, or the demonstrator's before there is one."""
    if "ego_encoder" in uses:
        needed = {"ego_encoder", "projector", "language_model", "lora"}
        needed |= {"ego_to_exo"} if "mapped" in visual_inputs else set()
    else:
        needed = {"exo_encoder", "language_model", "lora"}
        needed |= {"exo_projector" if "exo_projector" in uses else "projector"}
    return tuple(part for part in PARTS if part in needed and part in uses)


def answering_dtype(precision: object) -> Literal["float32", "bfloat16"]:
    """Return the type in which a model answers on a GPU that was trained with a precision of the Trainer."""
    return "bfloat16" if str(precision).startswith("bf16") else "float32"


def _without_path(config: LanguageModelConfig, vocab_size: int) -> LanguageModelConfig:
    """Replace a folder or hub name by the settings that its configuration holds."""
    if config.pretrained is None:
        return config
    settings = transformers_config(config, vocab_size)
    left_out = ("model_type", "transformers_version", "architectures", "dtype", "_name_or_path")
    overrides = {key: value for key, value in settings.to_diff_dict().items() if key not in left_out}
    overrides["vocab_size"] = settings.vocab_size
    return LanguageModelConfig(settings.model_type, None, overrides, config.attn_implementation)


def frozen_parts(description: ModelDescription, stage: Stage) -> tuple[list[str], list[str]]:
    """Return the parts that answering needs and the stage does not train: those with a source, and those without."""
    frozen = [part for part in description.parts if part not in stage.trained]
    return [part for part in frozen if part in stage.init], [part for part in frozen if part not in stage.init]


def answering_files(
    description: ModelDescription, stage: Stage, unsourced: Iterable[tuple[str, Mapping[str, Tensor]]] = ()
) -> Callable[[Path], dict[str, Any]]:
    """Return a function that makes stage weights stand alone, see ``write_stage_weights``.

    Args:
        description: of the stage's model.
        stage: its sources are open.
        unsourced: frozen parts that come from no file, with their parameters.
    """

    def write(folder: Path) -> dict[str, Any]:
        stage.tokenizer.save_pretrained(folder / TOKENIZER)
        frozen: dict[str, Any] = {}
        for part in frozen_parts(description, stage)[0]:
            found = stage.sources[part]
            if sum(math.prod(tensor.shape) for tensor in found.tensors.values()) <= MAX_COPIED_PARAMETERS:
                frozen[part] = _copy(folder, part, {name: tensor.read() for name, tensor in found.tensors.items()})
            else:
                frozen[part] = _reference(stage.init[part], part, found)
        for part, tensors in unsourced:
            frozen[part] = _copy(folder, part, tensors)
        return {"answering": {**description.record(), FROZEN: frozen}}

    return write


def _copy(folder: Path, part: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    (folder / FROZEN).mkdir(exist_ok=True)
    file = f"{FROZEN}/{part}.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file, {"format": "pt"})
    return {"file": file}


def _reference(sources: Sequence[str], part: str, found: FoundWeights) -> dict[str, Any]:
    """Name sources so that they are found from any working directory."""
    absolute = []
    for source in sources:
        if source.startswith(OPEN_CLIP) or is_hub_name(source):
            absolute.append(source)
        else:
            folder, named = split_source(source, part)
            absolute.append(f"{folder.resolve()}:{named}" if named != part else str(folder.resolve()))
    return {"sources": absolute, "digest": found.digest}
