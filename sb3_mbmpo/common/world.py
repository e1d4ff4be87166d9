"""The processes that learn together, as a value; a single process is the trivial case, which communicates with nobody.

``torch.distributed`` starts and connects them (``torchrun``). Sums over all tasks are those of each process, added in double
precision: what the number of processes changes in them, rounding to single precision removes.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch as th
import torch.distributed as dist

Result = TypeVar("Result")


class ProcessLostError(RuntimeError):
    """Another process of the group has ended, or cannot be reached."""


@dataclass(frozen=True)
class World:
    """
    The processes of ``torch.distributed``'s default group.

    :param rank: number of this process; process 0 has the real environment, the callbacks, the logger and the files
    :param size: number of processes
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> "World":
        """Return the world of the process group, if there is one."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def broadcast(self, value: Any = None) -> Any:
        """Return the value of process 0, which must be picklable."""
        if self.size == 1:
            return value
        values = [value]
        _talk(lambda: dist.broadcast_object_list(values, src=0))
        return values[0]

    def gather(self, rows: th.Tensor, counts: Sequence[int]) -> th.Tensor:
        """
        Return the rows of all processes, in their order.

        :param rows: those of this process (``counts[rank]``, ...)
        :param counts: number of rows of each process
        """
        if self.size == 1:
            return rows
        return self.gather_all([rows], counts)[0]

    def gather_all(self, tensors: Sequence[th.Tensor], counts: Sequence[int]) -> list[th.Tensor]:
        """Return ``gather`` of several tensors with the same number of rows, in one message."""
        if self.size == 1:
            return list(tensors)
        own = [x.detach().contiguous().reshape(len(x), -1).view(th.uint8) for x in tensors]
        widths = [x.shape[1] for x in own]
        # All processes must send equally much
        message = own[0].new_zeros((max(counts), sum(widths)))
        th.cat(own, dim=1, out=message[: counts[self.rank]])
        parts = [th.empty_like(message) for _ in counts]
        _talk(lambda: dist.all_gather(parts, message))
        columns = th.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).split(widths, dim=1)
        return [
            column.clone(memory_format=th.contiguous_format).view(x.dtype).reshape(-1, *x.shape[1:])
            for column, x in zip(columns, tensors, strict=True)
        ]

    def mean(self, rows: th.Tensor, n_rows: int) -> th.Tensor:
        """
        Return the mean of the rows of all processes, in double precision, where the order of a sum hardly matters.

        :param rows: those of this process (rows, .)
        :param n_rows: number of rows of all processes
        :return: (.) float64
        """
        total = rows.sum(0, dtype=th.float64)
        if self.size > 1:
            total = self.gather(total.unsqueeze(0), [1] * self.size).sum(0)
        return total / n_rows

    def largest(self, number: int) -> int:
        """Return the largest number of all processes."""
        return number if self.size == 1 else int(self.gather(th.tensor([number]), [1] * self.size).max())

    @contextmanager
    def left_on_error(self) -> Iterator[None]:
        """Leave the group after an error in the block: the other processes do not wait for this one any more."""
        try:
            yield
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """End the group for this process."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def _talk(exchange: Callable[[], Result]) -> Result:
    try:
        return exchange()
    except RuntimeError as error:
        raise ProcessLostError(
            f"Another process has ended, or cannot be reached: its own output says why. ({str(error).splitlines()[0]})"
        ) from error


ALONE = World()


@contextmanager
def process_group() -> Iterator[World]:
    """
    Join the processes that ``torchrun`` has started, if it has, inside the block.

    :return: a context manager that yields the world
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or not dist.is_torchelastic_launched():
        yield ALONE
        return
    # The others wait for process 0's real steps, however slow; processes that end are noticed without a time-out
    dist.init_process_group("gloo", timeout=timedelta(days=365))
    try:
        yield World.current()
    finally:
        World.current().leave()
