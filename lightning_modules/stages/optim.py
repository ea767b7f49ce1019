"""AdamW with a learning rate for each part, linear warm-up and cosine decay."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lightning_modules.model.exo2ego import PARTS


@dataclass
class OptimConfig:
    """AdamW with linear warm-up and cosine decay to zero.

    Attributes:
        learning_rate: peak learning rate.
        warmup_fraction: fraction of all steps in which the rate rises.
        weight_decay: applied to matrices; vectors (norms, biases) are never decayed.
        betas: of Adam.
        lr_mult: factors on the learning rate of single parts, by the part's name.
        algorithm: ``adamw``, or ``adamw8bit``, which stores the moments of large tensors in 8 bits (bitsandbytes).
    """

    learning_rate: float
    warmup_fraction: float = 0.03
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    lr_mult: dict[str, float] = field(default_factory=dict)
    algorithm: Literal["adamw", "adamw8bit"] = "adamw"

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        if self.learning_rate <= 0:
            raise ValueError(f"model.optim.learning_rate: got {self.learning_rate}, allowed: above 0")
        if not 0 <= self.warmup_fraction < 1:
            raise ValueError(f"model.optim.warmup_fraction: got {self.warmup_fraction}, allowed: from 0 to below 1")
        if unknown := set(self.lr_mult) - set(PARTS):
            raise ValueError(f"model.optim.lr_mult: got {', '.join(sorted(unknown))}, allowed: {', '.join(PARTS)}")

    def optimizer(self, parameters: Iterable[tuple[str, nn.Parameter]], fused: bool = False) -> torch.optim.Optimizer:
        """Return AdamW with two groups for each part, its matrices and its vectors.

        Args:
            parameters: (part, parameter) of everything that trains.
            fused: compute the step in one kernel for many parameters, as a GPU does fastest.
        """
        groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
        for part, parameter in parameters:
            groups.setdefault((part, parameter.ndim > 1), []).append(parameter)
        settings = [
            {
                "params": members,
                "lr": self.learning_rate * self.lr_mult.get(part, 1.0),
                "weight_decay": self.weight_decay if matrices else 0.0,
                "name": part if matrices else f"{part}_vectors",
            }
            for (part, matrices), members in groups.items()
        ]
        if self.algorithm == "adamw8bit":
            from bitsandbytes.optim.adamw import AdamW8bit

            eight_bit: torch.optim.Optimizer = AdamW8bit(settings, betas=self.betas)
            return eight_bit
        return torch.optim.AdamW(settings, betas=self.betas, fused=fused or None)

    def schedule(self, optimizer: torch.optim.Optimizer, total_steps: int) -> LambdaLR:
        """Return the schedule of all learning rates, to be advanced after every optimiser step."""
        warmup = self.warmup_fraction * total_steps

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1.0, total_steps - warmup))))

        return LambdaLR(optimizer, factor)
