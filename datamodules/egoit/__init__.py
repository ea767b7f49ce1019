"""EgoIT: instruction tuning from official annotation files, ``python -m datamodules.egoit convert|export|leaks``.

Each source has a file in ``sources``; a source of your own is one file of yours, see
``sources.base.InstructionSource``. The commands need neither torch nor a network, and videos only for trimming.
"""
