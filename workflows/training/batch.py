"""Prompts and completions become tree-packed batches: no padding, and nothing that is shared is computed twice.

A row holds several trees, each a prompt with its completions: one for supervised fine-tuning, two for DPO, a group of G
for GRPO, a question's choices for scoring. What all prompts of a row begin with (a system message, say) is held once,
above the trees. So a row is a forest of nodes,

    prefix ─┬─ prompt ─┬─ completion        a token sees the earlier tokens of its own node
            │          └─ completion        and all tokens of the nodes above it, nothing else;
            └─ prompt ─── completion        positions count along that path.

which gives each token exactly what it would see if its sample stood alone (Krell et al. 2021, arXiv 2107.02027, for
packing; the shared prompt is what TRL and LitGPT compute once per completion).

A completion's last token is predicted but predicts nothing, so it is no input at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

ROW_MULTIPLE = 32
"""Rows are filled up to a multiple of this: on a CPU each new length makes oneDNN compile and keep kernels of its own,
20 MB for the 135M model; on a GPU matrix products want multiples of 8."""


@dataclass(frozen=True)
class Tree:
    """A prompt with its completions, as token ids.

    Attributes:
        prompt: At least one id; the last one predicts the first token of each completion.
        completions: At least one, each with at least one id.
        loss_masks: For each completion which of its ids are learned or scored; all of them if None.
    """

    prompt: list[int]
    completions: list[list[int]]
    loss_masks: list[list[bool]] | None = None

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("a tree needs a prompt of at least one token")
        if not self.completions or not all(self.completions):
            raise ValueError("a tree needs at least one completion, and no completion may be empty")

    @property
    def tokens(self) -> int:
        """Input tokens of the tree, its prompt counted once."""
        return len(self.prompt) + sum(len(completion) - 1 for completion in self.completions)

    @property
    def real_tokens(self) -> int:
        """Tokens of its samples, each with its own prompt, as any other trainer would count them."""
        return sum(len(self.prompt) + len(completion) for completion in self.completions)


@dataclass
class PackedBatch:
    """One row of packed trees. T input tokens, M nodes, N learned tokens.

    Attributes:
        input_ids: Token ids, shape (1, T).
        positions: Rotary position of each token, shape (1, T).
        nodes: The node each token belongs to, shape (1, T).
        visible: Whether a token of node i may see tokens of node j, shape (1, M, M).
        predictors: For each learned token the index in 0..T-1 whose output predicts it, shape (N,).
        targets: The learned token ids, shape (N,).
        owners: For each learned token its completion's number in the order the trees were given, shape (N,).
        spans: Where each tree's own tokens begin and end in the row, shape (trees, 2); what is before is shared.
        completions: How many completions the row holds.
        real_tokens: Tokens of the samples without padding or sharing.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    nodes: torch.Tensor
    visible: torch.Tensor
    predictors: torch.Tensor
    targets: torch.Tensor
    owners: torch.Tensor
    spans: torch.Tensor
    completions: int
    real_tokens: int

    def attention_mask(self) -> torch.Tensor | None:
        """Boolean mask of shape (1, 1, T, T), true where a token may look; None where plain causal attention is it."""
        if self.visible.size(-1) == 1 or bool(self.visible.tril().equal(torch.ones_like(self.visible).tril())):
            return None  # one path: every node sees all the nodes before it
        row = self.nodes[0]  # (T,)
        mask = self.visible[0][row][:, row]  # (T, T)
        return mask.tril()[None, None]  # (1, 1, T, T)

    def to(self, device: torch.device) -> "PackedBatch":
        """The same batch with its tensors on a device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return PackedBatch(**{**vars(self), **moved})


@dataclass
class _Row:
    """Where `pack_row` collects a row's tokens."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    nodes: list[int] = field(default_factory=list)
    paths: list[list[int]] = field(default_factory=list)  # for each node the nodes it sees, itself included

    def add_node(self, ids: Sequence[int], above: Sequence[int], start: int) -> int:
        """Append a node's tokens, `start` being its first position; returns the node's number."""
        node = len(self.paths)
        self.paths.append([*above, node])
        self.ids += ids
        self.positions += range(start, start + len(ids))
        self.nodes += [node] * len(ids)
        return node

    def visible(self) -> torch.Tensor:
        """Shape (1, M, M)."""
        visible = torch.zeros(len(self.paths), len(self.paths), dtype=torch.bool)
        for node, path in enumerate(self.paths):
            visible[node, path] = True
        return visible[None]


def pack_row(trees: Sequence[Tree], multiple: int = 1) -> PackedBatch:
    """Pack trees into one row.

    Args:
        trees: At least one.
        multiple: The row's length is filled up to a multiple of this.

    Returns:
        A batch whose completions are numbered in the order of `trees` and of each tree's completions.
    """
    row = _Row()
    predictors: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    spans: list[tuple[int, int]] = []
    completions = 0

    shared = shared_prefix_length([tree.prompt for tree in trees])
    top = [row.add_node(trees[0].prompt[:shared], [], 0)] if shared else []
    for tree in trees:
        tree_begin = len(row.ids)
        prompt = row.add_node(tree.prompt[shared:], top, shared)
        prompt_end = len(row.ids) - 1
        for index, completion in enumerate(tree.completions):
            mask = tree.loss_masks[index] if tree.loss_masks is not None else [True] * len(completion)
            begin = len(row.ids)
            row.add_node(completion[:-1], [*top, prompt], len(tree.prompt))
            for offset, (token, learned) in enumerate(zip(completion, mask, strict=True)):
                if learned:
                    predictors.append(prompt_end if offset == 0 else begin + offset - 1)
                    targets.append(token)
                    owners.append(completions)
            completions += 1
        spans.append((tree_begin, len(row.ids)))
    if fill := -len(row.ids) % multiple:
        # Further tokens of the last completion: nothing is learned from them, and nothing that is learned sees them.
        row.ids += [trees[-1].completions[-1][-1]] * fill
        row.positions += row.positions[-1:] * fill
        row.nodes += row.nodes[-1:] * fill
        spans[-1] = (spans[-1][0], len(row.ids))

    return PackedBatch(
        input_ids=torch.tensor([row.ids]),
        positions=torch.tensor([row.positions]),
        nodes=torch.tensor([row.nodes]),
        visible=row.visible(),
        predictors=torch.tensor(predictors, dtype=torch.long),
        targets=torch.tensor(targets, dtype=torch.long),
        owners=torch.tensor(owners, dtype=torch.long),
        spans=torch.tensor(spans),
        completions=completions,
        real_tokens=sum(tree.real_tokens for tree in trees),
    )


def shared_prefix_length(prompts: Sequence[list[int]]) -> int:
    """How many leading ids all prompts share; at least one id is left to each, and one prompt shares nothing."""
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)  # what the lexicographic extremes share, all share
    limit = min(map(len, prompts)) - 1
    shared = 0
    while shared < limit and first[shared] == last[shared]:
        shared += 1
    return shared


def assign_rows(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Distribute trees over rows: first-fit decreasing, so that rows are full and few.

    Args:
        lengths: Input tokens of each tree (`Tree.tokens`).
        row_tokens: Capacity of a row. A longer tree gets a row of its own.

    Returns:
        For each row the indices of its trees, ascending; deterministic in the arguments.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for number, free in enumerate(room):
            if lengths[index] <= free:
                rows[number].append(index)
                room[number] -= lengths[index]
                break
        else:
            rows.append([index])
            room.append(row_tokens - lengths[index])
    return [sorted(row) for row in rows]


def pack(trees: Sequence[Tree], row_tokens: int) -> list[tuple[list[int], PackedBatch]]:
    """Pack trees into as few rows as fit.

    Returns:
        For each row the indices of its trees in `trees`, and the batch.
    """
    rows = assign_rows([tree.tokens for tree in trees], row_tokens)
    return [(row, pack_row([trees[i] for i in row], ROW_MULTIPLE)) for row in rows]
