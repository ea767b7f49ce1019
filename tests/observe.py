"""Record what passes through a model, whoever calls it and in whichever process; imports nothing of this repository."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook


class Seen(NamedTuple):
    """Everything up to the first answer token of one clip.

    Attributes:
        frames: uint8 [T, S, S, 3].
        text: token ids of the text, int64 [L]; a placeholder of the clip may be among them as 0.
        visual: float [N, D].
        logits: float [V], of the next token.
    """

    frames: Tensor
    text: Tensor
    visual: Tensor
    logits: Tensor


class Observer:
    """Context in which the first forward pass of any exo2ego model in this process is recorded.

    It watches modules by the names of their classes, which are the same in this repository and in exported folders.

    Args:
        vocab_size: outputs of the language model's head.
        first: take the first of the head's logits, those of the first supervised token in training; else the last.
    """

    def __init__(self, vocab_size: int, first: bool = False) -> None:
        self.vocab_size, self.first = vocab_size, first
        self.frames: list[Tensor] = []
        self.text: list[Tensor] = []
        self.visual: list[Tensor] = []
        self.logits: list[Tensor] = []

    def __enter__(self) -> Observer:
        self._handle = register_module_forward_hook(self._record)
        return self

    def __exit__(self, *exception: object) -> None:
        self._handle.remove()

    def seen(self) -> Seen:
        visual = torch.cat([tokens[0] for tokens in self.visual])
        return Seen(self.frames[0][0], torch.cat(self.text), visual, self.logits[0])

    def _record(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if self.logits:
            return
        classes = {kind.__name__ for kind in type(module).__mro__}
        if "VisionEncoder" in classes:
            self.frames.append(inputs[0].detach().cpu())
        elif "STCConnector" in classes:
            self.visual.append(output.detach().float().cpu())
        elif isinstance(module, nn.Embedding) and module.num_embeddings == self.vocab_size:
            self.text.append(inputs[0].flatten().cpu())
        elif isinstance(module, nn.Linear) and module.out_features == self.vocab_size:
            rows = output.detach().float().cpu().reshape(-1, self.vocab_size)
            self.logits.append(rows[0 if self.first else -1])
