"""What one stage leaves for the next: a folder of safetensors with a manifest, complete or absent.

::

    <run>/handoff/
      manifest.json                 stage, parts with shapes and types, configuration hash, data fingerprint, metrics
      <part>.safetensors            parameters of one part by their names inside it
      adapter/                      the language model's adapters in PEFT's format, in the place of ``lora``
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import time
from collections import deque
from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_modules.model.lora import LoRAConfig, from_peft_name, save_peft_adapter
from lightning_modules.weights.tensors import StoredTensor, WeightsError, file_digest, open_tensors, sync

if TYPE_CHECKING:
    from lightning_modules.stages.base import Stage

FORMAT = 1
ADAPTER = "adapter"


def read_manifest(folder: Path, part: str | None = None) -> dict[str, Any]:
    """Read a hand-off's manifest without touching its tensors.

    Args:
        folder: ``<run>/handoff``.
        part: must be among the parts.

    Raises:
        WeightsError: there is no complete hand-off, it is of another format, or lacks the part.
    """
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        raise WeightsError(f"hand-off {folder}: not there: run `make {folder.parent.name}` first")
    try:
        content: dict[str, Any] = json.loads(manifest.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise WeightsError(
            f"hand-off {manifest}: malformed JSON ({error.msg}): run `make {folder.parent.name} FORCE=1`"
        ) from None
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise WeightsError(
            f"hand-off {manifest}: field format is {found}, this version reads {FORMAT}: "
            f"run `make {folder.parent.name} FORCE=1`"
        )
    if lacking := [
        field
        for field, kind in (("stage", str), ("parts", dict), ("digest", str))
        if not isinstance(content.get(field), kind)
    ]:
        raise WeightsError(
            f"hand-off {manifest}: field {', '.join(lacking)} is missing: run `make {folder.parent.name} FORCE=1`"
        )
    if part is not None and part not in content["parts"]:
        raise WeightsError(f"hand-off {folder}: no part {part!r}, it has {', '.join(content['parts'])}")
    return content


def is_answered(folder: Path, handoff: Path) -> bool:
    """The held-out questions were answered in a folder, and not before a hand-off was last written."""
    metrics, manifest = folder / "metrics.json", handoff / "manifest.json"
    return metrics.is_file() and manifest.is_file() and metrics.stat().st_mtime_ns >= manifest.stat().st_mtime_ns


def open_stage_weights(folder: Path, part: str) -> dict[str, StoredTensor]:
    """Tensors of one part of a hand-off, by their names inside the part.

    Raises:
        WeightsError: the hand-off or one of its files is missing, incomplete or damaged.
    """
    manifest = read_manifest(folder, part)
    file = folder / ADAPTER / "adapter_model.safetensors" if part == "lora" else folder / f"{part}.safetensors"
    try:
        stored = open_tensors(file)
    except WeightsError as error:
        raise WeightsError(f"hand-off {error}: run `make {folder.parent.name} FORCE=1`") from None
    if _digest(folder, file.stat().st_mtime_ns) != manifest["digest"]:
        raise WeightsError(
            f"hand-off {folder}: its files are not those that manifest.json describes (digest differs): they are "
            f"damaged, run `make {folder.parent.name} FORCE=1`"
        )
    return {from_peft_name(name) if part == "lora" else name: tensor for name, tensor in stored.items()}


@lru_cache
def _digest(folder: Path, changed_ns: int) -> str:
    """Of all tensors in a folder, read once as long as it does not change."""
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
    folder: Path, parts: Iterable[tuple[str, Mapping[str, Tensor]]], lora: LoRAConfig, manifest: Mapping[str, Any]
) -> None:
    """Write parts of an ``Exo2EgoModel``; the folder appears complete or not at all, and replaces an earlier one.

    Args:
        folder: ``<run>/handoff``.
        parts: names, and whole tensors on the CPU by their names inside the part.
        lora: size of the adapters.
        manifest: fields beside ``format``, ``digest`` and ``parts``.
    """
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
    content = {"format": FORMAT, **manifest, "digest": _digest(new, time.time_ns()), "parts": described}
    (new / "manifest.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for path in [*new.rglob("*"), new]:
        sync(path)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def code_version() -> str:
    """The commit of a checkout, with ``+changes`` when it was edited, else the package version."""
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


class StageHandoff(L.Callback):
    """Writes a stage's trained parts when its training is complete.

    Args:
        folder: ``<run>/handoff``.
        stage: name of the stage, as ``make`` knows it.
        config_hash: of the resolved configuration.
    """

    def __init__(self, folder: str, stage: str, config_hash: str) -> None:
        self.folder, self.stage, self.config_hash = Path(folder), stage, config_hash

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write after the last step, the first process what all of them hold; an interrupted run writes nothing."""
        stage: Stage = pl_module  # type: ignore[assignment]
        if trainer.interrupted or trainer.global_step < stage.total_steps():
            return
        stage.finite.settle()
        trained = [part for part in stage.model.parts if part in stage.trained]
        parts = ((part, full_tensors(stage.model.part(part), trainer.is_global_zero)) for part in trained)
        if trainer.is_global_zero:
            manifest = {
                "stage": self.stage,
                "step": trainer.global_step,
                "config_hash": self.config_hash,
                "data_fingerprint": trainer.datamodule.fingerprint(),  # type: ignore[attr-defined]
                "code_version": code_version(),
                "started_from": stage.started_from(),
                "metrics": {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")},
            }
            try:
                write_stage_weights(self.folder, parts, stage.network.lora, manifest)
            except (OSError, SafetensorError) as error:
                raise WeightsError(
                    f"hand-off {self.folder}: could not be written ({error}): mend that and call the stage again, it "
                    "goes on from its last checkpoint"
                ) from None
        else:
            deque(parts, maxlen=0)
        trainer.strategy.barrier()
