"""Diffusion tree sampling and search: the network's side of `guidance.search.tree` (https://arxiv.org/abs/2506.20701).

A rollout starts where the tree may grow, draws the base sampler down to clean latents, and asks for one reward; every
state that it passes at a branching level becomes a node. The trees of all groups advance together: at each depth, the
rollouts that are there make one batch.
"""

import math
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import torch
from torch import Tensor

from guidance.codec import decode, encode
from guidance.search.problem import Graph, Problem, Saved, State, Weighted
from guidance.search.tree import (
    BACKUPS,
    POLICIES,
    ROOT,
    Packed,
    Rule,
    Tree,
    back_up,
    descend,
    packed,
    probabilities,
    revalue,
    select,
    spread,
    unpacked,
    visit,
)
from solvers.denoiser import Path
from solvers.errors import Caution, UserError
from solvers.ranges import Many, NotNegative, Positive, Range, Ranged

EDGE, SELECT, DESCEND = 1, 2, 3  # what the noise is for: the first number of its key
UNITS = ("reward", "sd")
NARROW, WIDE = (1.0, 0.5), (2.0, 0.8)  # widening and growth: ours, and the paper's
BRANCHES = 5  # the paper's for images
MANY = 1000  # images of a tree, below which the paper's mostly draws new noise


@dataclass(frozen=True)
class DTS(Ranged):
    """Diffusion tree sampling.

    inverse_temperature: lambda in the target p(x0) e^(lambda r(x0)). policy: the child a rollout follows, "boltzmann"
    (the paper's), "uct", or "uniform" (ours: e^(lambda v) of the root is then unbiased). backup: "soft" or "max".
    widening, growth: a node visited N times may have widening * N^growth children; None is 1 and 0.5 if the budget
    pays for fewer than 1,000 images of each tree or there is none, and the paper's 2 and 0.8 above. exploration: c of
    "uct"; None is 1 / lambda. unit: what lambda and c are given in: "reward", the reward's own unit, or "sd" (ours),
    the standard deviation of the tree's rewards so far, so that the search is the same whatever the reward's scale.
    branches: levels at which trees branch, pure noise among them, equally spaced; None is 5, or every step of a shorter
    run. parallel: rollouts of a tree at once.
    return_best_seen: a state's sample is the leaf of the largest reward; False: the one that a descent by the values
    ends in, drawn from the target ("uct": of the largest values).

    Raises UserError for an invalid value.
    """

    inverse_temperature: Positive = 10.0
    policy: str = "boltzmann"
    backup: str = "soft"
    widening: Positive | None = WIDE[0]
    growth: Annotated[float, Range(0, 1, above=True)] | None = WIDE[1]
    exploration: NotNegative | None = None
    branches: Many | None = None
    parallel: Many = 1
    return_best_seen: bool = True
    unit: str = "reward"

    def __post_init__(self):
        super().__post_init__()
        families: dict[str, Collection[str]] = {"policy": POLICIES, "backup": BACKUPS, "unit": UNITS}
        for kind, known in families.items():
            if (name := getattr(self, kind)) not in known:
                raise UserError(f"no {kind} {name!r}; known: {', '.join(known)}")

    def rule(self, tree: Tree) -> Rule:
        """The rule by which a tree grows on, with lambda and c in the reward's own unit."""
        assert self.widening is not None and self.growth is not None, "`shaped` was not applied"
        exploration = 1 / self.inverse_temperature if self.exploration is None else self.exploration
        unit = spread(tree) if self.unit == "sd" else 1.0
        return Rule(self.policy, self.inverse_temperature / unit, self.widening, self.growth, exploration * unit)


@dataclass(frozen=True)
class DTSStar(DTS):
    """Diffusion tree search, DTS*: it looks for the largest reward, where DTS draws samples. The fields are DTS's.

    The defaults are ours: the largest reward below a node is its value, c is half the standard deviation of the rewards
    so far, and a tree of fewer than 1,000 images is narrow. `DTSStarPaper` has the paper's.
    """

    policy: str = "uct"
    backup: str = "max"
    widening: Positive | None = None
    growth: Annotated[float, Range(0, 1, above=True)] | None = None
    exploration: NotNegative | None = 0.5
    unit: str = "sd"


@dataclass(frozen=True)
class DTSStarPaper(DTSStar):
    """Diffusion tree search, DTS*, with the paper's soft values and widening, lambda and c in the reward's own unit."""

    backup: str = "soft"
    widening: Positive | None = WIDE[0]
    growth: Annotated[float, Range(0, 1, above=True)] | None = WIDE[1]
    exploration: NotNegative | None = None
    unit: str = "reward"


def dts(problem: Problem, config: DTS | None = None, saved: Saved | None = None) -> Iterator[State]:
    """Grow a tree for each group: the state after every round of `config.parallel` rollouts.

    It ends when no group can afford its next rollout; without a budget it goes on until the caller stops. `saved` is
    what an earlier state's `saved()` gave; the search then goes on exactly as it would have.
    A state's callables speak of the trees as they are when they are called.

    Raises ValueError for a deterministic sampler, more branches than steps, and a saved search of other settings; warns
    if the budget ends before the root is full.
    """
    config = config or DTS()
    problem.needs_noise("a tree")
    if (config.branches or 1) > problem.steps:
        raise UserError(
            f"{config.branches} branches and {problem.steps} steps: a tree branches once a step at most; lower branches"
        )
    check_budget(problem, shaped(problem, config))
    return _grown(Forest(problem, config), saved)


def dts_star(problem: Problem, config: DTSStar | None = None, saved: Saved | None = None) -> Iterator[State]:
    """`dts` that follows the largest upper bounds (UCT)."""
    return dts(problem, config or DTSStar(), saved)


def images(problem: Problem) -> int | None:
    """The whole rollouts of each tree that the budgets pay for; None without a budget."""
    budgets = ((problem.nfe_budget, problem.cost()), (problem.reward_budget, 1))
    return min((budget // cost for budget, cost in budgets if budget is not None), default=None)


def shaped(problem: Problem, config: DTS) -> DTS:
    """The settings with the branches that the steps allow, and the widening and growth that the budget asks for, where
    they are None."""
    paid = images(problem)
    widening, growth = WIDE if paid is not None and paid >= MANY else NARROW
    branches = config.branches or min(BRANCHES, problem.steps)
    return replace(config, branches=branches, widening=config.widening or widening, growth=config.growth or growth)


def check_budget(problem: Problem, config: DTS) -> None:
    """Warns if every rollout that the budgets pay for starts at the root: such a tree is best-of-n."""
    paid, widening, growth = images(problem), config.widening or 1, config.growth or 1
    narrower = "" if (widening, growth) == NARROW else ", or take widening 1 and growth 0.5"
    if paid and all(n < widening * (n + 1) ** growth for n in range(paid)):
        warnings.warn(
            f"the budget pays for {paid} rollouts, and with widening {widening:g} and growth {growth:g} "
            f"all of them start from new noise, as those of best-of-n do: raise it{narrower}",
            Caution,
            3,
        )


def _grown(forest: "Forest", saved: Saved | None) -> Iterator[State]:
    if saved is not None:
        forest.restore(saved)
    grew = False
    while forest.grow():
        grew = True
        yield forest.state()
    if saved is not None and not grew:  # resumed at its end
        yield forest.state()
    if not any(tree.rollouts for tree in forest.trees):
        problem = forest.problem
        raise UserError(
            f"one rollout costs {problem.cost()} NFEs and a reward call: more than the budget "
            f"({problem.nfe_budget} NFEs, {problem.reward_budget} reward calls)"
        )


class Rollout:
    """A rollout on its way down: `node` is the next to be reached."""

    def __init__(self, group: int, tree: Tree, node: int):
        self.group, self.tree, self.node = group, tree, node

    @property
    def depth(self) -> int:
        return self.tree.depths[self.node]

    @property
    def start(self) -> Path:
        """The state that the way to `node` begins at."""
        state = self.tree.states[self.tree.parents[self.node]]
        assert state is not None  # only the root has none, and from there `Problem.start` draws
        return state

    @property
    def key(self) -> tuple[int, ...]:
        """The key of the noise on the way to `node`, which depends on its place in the tree alone."""
        return EDGE, *self.tree.address(self.node)

    def arrive(self, state: Path) -> None:
        self.tree.states[self.node] = state
        if not self.tree.is_leaf(self.node):
            self.node = self.tree.add(self.node, None)


class Forest:
    """The trees of a search, one for each group."""

    def __init__(self, problem: Problem, config: DTS):
        self.problem, self.given, self.config = problem, config, shaped(problem, config)
        assert self.config.branches is not None
        self.stops = branching_levels(problem.steps, self.config.branches)
        self.trees = [Tree(len(self.stops)) for _ in problem.seeds]
        self.best: list[int | None] = [None] * len(self.trees)

    def grow(self) -> bool:
        """One round; False if no tree could."""
        before = [tree.rollouts for tree in self.trees]
        rollouts = [rollout for group in range(len(self.trees)) for rollout in self.planned(group)]
        for depth in range(1, len(self.stops) + 1):
            self.advance([rollout for rollout in rollouts if rollout.depth == depth], depth)
        if rollouts:
            self.reward(rollouts)
        return [tree.rollouts for tree in self.trees] != before

    def planned(self, group: int) -> list[Rollout]:
        """The group's next rollouts, as far as its budget goes. One that ends in a leaf costs nothing."""
        tree, nfe = self.trees[group], 0
        rule, found = self.config.rule(tree), list[Rollout]()
        for _ in range(self.config.parallel):
            uniforms = self.problem.uniform(group, SELECT, tree.rollouts, n=tree.depth).tolist()
            node = select(tree, rule, uniforms)
            if not tree.is_leaf(node):
                nfe += self.problem.cost(self.stops[max(tree.depths[node] - 1, 0)])
                if not self.problem.affords(nfe, len(found) + 1)[group]:
                    break
            visit(tree, node)
            if not tree.is_leaf(node):
                found.append(Rollout(group, tree, tree.add(node, None)))
        return found

    def advance(self, rollouts: Sequence[Rollout], depth: int) -> None:
        """Draw the base sampler down to the nodes at `depth`."""
        if not rollouts:
            return
        if depth == 1:
            paths = [self.problem.start(rollout.group, *rollout.key) for rollout in rollouts]
        else:
            paths = rows(self.drawn(rollouts, self.stops[depth - 2], self.stops[depth - 1]))
        for rollout, path in zip(rollouts, paths, strict=True):
            rollout.arrive(kept(path))

    def drawn(self, rollouts: Sequence[Rollout], start: int, stop: int) -> Path:
        path, groups = joined([r.start for r in rollouts], self.problem.device), groups_of(rollouts)
        keys = [(rollout.group, *rollout.key) for rollout in rollouts]
        for i in range(start, stop):
            noise = torch.cat([self.problem.noise(*key, i) for key in keys])
            path = self.problem.move(path, self.problem.predicted(path, i, groups), i, noise)
        return path

    def reward(self, rollouts: Sequence[Rollout]) -> None:
        """Score the leaves, and back their rewards up."""
        leaves = joined([leaf_of(r.tree, r.node) for r in rollouts], self.problem.device).x
        rewards = self.problem.score(leaves, groups_of(rollouts)).tolist()
        for r, reward in zip(rollouts, rewards, strict=True):
            self.back_up(r.tree, r.node, reward)
            best = self.best[r.group]
            if best is None or reward > r.tree.values[best]:
                self.best[r.group] = r.node

    def back_up(self, tree: Tree, leaf: int, reward: float) -> None:
        """The values of all nodes with one more reward; in units of a spread that it changed, each is made anew."""
        back_up(tree, leaf, reward, self.config.backup, self.config.rule(tree).lam)
        if self.config.unit == "sd" and self.config.backup == "soft":
            revalue(tree, self.config.backup, self.config.rule(tree).lam)

    # ------------------------------------------------------------------------------------------ what is told

    def state(self) -> State:
        found = self.problem.nothing_yet()
        for group, tree in enumerate(self.trees):
            if (leaf := self.answer(group)) is not None:
                found.x0[group] = leaf_of(tree, leaf).x[0].to(found.x0)
                found.reward[group] = tree.values[leaf]
        nfe, reward_calls, gradients = (account.clone() for account in self.problem.spent)
        return State(*found, nfe, reward_calls, gradients, self.weighted, self.graph, self.saved)

    def answer(self, group: int) -> int | None:
        """The leaf that a state tells; None before there is one."""
        if self.config.return_best_seen or self.best[group] is None:
            return self.best[group]
        tree = self.trees[group]
        uniforms = self.problem.uniform(group, DESCEND, tree.rollouts, n=tree.depth).tolist()
        return descend(tree, math.inf if self.config.policy == "uct" else self.config.rule(tree).lam, uniforms)

    def weighted(self) -> Weighted:
        """All leaves, weighted by the probability that a descent ends in them."""
        found = [(tree, group, self.shares(tree)) for group, tree in enumerate(self.trees) if tree.leaves]
        x = [leaf_of(tree, leaf).x for tree, _, shares in found for leaf in shares]
        groups = [group for _, group, shares in found for _ in shares]
        weights = torch.tensor([share for *_, shares in found for share in shares.values()], dtype=torch.float64)
        rewards = [tree.values[leaf] for tree, _, shares in found for leaf in shares]
        x0 = torch.cat(x) if x else torch.zeros(0, *self.problem.shape)
        return Weighted(x0, torch.tensor(groups), weights.log(), torch.tensor(rewards, dtype=torch.float64))

    def shares(self, tree: Tree) -> dict[int, float]:
        """The probability that a descent ends in each leaf."""
        return probabilities(tree, math.inf if self.config.backup == "max" else self.config.rule(tree).lam)

    def graph(self) -> Graph:
        """All nodes but the roots, which stand for no state."""
        parts, first = [], 0
        for group, tree in enumerate(self.trees):
            parts.append(nodes_of(tree, group, self.stops, first))
            first += len(tree) - 1
        return Graph(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def saved(self) -> Saved:
        tensors = encode({str(group): packed(tree) for group, tree in enumerate(self.trees) if len(tree) > 1}).tensors
        spent = {name: account.tolist() for name, account in self.problem.spent._asdict().items()}
        return Saved(tensors, {"search": self.settings, "spent": spent, "best": list(self.best)})

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that a search which goes on must share with the saved one."""
        return {"seeds": list(map(int, self.problem.seeds)), "levels": len(self.problem.levels), **asdict(self.config)}

    def restore(self, saved: Saved) -> None:
        before = {"unit": "reward", **saved.info["search"]}  # the one unit there was at first
        open_ones = {name: before[name] for name in ("widening", "growth") if getattr(self.given, name) is None}
        self.config = replace(self.config, **open_ones)  # a larger budget does not change the shape of a tree
        for name, value in self.settings.items():
            if before.get(name) != value:
                raise UserError(f"the saved tree has {name} {before.get(name)}, this search {value}")
        for group, found in decode(dict[str, Packed], saved.tensors).items():
            self.trees[int(group)] = unpacked(found, len(self.stops))
        self.best = list(saved.info["best"])
        for name, account in self.problem.spent._asdict().items():
            account.copy_(torch.tensor(saved.info["spent"][name]))


def branching_levels(steps: int, branches: int) -> list[int]:
    """The levels at which the nodes of a tree are: `branches` equally spaced ones from pure noise on, and the last.

    50 steps and 5 branches: 0, 10, 20, 30, 40, 50, the paper's.
    """
    return [round(i * steps / branches) for i in range(branches + 1)]


def nodes_of(tree: Tree, group: int, stops: Sequence[int], first: int) -> Graph:
    """A tree without its root, whose nodes are numbered from `first` on."""
    parent = torch.tensor(tree.parents[1:], dtype=torch.int64)
    level = torch.tensor([stops[depth - 1] for depth in tree.depths[1:]], dtype=torch.int64)
    value = torch.tensor(tree.values[1:], dtype=torch.float64)
    return Graph((parent - 1 + first).where(parent != ROOT, -1), level, torch.full_like(parent, group), value)


def groups_of(rollouts: Sequence[Rollout]) -> Tensor:
    return torch.tensor([rollout.group for rollout in rollouts])


def leaf_of(tree: Tree, leaf: int) -> Path:
    state = tree.states[leaf]
    assert state is not None  # a rollout ended there
    return state


def joined(paths: Sequence[Path], device: Any) -> Path:
    """Paths of one depth, which remember the same, as a batch."""
    memory = {key: torch.cat([path.memory[key] for path in paths]).to(device) for key in paths[0].memory}
    return Path(torch.cat([path.x for path in paths]).to(device), memory=memory)


def rows(path: Path) -> list[Path]:
    return [path[i : i + 1] for i in range(len(path.x))]


def kept(path: Path) -> Path:
    """On the CPU, in storage of its own; a step needs no x0."""
    return Path(path.x.cpu().clone(), memory={key: value.cpu().clone() for key, value in path.memory.items()})
