"""EgoIT: official annotation files to one instruction mix, ``python -m datamodules.egoit convert|export|leaks``.

A file for each source (``egtea``, ``ssv2``, ``egotimeqa``, ``openeqa``, ``egoexolearn``); a source of your own is one
more such file, see ``source.InstructionSource``. Nothing here needs torch, a network or, but for trimming, a video.
"""
