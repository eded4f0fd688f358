"""Trees over noise levels: diffusion tree sampling (DTS) and search (DTS*), https://arxiv.org/abs/2506.20701.

A tree estimates the soft value of the states that the base sampler p visits,

    V(x) = 1/lambda log E_p[ e^(lambda r(x0)) | x ],        p*(x0) proportional to p(x0) e^(lambda r(x0)),

from all completed rollouts. Its root is a dummy above pure noise; the children of a node are draws of p from the node's
state down to the next branching level; the leaves are clean. All here is arithmetic on trees: `guidance.search.dts`
runs the network.
"""

import math
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from solvers.denoiser import Path
from solvers.errors import UserError

ROOT = 0
Address = tuple[int, ...]  # the way to a node from the root: which child at each turn


@dataclass
class Tree:
    """One tree, grown in place; every list has one entry for each node, and node 0 is the root."""

    depth: int  # of the leaves; the root's is 0, pure noise's 1
    parents: list[int] = field(default_factory=lambda: [-1])
    ranks: list[int] = field(default_factory=lambda: [0])  # which child of its parent a node is
    depths: list[int] = field(default_factory=lambda: [0])
    children: list[list[int]] = field(default_factory=lambda: [[]])
    values: list[float] = field(default_factory=lambda: [math.nan])  # NaN until a rollout through the node ends
    visits: list[int] = field(default_factory=lambda: [1])  # 1 + the rollouts through the node
    states: list[Path | None] = field(default_factory=lambda: [None])  # one row each, on the CPU; the root has none

    def __len__(self) -> int:
        return len(self.parents)

    @property
    def rollouts(self) -> int:
        return self.visits[ROOT] - 1

    @property
    def leaves(self) -> list[int]:
        """The leaves whose reward is known, oldest first."""
        return [n for n in range(len(self)) if self.is_leaf(n) and not math.isnan(self.values[n])]

    def is_leaf(self, node: int) -> bool:
        return self.depths[node] == self.depth

    def valued(self, node: int) -> list[int]:
        """The children that a rollout has ended under."""
        return [c for c in self.children[node] if not math.isnan(self.values[c])]

    def add(self, parent: int, state: Path | None) -> int:
        """A new child of `parent`, which a rollout that `visit` counted goes through: its number."""
        node = len(self)
        self.parents.append(parent)
        self.ranks.append(len(self.children[parent]))
        self.depths.append(self.depths[parent] + 1)
        self.children.append([])
        self.children[parent].append(node)
        self.values.append(math.nan)
        self.visits.append(2)
        self.states.append(state)
        return node

    def lineage(self, node: int) -> Iterator[int]:
        """The node, its parent, ..., the root."""
        while node >= ROOT:
            yield node
            node = self.parents[node]

    def address(self, node: int) -> Address:
        return tuple(self.ranks[n] for n in self.lineage(node) if n != ROOT)[::-1]


# ------------------------------------------------------------------------------------------------ values
def log_mean_exp(values: Sequence[float], lam: float) -> float:
    """1/lambda log( mean of e^(lambda v) ), the soft backup."""
    top = max(values)
    return top + math.log(sum(math.exp(lam * (v - top)) for v in values) / len(values)) / lam


def maximum(values: Sequence[float], lam: float) -> float:
    """The limit of the soft backup at lambda = infinity."""
    return max(values)


BACKUPS: dict[str, Callable[[Sequence[float], float], float]] = {"soft": log_mean_exp, "max": maximum}


def visit(tree: Tree, node: int) -> None:
    """Count a rollout that comes through the node, at the node and above it."""
    for n in tree.lineage(node):
        tree.visits[n] += 1


def back_up(tree: Tree, leaf: int, reward: float, backup: str, lam: float) -> None:
    """Write down a leaf's reward, and the values of all nodes above it.

    Raises ValueError for a reward that is not finite.
    """
    if not math.isfinite(reward):
        raise UserError(f"the reward of a leaf is {reward}: a tree needs finite ones")
    tree.values[leaf] = reward
    for n in list(tree.lineage(leaf))[1:]:
        tree.values[n] = BACKUPS[backup]([tree.values[c] for c in tree.valued(n)], lam)


def revalue(tree: Tree, backup: str, lam: float) -> None:
    """The values of all nodes above the leaves, from the leaves up."""
    for node in reversed(range(len(tree))):  # children come after their parents
        if not tree.is_leaf(node) and (valued := tree.valued(node)):
            tree.values[node] = BACKUPS[backup]([tree.values[child] for child in valued], lam)


def spread(tree: Tree) -> float:
    """The standard deviation of the leaves' rewards; 1 if no two differ, so that no scale is known.

    Its sums are rounded once, so that it does not depend on the leaves' order.
    """
    rewards = [tree.values[leaf] for leaf in tree.leaves]
    if len(set(rewards)) < 2:
        return 1.0
    mean = math.fsum(rewards) / len(rewards)
    return math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / len(rewards))


# ------------------------------------------------------------------------------------------------ which child
@dataclass(frozen=True)
class Rule:
    """The rule by which a tree grows.

    policy: of `POLICIES`. lam: lambda. widening, growth: a node visited N times may have widening * N^growth children.
    exploration: c of "uct".
    """

    policy: str
    lam: float
    widening: float
    growth: float
    exploration: float


def boltzmann(tree: Tree, node: int, rule: Rule, u: float) -> int:
    """A child with probability proportional to e^(lambda v): DTS."""
    children = tree.valued(node)
    return children[chosen(softmax([tree.values[c] for c in children], rule.lam), u)]


def uct(tree: Tree, node: int, rule: Rule, u: float) -> int:
    """The child of the largest v + c sqrt(log N / N(child)), the eldest of equals: DTS*."""
    log_visits = math.log(tree.visits[node])

    def bound(child: int) -> float:
        return tree.values[child] + rule.exploration * math.sqrt(log_visits / tree.visits[child])

    return max(tree.valued(node), key=bound)


def uniform(tree: Tree, node: int, rule: Rule, u: float) -> int:
    """Any child. The tree's shape then knows nothing of the rewards, and E[e^(lambda v)] = e^(lambda V) at every node.

    Ours. Both policies of the paper come back to a child that was lucky, and correct its value down, and leave alone
    one that was not: their e^(lambda v) is too small on average.
    """
    children = tree.valued(node)
    return children[int(u * len(children))]


Policy = Callable[[Tree, int, Rule, float], int]  # (tree, node, rule, a uniform number in [0, 1)) -> its child
POLICIES: dict[str, Policy] = {f.__name__: f for f in (boltzmann, uct, uniform)}


def is_open(tree: Tree, node: int, rule: Rule) -> bool:
    """Progressive widening: whether the node may have one more child."""
    return len(tree.children[node]) < rule.widening * tree.visits[node] ** rule.growth


def select(tree: Tree, rule: Rule, uniforms: Sequence[float]) -> int:
    """The node where the next rollout starts: the first that may have another child, or a leaf.

    uniforms: a number in [0, 1) for each turn on the way, `tree.depth` at most.
    """
    node = ROOT
    while not tree.is_leaf(node) and not is_open(tree, node, rule) and tree.valued(node):
        node = POLICIES[rule.policy](tree, node, rule, uniforms[tree.depths[node]])
    return node


# ------------------------------------------------------------------------------------------------ samples
def descend(tree: Tree, lam: float, uniforms: Sequence[float]) -> int:
    """A leaf drawn by the values, without the network: softmax(lambda v) at every node; argmax if lam is infinite.

    With soft values a leaf of reward r has the probability e^(lambda (r - v(root))) times 1 / (number of children) of
    every node on its way. That makes it a sample of the target, which a leaf as it was visited is not.
    """
    node = ROOT
    while not tree.is_leaf(node):
        children = tree.valued(node)
        shares = softmax([tree.values[c] for c in children], lam)
        node = children[chosen(shares, uniforms[tree.depths[node]])]
    return node


def probabilities(tree: Tree, lam: float) -> dict[int, float]:
    """The probability with which `descend` ends in each leaf; they sum to one."""
    found = {ROOT: 1.0}
    for node in range(len(tree)):  # parents come before their children
        if node in found and not tree.is_leaf(node):
            children = tree.valued(node)
            shares = softmax([tree.values[c] for c in children], lam)
            found |= {c: found[node] * share for c, share in zip(children, shares, strict=True)}
    return {leaf: found[leaf] for leaf in tree.leaves}


def softmax(values: Sequence[float], lam: float) -> list[float]:
    """Shares proportional to e^(lambda v); all for the eldest of the largest if lam is infinite."""
    top = max(values)
    if math.isinf(lam):
        return [float(i == values.index(top)) for i in range(len(values))]
    weights = [math.exp(lam * (v - top)) for v in values]
    total = sum(weights)
    return [w / total for w in weights]


def chosen(shares: Sequence[float], u: float) -> int:
    """The index that u in [0, 1) falls on, by the cumulated shares."""
    return min(bisect(list(accumulate(shares)), u), len(shares) - 1)


# ------------------------------------------------------------------------------------------------ as tensors
class Packed(NamedTuple):
    """A tree as tensors: a row for each node, of the states for each node but the root."""

    parents: Tensor
    visits: Tensor
    values: Tensor
    x: Tensor
    having: Mapping[str, Tensor] = {}  # which states have a memory of that name: pure noise has none
    memory: Mapping[str, Tensor] = {}  # a row for each of those


def packed(tree: Tree) -> Packed:
    """All of a tree in which every rollout has ended."""
    states = [state for state in tree.states if state is not None]
    keys = sorted({key for state in states for key in state.memory})
    having = {key: [i for i, state in enumerate(states) if key in state.memory] for key in keys}
    return Packed(
        parents=torch.tensor(tree.parents),
        visits=torch.tensor(tree.visits),
        values=torch.tensor(tree.values, dtype=torch.float64),
        x=torch.cat([state.x for state in states]),
        having={key: torch.tensor(rows) for key, rows in having.items()},
        memory={key: torch.cat([states[i].memory[key] for i in rows]) for key, rows in having.items()},
    )


def unpacked(found: Packed, depth: int) -> Tree:
    """The tree that `packed` took apart."""
    memories: list[dict[str, Tensor]] = [{} for _ in found.x]
    for key, rows in found.having.items():
        for i, value in zip(rows.tolist(), found.memory[key].split(1), strict=True):
            memories[i][key] = value
    tree = Tree(depth)
    for parent, x, memory in zip(found.parents.tolist()[1:], found.x.split(1), memories, strict=True):
        tree.add(parent, Path(x, memory=memory))
    tree.values, tree.visits = found.values.tolist(), found.visits.tolist()
    return tree
