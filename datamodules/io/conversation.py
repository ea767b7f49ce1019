"""Conversations about one clip: the type of a turn, and the tag that stands for the clip."""

VIDEO_TAG = "<video>"
"""Stands for the clip in the first question of a conversation."""

Turn = tuple[str, str]
"""A question and its answer, without the tag."""
