"""Training of stacked members in several threads, each of which does the same amount of work.

The rule is McNaughton's (1959): put the members in a row and cut it into equal pieces, one per thread. A member that is cut is
trained by two threads. The first begins with it, and trains it on the first batches of an epoch; the second finishes with it,
and trains it on the last batches. By then the first thread is done, so the two never overlap. If only whole members were
assigned, 5 members on 2 threads would be at most 5/3 times faster than on one; this way they are 1.86 times faster. The
weights are the same as with one thread. Groups of members of small networks are cut between groups only.

Legend of shapes: ``M`` members, ``A`` members that still train, ``B`` rows of a batch.
"""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from fractions import Fraction
from functools import partial
from threading import Event
from typing import Any, NamedTuple

import torch as th

from sb3_mbmpo.common.threads import even_shares, in_parallel, worthwhile_threads

# (parameters of some members, each [A, ...]; rows of each of them [A, B] long) -> loss of each of them [A]
MemberLoss = Callable[[Sequence[th.Tensor], th.Tensor], th.Tensor]
# Cost of a further thread to the others at each batch, expressed as the work of the networks that takes as long
FLOPS_PER_THREAD = 32e6
# A member whose batch is less work than this is not handed over: alone, it needs as many calls as several members together
MIN_FLOPS_TO_HAND_OVER = 128e6


class Piece(NamedTuple):
    """
    Part of a pass: neighbouring groups, and a range of their steps.

    :param first: number of the first group
    :param last: number after the last group
    :param begin: where the range of steps begins, 0 to 1
    :param end: where it ends, 0 to 1
    """

    first: int
    last: int
    begin: Fraction
    end: Fraction


def timetable(n_groups: int, n_threads: int, hand_over: bool = True) -> list[list[Piece]]:
    """
    Plan a pass by McNaughton's wrap-around rule, see the top of this file.

    :param n_groups: number of groups
    :param n_threads: number of threads, at most that of groups, so that the two parts of a group never overlap
    :param hand_over: False: cut between groups only, as evenly as possible
    :return: the pieces of each thread, in order
    """
    table = []
    for thread in range(n_threads):
        start, stop = (Fraction(i * n_groups, n_threads) for i in (thread, thread + 1))
        first, last = math.ceil(start), math.floor(stop) if hand_over else math.ceil(stop)
        pieces = [Piece(first, last, Fraction(0), Fraction(1))]
        if hand_over:
            pieces.insert(0, Piece(first - 1, first, Fraction(0), first - start))
            pieces.append(Piece(last, last + 1, 1 - (stop - last), Fraction(1)))
        table.append([piece for piece in pieces if piece.first < piece.last and piece.begin < piece.end])
    return table


class ParallelTraining:
    """
    The parameters of all members, divided among threads for training.

    A group of members is trained as it would be alone: its weights do not depend on the number of threads.

    :param parameters: stacked parameters, each [M, ...], trained in place
    :param optimizer: an elementwise optimiser of these parameters; training continues from its state
    :param loss_fn: differentiable loss of some members
    :param batch_size: rows per member and step
    :param n_threads: maximum number of threads
    :param groups: the members that are computed together; others are not trained. None: each alone
    """

    def __init__(
        self,
        parameters: Sequence[th.Tensor],
        optimizer: th.optim.Optimizer,
        loss_fn: MemberLoss,
        batch_size: int,
        n_threads: int,
        groups: Sequence[slice] | None = None,
    ) -> None:
        self._parameters, self._optimizer, self._loss_fn, self._batch_size = parameters, optimizer, loss_fn, batch_size
        # Forward, and backward to the inputs and to the weights, with a multiplication and an addition each
        flops = 6 * batch_size * sum(parameter[0].numel() for parameter in parameters)
        groups = even_shares(len(parameters[0]), len(parameters[0])) if groups is None else groups
        n_members = groups[-1].stop - groups[0].start
        self._n_threads = min(n_threads, len(groups), worthwhile_threads(n_members * flops, FLOPS_PER_THREAD))
        self._timetable = timetable(len(groups), self._n_threads, hand_over=flops >= MIN_FLOPS_TO_HAND_OVER)
        self._shares = [_Share(parameters, optimizer, group) for group in groups]

    def epoch(self, rows: th.Tensor, active: th.Tensor) -> th.Tensor:
        """
        Train the active members for one epoch, with one optimiser step per batch.

        :param rows: row numbers in the order in which each active member sees them, [A, rows] long
        :param active: numbers of the members that train, ascending, [A] long
        :return: mean loss of each active member over its rows, [A]
        """
        passes = [_Pass(share, rows, active, self._batch_size) for share in self._shares]

        def work(pieces: Sequence[Piece]) -> None:
            for piece in pieces:
                for one in passes[piece.first : piece.last]:
                    one.train(self._loss_fn, piece.begin, piece.end)

        in_parallel([partial(work, pieces) for pieces in self._timetable], self._n_threads)
        return th.cat([one.total for one in passes]) / rows.shape[1]

    def mean_loss(self, rows: th.Tensor, active: th.Tensor, loss_fn: MemberLoss | None = None) -> th.Tensor:
        """
        Evaluate the active members, in batches to limit memory.

        :param rows: row numbers of each active member, [A, rows] long
        :param active: numbers of these members, ascending, [A] long
        :param loss_fn: another measure than the loss of the training
        :return: mean loss of each active member over its rows, [A]
        """
        measure = self._loss_fn if loss_fn is None else loss_fn

        @th.no_grad()  # PyTorch keeps this setting for each thread
        def of_batch(share: _Share, members: th.Tensor, batch: th.Tensor) -> th.Tensor:
            return measure(of_members(share.parameters, members), batch) * (batch.shape[1] / rows.shape[1])

        jobs, n_batches = [], -(-rows.shape[1] // (4 * self._batch_size))
        for share in self._shares:
            here = share.has(active)
            if here.any():
                batches = rows[here].split(4 * self._batch_size, dim=1)
                jobs += [partial(of_batch, share, active[here] - share.first, batch) for batch in batches]
        losses = in_parallel(jobs, self._n_threads)
        return th.cat([th.stack(losses[i : i + n_batches]).sum(0) for i in range(0, len(losses), n_batches)])

    def finish(self) -> None:
        """Copy the state of the shares' optimisers back to the optimiser of all members."""
        for i, parameter in enumerate(self._parameters):
            merged = self._optimizer.state[parameter]
            for share in self._shares:
                for name, value in share.optimizer.state[share.parameters[i]].items():
                    if is_stacked(value, share.parameters[i]):
                        # Other groups' averages stay as they were
                        whole = merged.setdefault(name, th.zeros_like(parameter, requires_grad=False))
                        whole[share.group] = value
                    else:  # the number of steps: that of the group that trained longest
                        merged[name] = max(merged.get(name, value), value, key=float)


class _Pass:
    """
    A group's members in one epoch. A thread may leave it after any batch, and another one continue.

    :param share: the group
    :param rows: row numbers of all active members [A, rows] long
    :param active: numbers of these members [A] long
    :param batch_size: rows per member and step
    """

    def __init__(self, share: "_Share", rows: th.Tensor, active: th.Tensor, batch_size: int) -> None:
        here = share.has(active)
        self._share, self._members = share, active[here] - share.first
        self._batches = rows[here].split(batch_size, dim=1) if len(self._members) > 0 else ()
        self._handed_over = Event()
        # Losses of these members, summed over the rows so far
        self.total = th.zeros(len(self._members), device=active.device)

    def train(self, loss_fn: MemberLoss, begin: Fraction, end: Fraction) -> None:
        """Train on a range of the batches, 0 to 1, after the thread that trains on those before."""
        if begin > 0:
            self._handed_over.wait()
        first, last = round(begin * len(self._batches)), round(end * len(self._batches))
        try:
            self._share.train(loss_fn, self._members, self._batches[first:last], self.total)
        finally:
            # Release the waiting thread even after an error
            self._handed_over.set()


class _Share:
    """
    Neighbouring members that train together, with their own optimiser, in one thread at a time.

    :param parameters: parameters of all members; those of the share are views of them
    :param optimizer: optimiser of all members; the share continues from its state without changing it
    :param group: the members
    """

    def __init__(self, parameters: Sequence[th.Tensor], optimizer: th.optim.Optimizer, group: slice) -> None:
        self.group, self.first = group, group.start
        # The same memory, but not views for autograd: views share a version counter, which is not made for several threads
        self.parameters = [parameter.data[group].data.requires_grad_() for parameter in parameters]
        same_class: Callable[..., th.optim.Optimizer] = type(optimizer)
        self.optimizer = same_class([{**optimizer.param_groups[0], "params": self.parameters}])
        for whole, own in zip(parameters, self.parameters, strict=True):
            for name, value in optimizer.state.get(whole, {}).items():
                self.optimizer.state[own][name] = value[group].clone() if is_stacked(value, whole) else deepcopy(value)

    def has(self, members: th.Tensor) -> th.Tensor:
        """Tell which of some members (long) are in the share, bool."""
        found: th.Tensor = (members >= self.first) & (members < self.group.stop)
        return found

    def train(self, loss_fn: MemberLoss, members: th.Tensor, batches: Sequence[th.Tensor], total: th.Tensor) -> None:
        """
        Train some members on their batches, in order.

        :param loss_fn: differentiable loss of some members
        :param members: numbers of the members that take part, counted from the share's first, long
        :param batches: rows of these members, [A, B] each
        :param total: receives the losses of these members, summed over the rows [A]
        """
        for batch in batches:
            loss = loss_fn(of_members(self.parameters, members), batch)
            gradients = th.autograd.grad(loss.sum(), self.parameters)
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient
            self.optimizer.step()
            total += loss.detach() * batch.shape[1]


def of_members(parameters: Sequence[th.Tensor], members: th.Tensor) -> Sequence[th.Tensor]:
    """Return the stacked parameters of some members (long, ascending) [A, ...]; not copied if they are all members."""
    return parameters if len(members) == len(parameters[0]) else [parameter[members] for parameter in parameters]


def is_stacked(value: Any, parameter: th.Tensor) -> bool:
    """Tell whether a value of an optimiser's state has one element for each element of the parameter."""
    return isinstance(value, th.Tensor) and value.shape == parameter.shape
