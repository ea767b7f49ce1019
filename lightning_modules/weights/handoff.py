"""Stage weights: the folder that a stage exports for the next, complete or absent.

::

    <run>/handoff/
      manifest.json                 stage, parts with shapes and types, configuration hash, data fingerprint, metrics
      <part>.safetensors            parameters of one part by their names inside it
      adapter/                      the language model's adapters in PEFT's format, in the place of ``lora``
      frozen/ tokenizer/            needed for answering in addition, see ``inference/description.py``
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_modules.model.lora import LoRAConfig, from_peft_name, save_peft_adapter
from lightning_modules.weights.tensors import FoundWeights, WeightsError, file_digest, open_tensors, sync, use_mode_of

FORMAT = 1
ADAPTER = "adapter"


def read_manifest(folder: Path, part: str | None = None) -> dict[str, Any]:
    """Read the manifest of stage weights without touching their tensors.

    Args:
        folder: ``<run>/handoff``.
        part: must be among the parts.

    Raises:
        WeightsError: the weights are incomplete, of another format, or lack the part.
    """
    stage, file = folder.parent.name, folder / "manifest.json"
    if not file.is_file():
        raise WeightsError(f"No {stage} weights in {folder}. Run `make {stage}` first.")
    fix = f"Run `make {stage} FORCE=1`"
    try:
        manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise WeightsError(f"{file}: invalid JSON ({error.msg}). {fix}.") from None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise WeightsError(f"{file}: field format is {found}, this version reads {FORMAT}. {fix}.")
    fields = {"stage": str, "parts": dict, "digest": str}
    lacking = [name for name, kind in fields.items() if not isinstance(manifest.get(name), kind)]
    if lacking:
        raise WeightsError(f"{file}: field {', '.join(lacking)} is missing. {fix}.")
    if part is not None and part not in manifest["parts"]:
        raise WeightsError(
            f"{folder}: no part {part!r}, it has {', '.join(manifest['parts'])}. Name one of these, or another folder."
        )
    return manifest


def open_stage_weights(folder: Path, part: str) -> FoundWeights:
    """Open one part of stage weights; nothing is read but names, shapes, and once a digest of all files.

    Raises:
        WeightsError: the folder or one of its files is missing, incomplete or damaged.
    """
    manifest = read_manifest(folder, part)
    stage = folder.parent.name
    fix = f"Run `make {stage} FORCE=1`"
    file = folder / ADAPTER / "adapter_model.safetensors" if part == "lora" else folder / f"{part}.safetensors"
    tensors = open_tensors(file, fix)
    if part == "lora":
        tensors = {from_peft_name(name): tensor for name, tensor in tensors.items()}
    if _digest(folder, file.stat().st_mtime_ns) != manifest["digest"]:
        raise WeightsError(f"{folder}: the files are not those that manifest.json describes (digest differs). {fix}.")
    return FoundWeights(
        part,
        where=str(folder),
        tensors=tensors,
        digest=str(manifest["digest"]),
        note=str(manifest["stage"]),
        fix=f"They were written by {manifest['stage']}: give both the same `network`, or run `make {stage} FORCE=1`",
    )


@lru_cache
def _digest(folder: Path, changed_ns: int) -> str:
    """Return a digest of all tensors in a folder, computed once as long as it does not change."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.safetensors")):
        digest.update(file_digest(file))
    return digest.hexdigest()[:16]


def full_tensors(parameters: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """Return whole tensors on the CPU, gathered one at a time.

    Args:
        parameters: sharded or not; all processes of a sharded run have to call this, in the same order.
        keep: this process wants them; the result is empty otherwise.
    """
    whole = {}
    for name, parameter in parameters.items():
        tensor = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if keep:
            whole[name] = tensor.detach().cpu().contiguous()
    return whole


def write_stage_weights(
    folder: Path,
    parts: Iterable[tuple[str, Mapping[str, Tensor]]],
    lora: LoRAConfig,
    manifest: Mapping[str, Any],
    write_more: Callable[[Path], Mapping[str, Any]] | None = None,
) -> None:
    """Write parts of an ``Exo2EgoModel``; the folder appears complete or not at all, and replaces an earlier one.

    Args:
        folder: ``<run>/handoff``.
        parts: names, and whole tensors on the CPU by their names inside the part.
        lora: size of the adapters.
        manifest: fields in addition to ``format``, ``code_version``, ``digest`` and ``parts``.
        write_more: called with the unfinished folder after the parts; writes further files, and returns further fields
            of the manifest.
    """
    # Write everything to a hidden folder.
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    described = {}
    for part, tensors in parts:
        if part == "lora":
            save_peft_adapter(tensors, lora, new / ADAPTER)
        else:
            save_file(dict(tensors), new / f"{part}.safetensors", metadata={"format": "pt"})
        described[part] = {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()}
    content = {
        "format": FORMAT,
        **manifest,
        **(write_more(new) if write_more else {}),
        "code_version": _code_version(),
        "digest": _digest(new, time.time_ns()),
        "parts": described,
    }
    manifest_file = new / "manifest.json"
    manifest_file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    use_mode_of(manifest_file, new)
    for path in [*new.rglob("*"), new]:
        sync(path)

    # Replace the earlier folder.
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.is_symlink():
        folder.unlink()  # a rename would keep the link under the other name, where no folder can replace it
    elif folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _code_version() -> str:
    """Return the commit of a checkout, with ``+changes`` when it was edited, else the package version."""
    here = Path(__file__).resolve().parent
    try:
        run = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty=+changes", "--abbrev=12"],
            capture_output=True,
            text=True,
            check=True,
        )
        return run.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        try:
            return version("exo2ego")
        except PackageNotFoundError:
            return "unknown"
