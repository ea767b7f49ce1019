"""Private parts of lightning and torch are used in one file, which says so clearly when one of them is gone."""

import ast
import copy
import re
from datetime import timedelta
from types import SimpleNamespace

import lightning as L
import pytest
import tiny
import torch
from lightning.pytorch.strategies import DDPStrategy

from lightning_modules import compat

ROOT = tiny.EXPERIMENTS.parent
STRATEGIES = {"ddp": True, "ddp_find_unused_parameters_true": False, "fsdp2": False}
FILES = sorted((ROOT / "lightning_modules").rglob("*.py"))
# Names that begin with an underscore and are documented, or belong to other packages.
PUBLIC = {"_replace", "_exit", "_current_frames", "_attn_implementation"}


def progress(processed):
    counts = dict.fromkeys(("ready", "started", "processed", "completed"), processed)
    return {"total": dict(counts), "current": dict(counts)}


def test_micro_batches_are_counted_again_for_another_accumulation():
    checkpoint = {"loops": {"fit_loop": {"epoch_loop.batch_progress": progress(12)}}}
    compat.recount_micro_batches(checkpoint, 4, 2)
    assert checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"] == progress(6)
    before = copy.deepcopy(checkpoint)
    compat.recount_micro_batches(checkpoint, 2, 2)
    assert checkpoint == before


def test_tensors_over_the_same_memory_have_one_storage_id():
    tensor = torch.zeros(4)
    assert compat.storage_id(tensor) == compat.storage_id(tensor[1:]) != compat.storage_id(tensor.clone())


def test_a_module_without_a_trainer_has_none():
    assert compat.attached_trainer(L.LightningModule()) is None


def test_ddp_alone_needs_every_gradient():
    needs = {
        s: compat.needs_every_gradient(L.Trainer(accelerator="cpu", devices=2, strategy=s).strategy) for s in STRATEGIES
    }
    assert needs == STRATEGIES


GONE = [
    lambda: compat.needs_every_gradient(DDPStrategy.__new__(DDPStrategy)),
    lambda: compat.set_process_group_timeout(SimpleNamespace(), timedelta(seconds=1)),
    lambda: compat.ignore_signals(SimpleNamespace()),
    lambda: compat.micro_batches_done(SimpleNamespace(fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace()))),
    lambda: compat.recount_micro_batches({"loops": {"fit_loop": {}}}, 1, 1),
]


@pytest.mark.parametrize("use", GONE)
def test_a_part_that_is_gone_is_named_with_the_version_that_had_it(use):
    with pytest.raises(AttributeError, match=r"has no .* any more: use lightning 2\.\d.* adapt .*compat\.py"):
        use()


def private_uses(file):
    """Yield every private attribute of another object, and every private import, with its line."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr) and node.attr not in PUBLIC:
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield node.lineno, ast.unparse(node)
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(
            ("lightning_modules", "datamodules")
        ):
            for part in (*(node.module or "").split("."), *(alias.name for alias in node.names)):
                if re.match(r"_[a-z]", part):
                    yield node.lineno, f"{node.module}: {part}"


def test_private_parts_of_other_packages_are_used_in_compat_alone():
    uses = {str(file.relative_to(ROOT)): list(private_uses(file)) for file in FILES if file.name != "compat.py"}
    assert {file: found for file, found in uses.items() if found} == {}


def test_assertions_only_check():
    """``python -O`` removes assertions, so that they must not do anything else."""
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assert):
                called = {ast.unparse(call.func) for call in ast.walk(node.test) if isinstance(call, ast.Call)}
                assert called <= {"isinstance", "len"}, (file, node.lineno)
