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
from lightning_modules.model.lora import merge_lora
from lightning_modules.weights.exported import MODEL_TYPE, stored_name

MAX_NEW_TOKENS = 128
_SHARD = "5GB"
_CLASSES = {
    "AutoConfig": "configuration_exo2ego.Exo2EgoConfig",
    "AutoModelForImageTextToText": "modeling_exo2ego.Exo2EgoForConditionalGeneration",
    "AutoProcessor": "processing_exo2ego.Exo2EgoProcessor",
}


def export_model(source: str | Path, out: Path, merge: bool = True) -> None:
    """Export a trained model; the folder appears complete or not at all.

    Args:
        source: see ``open_model``.
        out: the folder; it must not exist.
        merge: fold the adapters into the layers of the language model.

    Raises:
        ValueError: ``out`` exists, the model cannot be loaded, or its encoder is a class of your own, whose file
            transformers would not find.
    """
    if out.exists():
        raise ValueError(f"{out}: exists: remove it, or name another folder")
    files = open_model(source)
    own = files.description.network.encoder.type
    if own is not None:
        raise ValueError(
            f"network.encoder.type: {own} is a class of your own, which transformers would not find: use the run's "
            "folder of stage weights instead, which this repository loads"
        )
    model = build_model(files, torch.device("cpu"), torch.float32)
    description = files.description
    if merge and "lora" in description.parts:
        merge_lora(model.language_model.causal_lm)
        description = replace(description, parts=tuple(part for part in description.parts if part != "lora"))
    new = out.with_name(f".{out.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    _write(new, model, description, files)
    os.replace(new, out)
    print(f"{out}: {', '.join(description.parts)}; to publish it: hf upload owner/name {out}")


def _write(folder: Path, model: Exo2EgoModel, description: ModelDescription, files: ModelFiles) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for part in description.parts:
        tensors |= {stored_name(part, name): parameter.detach() for name, parameter in model.part(part).items()}
    save_torch_state_dict(tensors, folder, max_shard_size=_SHARD)
    encoder = files.encoder()
    tokenizer = encoder.tokenizer
    tokenizer.save_pretrained(folder)
    provenance = {key: value for key, value in files.manifest.items() if key not in ("parts", "answering")}
    provenance["versions"] = {name: version(name) for name in ("torch", "transformers")}
    _write_json(
        folder / "config.json",
        {
            "architectures": ["Exo2EgoForConditionalGeneration"],
            "model_type": MODEL_TYPE,
            "auto_map": _CLASSES,
            "dtype": "float32",
            "description": description.record(),
            "provenance": provenance,
        },
    )
    record = description.record()
    _write_json(
        folder / "processor_config.json",
        {
            "processor_class": "Exo2EgoProcessor",
            "auto_map": {"AutoProcessor": _CLASSES["AutoProcessor"]},
            "clips": record["clips"],
            "text": {"max_text_tokens": description.max_text_tokens, "prompt": record["prompt"]},
        },
    )
    end = tokenizer.eos_token_id
    generation = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False, "eos_token_id": end, "pad_token_id": end}
    _write_json(folder / "generation_config.json", generation)
    write_source_files(folder)
    (folder / "README.md").write_text(model_card(description, files), encoding="utf-8")


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
