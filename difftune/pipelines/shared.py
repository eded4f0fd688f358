"""Work that is divided among the processes which were launched together: each does its share, and all have the whole.

Under `accelerate launch` every process runs the same command. What is divided are whole batches, so that an image has
the bits that one process gives it; the main process alone claims the folder and writes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor
from torch.utils._pytree import tree_map

from difftune.errors import ERRORS, RunError
from difftune.files.claim import Claim, claimed
from difftune.processes import gathered, process

Job = TypeVar("Job")
Made = TypeVar("Made")
Fault = Exception | None


def own_share(jobs: Sequence[Job]) -> list[Job]:
    """This process's share: every n-th job, of n processes."""
    return list(jobs[process().process_index :: process().num_processes])


def done_by_all(jobs: Sequence[Callable[[], Made]]) -> list[Made]:
    """The results of all jobs in their order, each done by one process; a process's error is raised in all."""
    if process().num_processes == 1:
        return [job() for job in jobs]
    everyone = told_by_each(lambda: [job() for job in own_share(jobs)])
    return [everyone[i % len(everyone)][i // len(everyone)] for i in range(len(jobs))]


def made_by_main(make: Callable[[], Made]) -> Made:
    """What the main process makes, in every process; so is its error."""
    found = told_by_each(lambda: make() if process().is_main_process else None)[0]
    return found  # type: ignore[return-value]


def told_by_each(make: Callable[[], Made]) -> list[Made]:
    """What each process makes, in every process, tensors on its own device. Raises the first process's error in all."""
    if process().num_processes == 1:
        return [make()]
    made, fault = None, None
    try:
        made = make()
    except Exception as error:
        fault = error
    found = gathered((_told(fault), tree_map(_to_host, made)))
    if fault is not None:
        raise fault
    for theirs, _ in found:
        if theirs is not None:
            raise theirs
    return [tree_map(_from_host, value) for _, value in found]


@dataclass(frozen=True)
class OnHost:
    """A tensor on its way from one process's device to another's."""

    tensor: Tensor


def _to_host(value: Any) -> Any:
    return OnHost(value.cpu()) if isinstance(value, Tensor) and value.device.type != "cpu" else value


def _from_host(value: Any) -> Any:
    return value.tensor.to(process().device) if isinstance(value, OnHost) else value


def _told(fault: Fault) -> Fault:
    """An error as the other processes raise it."""
    if fault is None or isinstance(fault, ERRORS):
        return fault
    return RunError(f"another of the processes failed with {type(fault).__name__}: {' '.join(str(fault).split())}")


@contextmanager
def entered_by_main(context: AbstractContextManager[Made]) -> Iterator[Made | None]:
    """A context that the main process enters, who alone is given what it holds; if that cannot, all are told."""
    held: list[Made] = []
    with ExitStack() as stack:
        told_by_each(lambda: held.append(stack.enter_context(context)) if process().is_main_process else None)
        yield held[0] if held else None


Opening = Callable[[Any], AbstractContextManager[Claim]]


def claimed_by_main(folder: Any, opening: Opening = claimed) -> AbstractContextManager[Claim | None]:
    """The folder for all processes, claimed by the main one alone. opening: `claimed`, or `fresh`."""
    return entered_by_main(opening(folder))
