"""Train stacked members in several threads, each of which does the same amount of work.

The rule is McNaughton's (1959): lay the members in a row and cut it into equal pieces, one a thread. A member that is cut has
two threads: one trains it on the first batches of an epoch, as its first work, the other on the last batches, as its last
work; by then the first has finished, so the two never meet. With whole members only, 5 on 2 threads would gain 5/3 at most;
so they gain 1.86. The weights are those of training alone, and nothing outside this file knows of it.

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

from sb3_mbmpo.common.threads import in_parallel, worthwhile_threads

# (parameters of some members, each [A, ...]; rows of each of them [A, B] long) -> loss of each of them [A]
MemberLoss = Callable[[Sequence[th.Tensor], th.Tensor], th.Tensor]
# What a thread costs the others at each batch: the work of the networks that takes as long
FLOPS_PER_THREAD = 32e6
# A member whose batch is less work is not handed over: alone, it costs as many calls as several members together
MIN_FLOPS_TO_HAND_OVER = 128e6


class Piece(NamedTuple):
    """
    Part of an epoch: neighbouring members and some of their batches.

    :param first: number of the first member
    :param last: number behind the last member
    :param begin: where the batches begin, 0 to 1
    :param end: where they end, 0 to 1
    """

    first: int
    last: int
    begin: Fraction
    end: Fraction


def timetable(n_members: int, n_threads: int, hand_over: bool = True) -> list[list[Piece]]:
    """
    Plan an epoch by McNaughton's wrap-around rule, see the head of this file.

    :param n_members: how many members train
    :param n_threads: no more than members: then the two parts of a member never meet
    :param hand_over: False: cut between members only, as equally as can be
    :return: what each thread does, in order
    """
    table = []
    for thread in range(n_threads):
        start, stop = (Fraction(i * n_members, n_threads) for i in (thread, thread + 1))
        first, last = math.ceil(start), math.floor(stop) if hand_over else math.ceil(stop)
        pieces = [Piece(first, last, Fraction(0), Fraction(1))]
        if hand_over:
            pieces.insert(0, Piece(first - 1, first, Fraction(0), first - start))
            pieces.append(Piece(last, last + 1, 1 - (stop - last), Fraction(1)))
        table.append([piece for piece in pieces if piece.first < piece.last and piece.begin < piece.end])
    return table


class ParallelTraining:
    """
    The parameters of all members, shared out among threads.

    Every member is trained as it would be alone: its weights depend on the number of threads by no more than rounding.

    :param parameters: stacked parameters, each [M, ...]; trained in place
    :param optimizer: over the same parameters, one that treats each number by itself; training goes on from its state
    :param loss_fn: differentiable loss of some members
    :param batch_size: rows a member and step
    :param n_threads: how many threads may train
    """

    def __init__(
        self,
        parameters: Sequence[th.Tensor],
        optimizer: th.optim.Optimizer,
        loss_fn: MemberLoss,
        batch_size: int,
        n_threads: int,
    ) -> None:
        self._parameters, self._optimizer, self._loss_fn, self._batch_size = parameters, optimizer, loss_fn, batch_size
        n_members = len(parameters[0])
        # Forward, and backward to the inputs and to the weights: a multiplication and an addition each
        flops = 6 * batch_size * sum(parameter[0].numel() for parameter in parameters)
        n_threads = min(n_threads, n_members, worthwhile_threads(n_members * flops, FLOPS_PER_THREAD))
        self._timetable = timetable(n_members, n_threads, hand_over=flops >= MIN_FLOPS_TO_HAND_OVER)
        members = sorted({(piece.first, piece.last) for pieces in self._timetable for piece in pieces})
        self._shares = {first: _Share(parameters, optimizer, first, last) for first, last in members}

    def epoch(self, rows: th.Tensor, active: th.Tensor) -> th.Tensor:
        """
        One optimiser step a batch.

        :param rows: in the order in which each active member sees them, [A, rows] long
        :param active: numbers of the members that train, ascending, [A] long
        :return: mean loss of each active member over its rows, [A]
        """
        handed_over = {first: Event() for first in self._shares}

        def work(pieces: Sequence[Piece]) -> list[tuple[th.Tensor, th.Tensor]]:
            return [self._train(piece, rows, active, handed_over[piece.first]) for piece in pieces]

        total = th.zeros(len(active), device=active.device)
        for done in in_parallel([partial(work, pieces) for pieces in self._timetable], len(self._timetable)):
            for here, loss in done:
                total[here] += loss
        return total / rows.shape[1]

    def _train(self, piece: Piece, rows: th.Tensor, active: th.Tensor, handed_over: Event) -> tuple[th.Tensor, th.Tensor]:
        """Return which of the active members were trained, [A] bool, and the losses of those, summed over their rows."""
        here = (active >= piece.first) & (active < piece.last)
        batches = rows[here].split(self._batch_size, dim=1)
        begin, end = round(piece.begin * len(batches)), round(piece.end * len(batches))
        if piece.begin > 0:
            handed_over.wait()
        try:
            return here, self._shares[piece.first].train(self._loss_fn, active[here] - piece.first, batches[begin:end])
        finally:
            # Release the waiting thread even after an error
            handed_over.set()

    def finish(self) -> None:
        """Leave the state of the optimisers of all shares to the optimiser of the whole."""
        for i, parameter in enumerate(self._parameters):
            parts = [(share.parameters[i], share.optimizer.state[share.parameters[i]]) for share in self._shares.values()]
            own, state = parts[0]
            for name, value in state.items():
                stacked = is_stacked(value, own)
                self._optimizer.state[parameter][name] = th.cat([s[name] for _, s in parts]) if stacked else value


class _Share:
    """
    Neighbouring members that train together, with an optimiser of their own, in one thread at a time.

    :param parameters: of all members; the share's are views of them
    :param optimizer: of all members; the share goes on from its state, and leaves that as it is
    :param first: number of the first member
    :param last: number behind the last member
    """

    def __init__(self, parameters: Sequence[th.Tensor], optimizer: th.optim.Optimizer, first: int, last: int) -> None:
        # The same memory, but no views to autograd: views share a counter of changes, which is no counter for several threads
        self.parameters = [parameter.data[first:last].data.requires_grad_() for parameter in parameters]
        same_class: Callable[..., th.optim.Optimizer] = type(optimizer)
        self.optimizer = same_class([{**optimizer.param_groups[0], "params": self.parameters}])
        for whole, own in zip(parameters, self.parameters, strict=True):
            for name, value in optimizer.state.get(whole, {}).items():
                self.optimizer.state[own][name] = value[first:last].clone() if is_stacked(value, whole) else deepcopy(value)

    def train(self, loss_fn: MemberLoss, members: th.Tensor, batches: Sequence[th.Tensor]) -> th.Tensor:
        """
        Train some members on their batches, one after the other.

        :param members: which of the share's members take part, long, counted from its first
        :param batches: rows of those members, [A, B] each
        :return: losses of those members, summed over the rows [A]
        """
        total = th.zeros(len(members), device=members.device)
        for batch in batches:
            loss = loss_fn(of_members(self.parameters, members), batch)
            gradients = th.autograd.grad(loss.sum(), self.parameters)
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient
            self.optimizer.step()
            total += loss.detach() * batch.shape[1]
        return total


def of_members(parameters: Sequence[th.Tensor], members: th.Tensor) -> Sequence[th.Tensor]:
    """Return stacked parameters of some members (long, ascending) [A, ...]; of all members as they lie, without a copy."""
    return parameters if len(members) == len(parameters[0]) else [parameter[members] for parameter in parameters]


def is_stacked(value: Any, parameter: th.Tensor) -> bool:
    """Tell whether a value of an optimiser's state has a number for each number of the parameter."""
    return isinstance(value, th.Tensor) and value.shape == parameter.shape
