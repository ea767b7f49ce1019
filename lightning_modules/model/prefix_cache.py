"""Score and continue many texts after one prefix with video, whose keys and values are computed once.

Letters: ``P`` positions of the prefix, ``R`` rows, ``L`` tokens of one pass, ``D`` width, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from lightning_modules.model.language_model import LanguageModel

Row = tuple[int, ...]
TOKENS_A_PASS = 1024


@dataclass(frozen=True)
class _Pass:
    """Rows of tokens as one tree, which holds a common beginning once.

    A row has a state before each of its tokens and one after the last; 0 is that of the prefix, n + 1 of the tree's
    token n.

    Attributes:
        tokens: int64 [L], parents before children.
        depth: int64 [L], tokens of the row before this one.
        visible: bool [L, L], which tokens of the tree each one attends to: those of its own row, up to itself.
        rows: int64 [M], numbers of the rows.
        ends: int64 [M], state after the last token of each of them.
        scored_rows: int64 [S], row of each token of the rows.
        scored_states: int64 [S], state before that token.
        scored_tokens: int64 [S], the token.
    """

    tokens: Tensor
    depth: Tensor
    visible: Tensor
    rows: Tensor
    ends: Tensor
    scored_rows: Tensor
    scored_states: Tensor
    scored_tokens: Tensor


@lru_cache(maxsize=4)
def _passes(rows: tuple[Row, ...], scored: bool, tokens_a_pass: int) -> tuple[_Pass, ...]:
    """Distribute rows over trees of at most so many tokens, unless a single row is longer.

    Args:
        rows: rows of tokens.
        scored: leave each row's last token out of the tree, since nothing follows it.
        tokens_a_pass: limit of a tree.
    """
    passes: list[_Pass] = []
    nodes: dict[Row, int] = {(): -1}  # beginnings of rows to their tokens' places in the tree
    members: list[int] = []
    # Rows in alphabetical order, since neighbours there have most in common.
    for member in sorted(range(len(rows)), key=rows.__getitem__):
        row = rows[member][:-1] if scored else rows[member]
        beginnings = [row[: n + 1] for n in range(len(row))]
        added = sum(beginning not in nodes for beginning in beginnings)
        if members and len(nodes) - 1 + added > tokens_a_pass:
            passes.append(_build_pass(rows, members, nodes, scored))
            nodes, members = {(): -1}, []
        for beginning in beginnings:
            nodes.setdefault(beginning, len(nodes) - 1)
        members.append(member)
    if members:
        passes.append(_build_pass(rows, members, nodes, scored))
    return tuple(passes)


def _build_pass(rows: tuple[Row, ...], members: list[int], nodes: dict[Row, int], scored: bool) -> _Pass:
    """Build the tensors of a tree.

    Args:
        rows: all rows.
        members: numbers of the rows in the tree.
        nodes: their beginnings, in the order of the tree; the empty one is the prefix.
        scored: the last token of each row is not in the tree.
    """
    # A token attends to what its parent attends to, and to itself.
    beginnings = [beginning for beginning in nodes if beginning]
    visible = torch.zeros(len(beginnings), len(beginnings), dtype=torch.bool)
    for number, beginning in enumerate(beginnings):
        if len(beginning) > 1:
            visible[number] = visible[nodes[beginning[:-1]]]
        visible[number, number] = True

    # For every token to score: its row, the state that predicts it, and itself.
    steps: list[tuple[int, int, int]] = []
    ends: list[int] = []
    for member in members:
        row = rows[member]
        ends.append(nodes[row[:-1] if scored else row] + 1)
        if scored:
            steps += [(member, nodes[row[:n]] + 1, token) for n, token in enumerate(row)]
    scored_rows, scored_states, scored_tokens = torch.tensor(steps, dtype=torch.int64).view(-1, 3).unbind(1)
    return _Pass(
        tokens=torch.tensor([beginning[-1] for beginning in beginnings], dtype=torch.int64),
        depth=torch.tensor([len(beginning) - 1 for beginning in beginnings], dtype=torch.int64),
        visible=visible,
        rows=torch.tensor(members),
        ends=torch.tensor(ends),
        scored_rows=scored_rows,
        scored_states=scored_states,
        scored_tokens=scored_tokens,
    )


class SharedPrefix:
    """Keys and values of a text with video that many continuations share.

    Continuations are exact: each one sees the prefix and itself only, at the positions it would have alone. Several go
    through the model at once, in one row, by a mask over a tree of their tokens.

    Args:
        language_model: computes them.
        embeds: float [P, D], P >= 1, see ``LanguageModel.embed``.
        tokens_a_pass: of continuations that are computed at once.

    Raises:
        ValueError: attention takes no mask; or, from here on, positions reach a length at which the keys of the prefix
            would change, see ``LanguageModel.check_positions``.
    """

    def __init__(self, language_model: LanguageModel, embeds: Tensor, tokens_a_pass: int = TOKENS_A_PASS) -> None:
        attention = language_model.causal_lm.config._attn_implementation
        if attention not in ("sdpa", "eager"):
            raise ValueError(
                f"network.language_model.attn_implementation: {attention} cannot take the mask of a tree of tokens: "
                "set it to sdpa or eager"
            )
        self.language_model, self.tokens_a_pass = language_model, tokens_a_pass
        # Without a configuration it keeps all keys, also of layers with a sliding window: a tree has more tokens than
        # it is deep. The window is part of the mask.
        self.cache: Any = DynamicCache()
        self.length = 0
        self.last = embeds.new_empty(0)
        self._append(embeds)

    @contextmanager
    def extended(self, ids: Sequence[int]) -> Iterator[SharedPrefix]:
        """Append tokens to the prefix for as long as the context lasts."""
        before = self.last
        if ids:
            self._append(self._embed(ids))
        try:
            yield self
        finally:
            self._crop(len(ids))
            self.last = before

    def log_likelihoods(self, rows: Sequence[Row]) -> Tensor:
        """Return log p of each row of tokens, none of them empty, as a continuation: float32 [R], sums over tokens."""
        log_p = torch.zeros(len(rows), dtype=torch.float64, device=self.last.device)  # GPUs add in any order
        for part in _passes(tuple(rows), True, self.tokens_a_pass):
            log_p_next = self.language_model.logits(self._states(part)).log_softmax(-1)
            row, state, token = (t.to(log_p.device) for t in (part.scored_rows, part.scored_states, part.scored_tokens))
            log_p.index_add_(0, row, log_p_next[state, token].double())
        return log_p.float()

    def next_logits(self, rows: Sequence[Row]) -> Tensor:
        """Return next-token logits after each row of tokens, any of which may be empty: float32 [R, V]."""
        found = self.last.repeat(len(rows), 1)
        for part in _passes(tuple(rows), False, self.tokens_a_pass):
            found[part.rows.to(found.device)] = self._states(part)[part.ends.to(found.device)]
        return self.language_model.logits(found)

    def greedy(self, max_new_tokens: int, end: int) -> list[int]:
        """Continue with the most likely tokens until ``end``, which is left out, or ``max_new_tokens``."""
        return list(self.stream(max_new_tokens, end))

    def greedy_each(self, rows: Sequence[Row], max_new_tokens: int, end: int) -> list[list[int]]:
        """Continue each row of tokens with the most likely ones, all rows together.

        Args:
            rows: tokens between the prefix and each answer.
            max_new_tokens: longest answer.
            end: ends an answer.

        Returns:
            What ``greedy`` returns after each row alone.
        """
        if len(rows) == 1:  # needs no mask
            with self.extended(rows[0]) as context:
                return [context.greedy(max_new_tokens, end)]
        answers: list[list[int]] = [[] for _ in rows]
        for part in _passes(tuple(rows), False, self.tokens_a_pass):
            try:
                self._continue_tree(part, answers, max_new_tokens, end)
            finally:
                self._crop_cache(self.cache.get_seq_length() - self.length)
        return answers

    def _continue_tree(self, part: _Pass, answers: list[list[int]], max_new_tokens: int, end: int) -> None:
        """Add the next tokens of a tree's rows to their answers; the keys of all tokens stay in the cache."""
        # Next tokens come after any state of the tree, the first of which is that of the prefix.
        root = torch.zeros(1, len(part.tokens), dtype=torch.bool)
        visible = torch.cat([root, part.visible])[part.ends]
        position = torch.cat([torch.tensor([0]), part.depth + 1])[part.ends] + self.length
        read_positions = self.length + part.depth
        states = self._read_tree(part)[part.ends.to(self.last.device)]
        row = part.rows

        for number in range(max_new_tokens):
            token = self.language_model.logits(states).argmax(-1).cpu()  # a GPU is waited for once a step
            is_open = token != end
            row, token, visible, position = row[is_open], token[is_open], visible[is_open], position[is_open]
            for answer, chosen in zip(row.tolist(), token.tolist(), strict=True):
                answers[answer].append(chosen)
            if not len(row) or number + 1 == max_new_tokens:  # nothing follows the last one
                return
            # Each row gets one more branch, which it alone attends to.
            visible = torch.cat([visible, torch.eye(len(row), dtype=torch.bool)], dim=1)
            read_positions = torch.cat([read_positions, position])
            states = self._read_branches(token, visible, position, read_positions)
            position = position + 1

    def stream(self, max_new_tokens: int, end: int) -> Iterator[int]:
        """Yield the tokens of ``greedy`` one by one; use the prefix for nothing else until the iterator is closed."""
        before, read = self.last, 0
        try:
            for number in range(max_new_tokens):
                token = int(self.language_model.logits(self.last).argmax())
                if token == end:
                    break
                yield token
                if number + 1 < max_new_tokens:  # nothing follows the last one
                    self._append(self._embed([token]))
                    read += 1
        finally:
            self._crop(read)
            self.last = before

    def _embed(self, ids: Sequence[int]) -> Tensor:
        return self.language_model.embed(torch.tensor(ids, dtype=torch.int64, device=self.last.device))

    def _append(self, embeds: Tensor) -> None:
        self.last = self._read(embeds, self.length + len(embeds))[-1]
        self.length += len(embeds)

    def _states(self, part: _Pass) -> Tensor:
        """Return the states of the prefix and after each token of a tree: float [1 + L, D]; the cache stays equal."""
        states = self._read_tree(part)
        self._crop_cache(len(part.tokens))
        return states

    def _read_tree(self, part: _Pass) -> Tensor:
        """Return the states of the prefix and after each token of a tree: float [1 + L, D]."""
        if not len(part.tokens):
            return self.last[None]
        position = self.length + part.depth
        return torch.cat([self.last[None], self._read_branches(part.tokens, part.visible, position, position)])

    def _read_branches(self, tokens: Tensor, visible: Tensor, position: Tensor, key_position: Tensor) -> Tensor:
        """Read tokens that see the prefix and some of the C tokens behind it, which end with themselves.

        Args:
            tokens: int64 [L].
            visible: bool [L, C], which tokens behind the prefix each one attends to.
            position: int64 [L], of the tokens.
            key_position: int64 [C], of all tokens behind the prefix.

        Returns:
            Their states, float [L, D].
        """
        return self._read(
            self.language_model.embed(tokens.to(self.last.device)),
            int(position.max()) + 1,
            attention_mask=self._masks(visible, position, key_position),
            position_ids=position[None].to(self.last.device),
        )

    def _masks(self, visible: Tensor, position: Tensor, key_position: Tensor) -> Any:
        """Return the mask of ``_read_branches`` for the model's layers, [1, 1, L, P + C]."""
        config = self.language_model.causal_lm.config
        visible = torch.cat([torch.ones(len(position), self.length, dtype=torch.bool), visible], dim=1)
        window = getattr(config, "sliding_window", None)
        types = getattr(config, "layer_types", None) or ()
        if window is None or (types and "sliding_attention" not in types):
            return self._mask(visible)
        distance = position[:, None] - torch.cat([torch.arange(self.length), key_position])
        sliding = self._mask(visible & (distance < window))
        if not types:  # the window is that of all layers
            return sliding
        return {"full_attention": self._mask(visible), "sliding_attention": sliding}

    def _mask(self, visible: Tensor) -> Tensor:
        """Return a mask in the form that the attention takes: bool, or for eager attention numbers that it adds."""
        mask = visible[None, None].to(self.last.device)
        if self.language_model.causal_lm.config._attn_implementation == "sdpa":
            return mask
        return torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, torch.finfo(torch.float32).min)

    def _read(self, embeds: Tensor, total: int, **how: Any) -> Tensor:
        """Return the states of tokens, float [L, D], the last of which has position ``total`` - 1."""
        self.language_model.check_positions(total, cached=self.length)
        outputs = self.language_model.causal_lm.get_decoder()(
            inputs_embeds=embeds[None], past_key_values=self.cache, use_cache=True, **how
        )
        hidden: Tensor = outputs.last_hidden_state
        return hidden[0]

    def _crop(self, count: int) -> None:
        self._crop_cache(count)
        self.length -= count

    def _crop_cache(self, count: int) -> None:
        if count:
            self.cache.crop(-count)
