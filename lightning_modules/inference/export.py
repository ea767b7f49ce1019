"""Export a trained model as one folder, for transformers, for the Hugging Face hub, and for this repository.

::

    exports/toy/
      config.json                    description (network, frames, prompt) and provenance (stage, step, digests)
      model.safetensors              all parts, adapters merged; several files with an index if large
      processor_config.json          frames and prompt
      generation_config.json         greedy, ends at the end token
      tokenizer.json ...             the tokenizer of training
      modeling_exo2ego.py ...        copies of this repository's modules, for ``trust_remote_code``
      README.md                      model card
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict

from lightning_modules.inference.description import ModelDescription
from lightning_modules.inference.loading import ModelFiles, build_model, open_model
from lightning_modules.inference.model_card import model_card
from lightning_modules.inference.source_files import write_source_files
from lightning_modules.model.exo2ego import Exo2EgoModel
from lightning_modules.model.lora import merge_lora, save_peft_adapter
from lightning_modules.weights.exported import MODEL_TYPE, stored_name
from lightning_modules.weights.tensors import use_mode_of
from lightning_modules.weights.videollama2 import videollama2_settings, videollama2_tensors

MAX_NEW_TOKENS = 128
BASE, VISION = "language_model", "vision"
_SHARD = "5GB"
_CONFIG = "configuration_exo2ego.Exo2EgoConfig"
_PROCESSOR = "processing_exo2ego.Exo2EgoProcessor"


def export_model(source: str | Path, out: Path, to: str = "hf", merge: bool = True) -> None:
    """Export a trained model; the folder appears complete or not at all.

    Args:
        source: see ``open_model``.
        out: the folder; it must not exist.
        to: ``hf`` for transformers; ``peft`` for the language model with its adapters apart, in PEFT's format;
            ``videollama2`` for a demonstrator in the form of VideoLLaMA2; ``vllm`` for the merged language model as a
            folder that needs no code of this repository, next to the vision parts.
        merge: fold the adapters into the layers of the language model, for ``hf``.

    Raises:
        ValueError: ``out`` exists, the model cannot be loaded, or has no such form.
    """
    if out.exists():
        raise ValueError(f"{out}: exists: remove it, or name another folder")
    files = open_model(source)
    _check_form(files.description, to)
    model = build_model(files, torch.device("cpu"), torch.float32)
    new = out.with_name(f".{out.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    if to == "peft":
        _write_peft(new, model, files, base=str((out / BASE).resolve()))
    elif to == "videollama2":
        _write_videollama2(new, model, files)
    elif to == "vllm":
        _write_vllm(new, model, files)
    else:
        _write_transformers(new, model, files, merge)
    use_mode_of(next(new.rglob("tokenizer_config.json")), new)
    os.replace(new, out)
    print(f"{out} is complete; `hf upload owner/name {out}` publishes it")


def _check_form(description: ModelDescription, to: str) -> None:
    """Refuse what a format has no place for, before weights are read.

    Raises:
        ValueError: the message names the format that fits.
    """
    own = description.network.encoder.type
    if to in ("hf", "vllm") and own is not None:
        raise ValueError(
            f"network.encoder.type: {own} is a class of your own, which transformers would not find: use the run's "
            "folder of stage weights instead, which this repository loads"
        )
    if to == "peft" and "lora" not in description.parts:
        raise ValueError("TO=peft: this stage has no adapters: name stage3, or TO=hf")
    if to == "videollama2":
        if set(description.parts) != {"exo_encoder", "projector", "language_model"}:
            raise ValueError(
                f"TO=videollama2: this stage has {', '.join(description.parts)}, but VideoLLaMA2 has one encoder and "
                "no mapping: name stage0 or stage1, or TO=hf"
            )
        videollama2_settings(description.network, description.clips.num_frames)


def _write_peft(folder: Path, model: Exo2EgoModel, files: ModelFiles, base: str) -> None:
    """Write the adapters, and the language model that they belong to below ``BASE``."""
    adapters = {name: parameter.detach() for name, parameter in model.part("lora").items()}
    save_peft_adapter(adapters, files.description.network.lora, folder, base)
    files.encoder().tokenizer.save_pretrained(folder)
    _write_language_model(folder / BASE, model, files)


def _write_vllm(folder: Path, model: Exo2EgoModel, files: ModelFiles) -> None:
    """Write the merged language model by itself, and what makes its input embeddings."""
    if "lora" in files.description.parts:
        merge_lora(model.language_model.causal_lm)
    _write_language_model(folder / BASE, model, files)
    vision = folder / VISION
    vision.mkdir()
    parts = tuple(part for part in files.description.parts if part not in ("language_model", "lora"))
    tensors: dict[str, torch.Tensor] = {}
    for part in parts:
        tensors |= {stored_name(part, name): parameter.detach() for name, parameter in model.part(part).items()}
    tensors["embed_tokens.weight"] = model.language_model.causal_lm.get_input_embeddings().weight.detach()
    save_torch_state_dict(tensors, vision, max_shard_size=_SHARD)
    _write_processor(vision, files)
    _write_config(vision, replace(files.description, parts=parts), files, "AutoModel", "Exo2EgoPromptModel")
    write_source_files(vision)


def _write_language_model(folder: Path, model: Exo2EgoModel, files: ModelFiles) -> None:
    """Write the language model without adapters as transformers stores it."""
    folder.mkdir()
    tensors = {name: parameter.detach() for name, parameter in model.part("language_model").items()}
    save_torch_state_dict(tensors, folder, max_shard_size=_SHARD)
    _write_json(folder / "config.json", _language_model_settings(model))
    tokenizer = files.encoder().tokenizer
    tokenizer.save_pretrained(folder)
    _write_generation_settings(folder, tokenizer.eos_token_id)


def _write_videollama2(folder: Path, model: Exo2EgoModel, files: ModelFiles) -> None:
    """Write a demonstrator under the names of VideoLLaMA2."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in videollama2_tensors(model).items()}
    save_torch_state_dict(tensors, folder, max_shard_size=_SHARD)
    files.encoder().tokenizer.save_pretrained(folder)
    settings = _language_model_settings(model)
    settings["model_type"] = f"videollama2_{settings['model_type']}"
    settings["architectures"] = [f"Videollama2{model.language_model.causal_lm.config.model_type.title()}ForCausalLM"]
    description = files.description
    settings |= videollama2_settings(description.network, description.clips.num_frames)
    # For this repository: what VideoLLaMA2's own keys cannot express, such as the prompt and the heads of the tower.
    settings[MODEL_TYPE] = description.record()
    _write_json(folder / "config.json", settings)


def _language_model_settings(model: Exo2EgoModel) -> dict[str, Any]:
    """Return the content of the language model's ``config.json``."""
    causal_lm = model.language_model.causal_lm
    settings: dict[str, Any] = json.loads(causal_lm.config.to_json_string(use_diff=False))
    return settings | {"architectures": [type(causal_lm).__name__], "dtype": "float32"}


def _write_transformers(folder: Path, model: Exo2EgoModel, files: ModelFiles, merge: bool) -> None:
    """Write the whole model with the code that transformers needs for it."""
    description = files.description
    if merge and "lora" in description.parts:
        merge_lora(model.language_model.causal_lm)
        description = replace(description, parts=tuple(part for part in description.parts if part != "lora"))
    tensors: dict[str, torch.Tensor] = {}
    for part in description.parts:
        tensors |= {stored_name(part, name): parameter.detach() for name, parameter in model.part(part).items()}
    save_torch_state_dict(tensors, folder, max_shard_size=_SHARD)
    _write_processor(folder, files)
    _write_config(folder, description, files, "AutoModelForImageTextToText", "Exo2EgoForConditionalGeneration")
    _write_generation_settings(folder, files.encoder().tokenizer.eos_token_id)
    write_source_files(folder)
    (folder / "README.md").write_text(model_card(description, files), encoding="utf-8")


def _write_config(folder: Path, description: ModelDescription, files: ModelFiles, auto: str, name: str) -> None:
    """Write ``config.json`` of a folder with code of ours.

    Args:
        folder: of the files.
        description: of the parts in it.
        files: of the model that it was made from.
        auto: class of transformers that loads it.
        name: our class that this becomes.
    """
    provenance = {key: value for key, value in files.manifest.items() if key not in ("parts", "answering")}
    provenance["versions"] = {package: version(package) for package in ("torch", "transformers")}
    _write_json(
        folder / "config.json",
        {
            "architectures": [name],
            "model_type": MODEL_TYPE,
            "auto_map": {"AutoConfig": _CONFIG, auto: f"modeling_exo2ego.{name}", "AutoProcessor": _PROCESSOR},
            "dtype": "float32",
            "description": description.record(),
            "provenance": provenance,
        },
    )


def _write_processor(folder: Path, files: ModelFiles) -> None:
    """Write the tokenizer and what turns a video into frames."""
    files.encoder().tokenizer.save_pretrained(folder)
    record = files.description.record()
    _write_json(
        folder / "processor_config.json",
        {
            "processor_class": "Exo2EgoProcessor",
            "auto_map": {"AutoProcessor": _PROCESSOR},
            "clips": record["clips"],
            "text": {"max_text_tokens": files.description.max_text_tokens, "prompt": record["prompt"]},
        },
    )


def _write_generation_settings(folder: Path, end: int) -> None:
    """Write settings of greedy decoding that ends at a token."""
    settings = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False, "eos_token_id": end, "pad_token_id": end}
    _write_json(folder / "generation_config.json", settings)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
