"""Conversations about one clip: the type of a turn, and the tag that stands for the clip."""

VIDEO_TAG = "<video>"
"""Stands for the clip in the first question of a conversation."""

IMAGE_TAG = "<image>"
"""Stands for the clip in files of LLaVA-NeXT, which knows no other tag."""

Turn = tuple[str, str]
"""A question and its answer, without the tag."""
