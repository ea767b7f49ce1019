"""Start several processes that run stages together, as torchrun or SLURM would."""

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import lightning as L

from lightning_modules.model.exo2ego import _checkpointed


def run_together(world, commands, folder, timeout_s=300):
    """Run ``main(arguments)`` for each of the commands, one after another, in ``world`` processes started once.

    An argument may be a list of words, one for each rank.

    Returns:
        The output of the first process for each command.
    """
    (folder / "commands.json").write_text(json.dumps(commands))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "NODE_RANK": "0",
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env={**environment, "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        outputs = [process.communicate(timeout=timeout_s)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * world, "\n\n".join(outputs)
    return json.loads((folder / "printed.json").read_text())


def _run(folder):
    from lightning_modules.cli import main

    printed, rank = [], int(os.environ["LOCAL_RANK"])
    for command in json.loads((folder / "commands.json").read_text()):
        arguments = [word if isinstance(word, str) else word[rank] for word in command]
        with contextlib.redirect_stdout(io.StringIO()) as output:
            status = main(arguments)
        assert status == 0, (arguments, output.getvalue())
        printed.append(output.getvalue())
    if rank == 0:
        (folder / "printed.json").write_text(json.dumps(printed))


class RecomputedParts(L.Callback):
    """Writes the parts whose blocks recompute their activations when training begins, in a file for each rank.

    Args:
        folder: of the files.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_fit_start(self, trainer, pl_module):
        parts = [
            part
            for part, blocks in pl_module.model.blocks().items()
            if any(getattr(block.forward, "func", None) is _checkpointed for block in blocks)
        ]
        (self.folder / f"rank_{trainer.global_rank}.json").write_text(json.dumps(parts))


if __name__ == "__main__":
    _run(Path(sys.argv[1]))
