"""Fill the parts of a model with weights from files, one unit of the model at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from lightning_modules.model.exo2ego import Exo2EgoModel
from lightning_modules.model.quantize import Quantization, quantize_linears
from lightning_modules.weights.positions import PATCH_FILTERS, square_side
from lightning_modules.weights.tensors import FoundWeights, WeightsError


def require_fit(found: FoundWeights, parameters: Mapping[str, Tensor]) -> None:
    """Compare names and shapes of stored tensors with the parameters to fill.

    Args:
        found: weights of a part.
        parameters: of that part, by their names inside it.

    Raises:
        WeightsError: they differ; the message names those that are missing, unexpected or mis-shaped.
    """
    wrong_shapes = []
    for name, tensor in found.tensors.items():
        if name in parameters and tuple(parameters[name].shape) != tensor.shape:
            wrong_shapes.append(f"{name} is {list(tensor.shape)}, expected {list(parameters[name].shape)}")
    differences = {
        "missing": sorted(set(parameters) - set(found.tensors)),
        "unexpected": sorted(set(found.tensors) - set(parameters)),
        "mis-shaped": wrong_shapes,
    }
    problems = []
    for kind, names in differences.items():
        if names:
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            problems.append(f"{len(names)} {kind} ({shown})")
    if problems:
        fix = _fix_of_resolution(found, parameters) or found.fix
        raise WeightsError(f"{found.where}: does not fit {found.part} of this model: {'; '.join(problems)}. {fix}.")


def _fix_of_resolution(found: FoundWeights, parameters: Mapping[str, Tensor]) -> str | None:
    """Name the frame size of stored positions that differ from a built-in encoder's in their number alone."""
    if found.tensors.keys() != set(parameters):
        return None
    wrong = [name for name, tensor in found.tensors.items() if tuple(parameters[name].shape) != tensor.shape]
    if len(wrong) != 1 or wrong[0] not in PATCH_FILTERS:
        return None
    stored, ours = found.tensors[wrong[0]].shape, tuple(parameters[wrong[0]].shape)
    patch = parameters[PATCH_FILTERS[wrong[0]]].shape[-1]
    if stored[-1] != ours[-1]:
        return None
    side = square_side(stored[-2])
    if side is None:
        return None
    return (
        f"Its positions are those of frames of {side * patch} x {side * patch} pixels: set clips.image_size to "
        f"{side * patch}, or network.encoder.resample_positions to true"
    )


def load_weights(
    model: Exo2EgoModel,
    found: Mapping[str, FoundWeights],
    trained: Collection[str],
    frozen_dtype: torch.dtype,
    device: torch.device,
    finish_unit: Callable[[nn.Module], None] | None = None,
    quantization: Quantization | None = None,
) -> None:
    """Bring every part to its type and device and fill it, one unit of the model at a time.

    No process holds more than one unit in addition to what ``finish_unit`` leaves of the units before.

    Args:
        model: the parts in ``found`` have no memory yet; the others have their initial values.
        found: weights of some parts, which fit, see ``require_fit``.
        trained: parts that train: they are float32 and require gradients, all others do neither.
        frozen_dtype: type of the other parts.
        device: of all parts.
        finish_unit: called with each unit when it is filled, to shard it.
        quantization: of the linear layers in the decoder layers of a frozen language model. Each layer is quantised
            before the next is read.
    """
    if "language_model" in found:
        model.language_model.restore_buffers()
    quantized = [] if quantization is None or "language_model" in trained else model.language_model.blocks()
    done: set[int] = set()
    for unit in model.units():
        for part in model.parts:
            dtype = torch.float32 if part in trained else frozen_dtype
            for name, parameter in _allocate(model.part(part), unit, dtype, device, done).items():
                if part in found:
                    with torch.no_grad():
                        parameter.copy_(found[part].tensors[name].read())
                parameter.requires_grad_(part in trained)
        if quantization is not None and unit in quantized:
            quantize_linears(unit, quantization)
        if finish_unit is not None:
            finish_unit(unit)
        done |= {id(parameter) for parameter in unit.parameters()}


def _allocate(
    parameters: Mapping[str, nn.Parameter],
    unit: nn.Module,
    dtype: torch.dtype,
    device: torch.device,
    done: Collection[int],
) -> dict[str, nn.Parameter]:
    """Bring a part's parameters in a unit to their type and device; those without memory get undefined content.

    Args:
        parameters: of the part, by their names inside it.
        unit: module that holds some of them.
        dtype: of the part.
        device: of the part.
        done: ids of parameters that belong to units before, which are left alone.

    Returns:
        The parameters, new or moved, by their names inside the part.
    """
    names = {id(parameter): name for name, parameter in parameters.items() if id(parameter) not in done}
    allocated: dict[int, nn.Parameter] = {}
    for module in unit.modules():
        for attribute, parameter in list(module.named_parameters(recurse=False)):
            key = id(parameter)
            if key not in names:
                continue
            if key not in allocated:  # tied ones stay tied
                if parameter.is_meta:
                    memory = torch.empty_like(parameter, dtype=dtype, device=device)
                    allocated[key] = nn.Parameter(memory, parameter.requires_grad)
                else:
                    parameter.data = parameter.data.to(device, dtype)
                    allocated[key] = parameter
            setattr(module, attribute, allocated[key])
    return {names[key]: parameter for key, parameter in allocated.items()}
