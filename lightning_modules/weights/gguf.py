"""Convert a causal language model in a GGUF file to a folder of transformers.

::

    python -m lightning_modules.weights.gguf SmolLM2-135M-Instruct-Q8_0.gguf weights/smollm2

Weights are dequantised to bfloat16. The tokenizer splits text as the file says; transformers' own reader knows fewer
ways to split and silently takes GPT-2's for the others. Needs ``pip install -e '.[gguf]'``.
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lightning_modules.model.language_model import ARCHITECTURES
from lightning_modules.weights.tensors import WeightsError

_DIGITS = ("smollm", "starcoder", "refact", "codeshell", "command-r", "exaone")
"""Splitting of a byte-level vocabulary: every digit by itself, the rest as GPT-2."""
_KNOWN = ("gpt-2", "olmo", "llama-bpe", "llama3", "llama-v3", "qwen2", "tekken")
"""Splittings that transformers reads as they are."""


def convert(file: Path, folder: Path) -> None:
    """Write the language model and the tokenizer of a GGUF file to a folder of transformers.

    Args:
        file: of one part, with a tokenizer.
        folder: to write; it must not exist.

    Raises:
        WeightsError: the package gguf or the file is missing, the folder exists, or the file cannot be read or holds a
            model or a tokenizer that would be read wrongly.
    """
    if find_spec("gguf") is None:
        raise WeightsError(f"{file}: the package gguf is missing. Run `pip install -e '.[gguf]'`.")
    if not file.is_file():
        raise WeightsError(f"{file}: no such file. Give a GGUF file.")
    if folder.exists():
        raise WeightsError(f"{folder}: exists already. Give a new folder.")
    splitting = _splitting(file)
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    config = AutoConfig.from_pretrained(**source)
    if config.model_type not in ARCHITECTURES:
        raise WeightsError(
            f"{file}: model type {config.model_type} is not supported. Use one of {', '.join(ARCHITECTURES)}."
        )

    tokenizer = AutoTokenizer.from_pretrained(**source)
    if splitting in _DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])

    # A model that is made of plain layers has no trace of the quantisation that it was read from.
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    settings = {key: value for key, value in config.to_dict().items() if key != "quantization_config"}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        settings[key] = getattr(tokenizer, key)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.float32)  # type: ignore[no-untyped-call]
    model.load_state_dict(quantised.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _splitting(file: Path) -> str | None:
    """Return how the file's byte-level vocabulary splits text; None for other vocabularies.

    Raises:
        WeightsError: the file cannot be read, or the splitting is unknown.
    """
    from gguf import GGUFReader

    try:
        fields = GGUFReader(file).fields
    except (OSError, ValueError) as error:
        raise WeightsError(f"{file}: cannot be read ({error}). Give a GGUF file.") from None
    kind, splitting = (
        None if (field := fields.get(f"tokenizer.ggml.{name}")) is None else str(field.contents())
        for name in ("model", "pre")
    )
    if kind != "gpt2":
        return None
    if splitting not in (*_DIGITS, *_KNOWN):
        raise WeightsError(
            f"{file}: tokenizer.ggml.pre is {splitting}, only {', '.join((*_DIGITS, *_KNOWN))} are known to split text "
            "as the model was trained with. Use the original folder of the model instead."
        )
    return splitting


def main(arguments: list[str] | None = None) -> int:
    """Convert the file that the command line names and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_modules.weights.gguf", description=__doc__.split("::")[0]
    )
    parser.add_argument("file", type=Path, help="GGUF file of a causal language model")
    parser.add_argument("folder", type=Path, help="folder to write")
    given = parser.parse_args(arguments)
    try:
        convert(given.file, given.folder)
    except WeightsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"start.language_model={given.folder} tokenizer={given.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
