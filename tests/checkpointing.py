"""Check that recomputing activations block by block in the backward pass changes no result."""

from collections import Counter
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint


def assert_checkpointing_changes_nothing(module, inputs):
    """Run with and without checkpointed blocks; outputs and all gradients must be bit-identical."""
    expected, calls = outputs_and_gradients(module, inputs), Counter()
    for index, block in enumerate(module.blocks()):
        block.forward = partial(checkpoint, counted(block.forward, calls, index), use_reentrant=False)
    actual = outputs_and_gradients(module, inputs)
    assert calls == dict.fromkeys(range(len(module.blocks())), 2)  # forward pass, and again in the backward pass
    assert expected.keys() == actual.keys()
    assert [name for name in expected if not torch.equal(expected[name], actual[name])] == []


def outputs_and_gradients(module, inputs):
    inputs = inputs.clone().requires_grad_(inputs.is_floating_point())
    outputs = module(inputs)
    module.zero_grad()
    outputs.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    if inputs.requires_grad:
        gradients["inputs"] = inputs.grad
    return {"outputs": outputs.detach(), **{f"gradient of {name}": value for name, value in gradients.items()}}


def counted(forward, calls, index):
    def run(*args, **kwargs):
        calls[index] += 1
        return forward(*args, **kwargs)

    return run
