"""Load a trained model from a run, an exported folder, or the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download

from datamodules.clips.dataset import ClipConfig
from datamodules.io.hub import is_hub_name
from datamodules.text import CHAT, PromptConfig, TextEncoder, load_tokenizer
from datamodules.video.convert import Fit
from lightning_modules.config import compose
from lightning_modules.inference.description import (
    FROZEN,
    TOKENIZER,
    ModelDescription,
    describe,
    describe_config,
    read_description,
)
from lightning_modules.model.exo2ego import Exo2EgoModel
from lightning_modules.weights.exported import MODEL_TYPE, find_exported
from lightning_modules.weights.handoff import open_stage_weights, read_manifest
from lightning_modules.weights.loading import load_weights, require_fit
from lightning_modules.weights.resolve import find_weights
from lightning_modules.weights.tensors import FoundWeights, Release, WeightsError, open_release, open_tensors
from lightning_modules.weights.videollama2 import KIND as VIDEOLLAMA2
from lightning_modules.weights.videollama2 import videollama2_network

DEMONSTRATOR = ("exo_encoder", "projector", "language_model")
"""Parts of a checkpoint of VideoLLaMA2."""


@dataclass(frozen=True)
class ModelFiles:
    """A trained model whose weights are found and not read yet.

    Attributes:
        where: the folder, for messages.
        description: frames of a clip, prompt, shapes.
        found: weights of every part.
        tokenizer: folder or hub name of the tokenizer.
        manifest: provenance: stage, step, digests, metrics.
    """

    where: str
    description: ModelDescription
    found: dict[str, FoundWeights]
    tokenizer: str
    manifest: dict[str, Any]

    def encoder(self) -> TextEncoder:
        """Return the text encoder of training."""
        return TextEncoder(self.tokenizer, self.description.max_text_tokens, self.description.prompt)


def open_model(source: str | Path) -> ModelFiles:
    """Find a trained model; nothing is read but names and shapes.

    Args:
        source: folder of a run, such as ``runs/toy/stage3``, or its ``handoff``; or an exported folder; or a folder of
            VideoLLaMA2; or the name of a repository on the Hugging Face hub with one of these.

    Raises:
        WeightsError: there is no such model, or a part of it is missing or damaged.
    """
    folder = _folder(str(source))
    if (folder / "manifest.json").is_file():
        return _open_stage_weights(folder)
    if (folder / "handoff").exists():
        return _open_stage_weights(folder / "handoff")
    if (folder / "config.json").is_file():
        return _open_released(folder)
    if (folder / "config.yaml").is_file():
        raise WeightsError(f"{folder}: the run has no weights yet: complete it by `make {folder.name}`")
    raise WeightsError(f"{folder}: holds no trained model: name a run, such as runs/toy/stage3")


def build_model(files: ModelFiles, device: torch.device, dtype: torch.dtype) -> Exo2EgoModel:
    """Build the parts that answering uses and fill them, one unit of the model at a time.

    Raises:
        WeightsError: weights do not fit.
    """
    description = files.description
    with torch.device("meta"):
        shapes = Exo2EgoModel(description.network, description.vocab_size, description.parts)
    for part in description.parts:
        require_fit(files.found[part], shapes.part(part))
    model = Exo2EgoModel(description.network, description.vocab_size, description.parts, empty=description.parts)
    load_weights(model, files.found, (), dtype, device)
    return model.to(device).eval()  # buffers too


def _folder(source: str) -> Path:
    folder = Path(source)
    if folder.is_dir():
        return folder
    if not is_hub_name(source):
        raise WeightsError(f"{source}: no such folder: name a run, an exported folder, or owner/name on the hub")
    try:
        return Path(snapshot_download(source))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(f"{source}: neither a folder nor a repository of the hub ({reason})") from None


def _open_stage_weights(folder: Path) -> ModelFiles:
    manifest = read_manifest(folder)
    record = manifest.get("answering")
    if not isinstance(record, dict):
        return _open_old_stage_weights(folder, manifest)
    where = f"{folder}/manifest.json"
    description = read_description(record, where)
    found: dict[str, FoundWeights] = {}
    for part in description.parts:
        place = record.get(FROZEN, {}).get(part)
        if part in manifest["parts"]:
            found[part] = open_stage_weights(folder, part)
        elif place is None:
            raise WeightsError(f"{where}: names no weights of {part}: run `make {manifest['stage']} FORCE=1`")
        elif "file" in place:
            tensors = open_tensors(folder / place["file"], f"Run `make {manifest['stage']} FORCE=1`")
            found[part] = FoundWeights(part, str(folder), tensors, manifest["digest"], str(manifest["stage"]))
        else:
            found[part] = _find_referenced(place, part, description, where)
    return ModelFiles(str(folder), description, found, str(folder / TOKENIZER), manifest)


def _open_released(folder: Path) -> ModelFiles:
    """Open a folder that ``make export`` wrote, or one of VideoLLaMA2."""
    release = open_release(folder, "Export or download the model again")
    if release.kind.startswith(VIDEOLLAMA2):
        return _open_videollama2(folder, release)
    if release.kind != MODEL_TYPE:
        raise WeightsError(
            f"{folder}/config.json: model_type is {release.kind}, not {MODEL_TYPE}: name a run, such as "
            "runs/toy/stage3, a folder that `make export` wrote, or one of VideoLLaMA2"
        )
    description = read_description(release.settings.get("description"), f"{folder}/config.json")
    if "language_model" not in description.parts:
        raise WeightsError(f"{folder}: holds the vision parts of an export for vLLM alone: export the model with TO=hf")
    found = {}
    for part in description.parts:
        weights = find_exported(release, part, description.network)
        assert weights is not None
        found[part] = weights
    return ModelFiles(str(folder), description, found, str(folder), release.settings.get("provenance", {}))


def _open_videollama2(folder: Path, release: Release) -> ModelFiles:
    """Open a checkpoint of VideoLLaMA2; our own exports in its form describe themselves."""
    settings = release.settings
    if MODEL_TYPE in settings:
        description = read_description(settings[MODEL_TYPE], f"{folder}/config.json")
    else:
        network = videollama2_network(release)
        fit: Fit = "pad" if settings.get("image_aspect_ratio", "pad") == "pad" else "crop"
        clips = ClipConfig(int(settings.get("num_frames", 16)), network.encoder.image_size, fit)
        prompt = CHAT if load_tokenizer(str(folder)).chat_template else PromptConfig("mistral")
        stored = str(settings.get("dtype", settings.get("torch_dtype")))
        dtype: Literal["float32", "bfloat16"] = "float32" if stored == "float32" else "bfloat16"
        vocab_size = network.language_model.overrides["vocab_size"]
        description = describe(network, vocab_size, DEMONSTRATOR, clips, prompt, dtype=dtype)
    found = {part: find_weights([str(folder)], part, description.network) for part in description.parts}
    return ModelFiles(str(folder), description, found, str(folder), {})


def _find_referenced(place: Mapping[str, Any], part: str, description: ModelDescription, where: str) -> FoundWeights:
    """Find a large frozen part where training found it."""
    try:
        found = find_weights(place["sources"], part, description.network)
    except WeightsError as error:
        raise WeightsError(f"{where}: {part} was not copied, and its source is gone: {error}") from None
    if found.digest != place["digest"]:
        raise WeightsError(
            f"{where}: {part} of {found.where} is not what the stage was trained with (digest {found.digest}, then "
            f"{place['digest']}): restore it, or train again"
        )
    return found


def _open_old_stage_weights(folder: Path, manifest: dict[str, Any]) -> ModelFiles:
    """Open weights of an earlier version; everything they lack is in the configuration of the run next to them."""
    file = folder.parent / "config.yaml"
    if not file.is_file():
        raise WeightsError(
            f"{folder}: written by an earlier version, without frames, prompt and tokenizer, and there is no {file}: "
            f"restore that file, or run `make {manifest['stage']} FORCE=1`"
        )
    config = compose(file, stage=None)
    try:
        init_args, tokenizer = config["model"]["init_args"], str(config["tokenizer"])
        uses = _stage_class(config["model"]["class_path"]).uses
        overrides = init_args["network"]["language_model"].get("overrides") or {}
        vocab_size = overrides.get("vocab_size") or len(load_tokenizer(tokenizer))
        description = describe_config(config, uses, int(vocab_size))
    except (KeyError, TypeError) as error:
        raise WeightsError(f"{file}: {error!r} is missing: give the run's whole configuration") from None
    sources = {part: [str(folder)] for part in manifest["parts"]}
    pretrained = init_args["network"]["language_model"].get("pretrained")
    for part, source in {"language_model": pretrained, **(init_args.get("init") or {})}.items():
        if source is not None and part not in sources:
            sources[part] = [source] if isinstance(source, str) else list(source)
    found = {}
    for part in description.parts:
        if part not in sources:
            raise WeightsError(f"{file}: key model.init_args.init.{part} is missing: name the weights of {part}")
        found[part] = find_weights(sources[part], part, description.network)
    return ModelFiles(str(folder), description, found, tokenizer, manifest)


def _stage_class(class_path: str) -> Any:
    module, _, name = class_path.rpartition(".")
    return getattr(import_module(module), name)
