"""EgoIT: official annotation files to one instruction mix, ``python -m datamodules.egoit convert|export|leaks``.

A file for each source in ``sources``; a source of your own is one more such file, see
``sources.base.InstructionSource``. Nothing here needs torch, a network or, but for trimming, a video.
"""
