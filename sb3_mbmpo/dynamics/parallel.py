"""Training of stacked members in several threads, each of which does the same amount of work.

The rule is McNaughton's (1959): put the members in a row and cut it into equal pieces, one per thread. A member that is cut is
trained by two threads. The first begins with it, and trains it on the first batches of an epoch; the second finishes with it,
and trains it on the last batches. By then the first thread is done, so the two never overlap. If only whole members were
assigned, 5 members on 2 threads would be at most 5/3 times faster than on one; this way they are 1.86 times faster. The
weights are the same as with one thread, and nothing outside this file depends on the rule.

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
# Cost of a further thread to the others at each batch, expressed as the work of the networks that takes as long
FLOPS_PER_THREAD = 32e6
# A member whose batch is less work than this is not handed over: alone, it needs as many calls as several members together
MIN_FLOPS_TO_HAND_OVER = 128e6


class Piece(NamedTuple):
    """
    Part of an epoch: neighbouring members, and a range of their batches.

    :param first: number of the first member
    :param last: number after the last member
    :param begin: where the range of batches begins, 0 to 1
    :param end: where it ends, 0 to 1
    """

    first: int
    last: int
    begin: Fraction
    end: Fraction


def timetable(n_members: int, n_threads: int, hand_over: bool = True) -> list[list[Piece]]:
    """
    Plan an epoch by McNaughton's wrap-around rule, see the top of this file.

    :param n_members: number of members
    :param n_threads: number of threads, at most that of members, so that the two parts of a member never overlap
    :param hand_over: False: cut between members only, as evenly as possible
    :return: the pieces of each thread, in order
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
    The parameters of all members, divided among threads for training.

    Every member is trained as it would be alone: except for rounding, its weights do not depend on the number of threads.

    :param parameters: stacked parameters, each [M, ...], trained in place
    :param optimizer: an elementwise optimiser of these parameters; training continues from its state
    :param loss_fn: differentiable loss of some members
    :param batch_size: rows per member and step
    :param n_threads: maximum number of threads
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
        # Forward, and backward to the inputs and to the weights, with a multiplication and an addition each
        flops = 6 * batch_size * sum(parameter[0].numel() for parameter in parameters)
        n_threads = min(n_threads, n_members, worthwhile_threads(n_members * flops, FLOPS_PER_THREAD))
        self._timetable = timetable(n_members, n_threads, hand_over=flops >= MIN_FLOPS_TO_HAND_OVER)
        members = sorted({(piece.first, piece.last) for pieces in self._timetable for piece in pieces})
        self._shares = {first: _Share(parameters, optimizer, first, last) for first, last in members}

    def epoch(self, rows: th.Tensor, active: th.Tensor) -> th.Tensor:
        """
        Train the active members for one epoch, with one optimiser step per batch.

        :param rows: row numbers in the order in which each active member sees them, [A, rows] long
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
        """Train one piece; return which active members it trained, [A] bool, and their losses, summed over their rows."""
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
        """Copy the state of the shares' optimisers back to the optimiser of all members."""
        for i, parameter in enumerate(self._parameters):
            parts = [(share.parameters[i], share.optimizer.state[share.parameters[i]]) for share in self._shares.values()]
            own, state = parts[0]
            for name, value in state.items():
                stacked = is_stacked(value, own)
                self._optimizer.state[parameter][name] = th.cat([s[name] for _, s in parts]) if stacked else value


class _Share:
    """
    Neighbouring members that train together, with their own optimiser, in one thread at a time.

    :param parameters: parameters of all members; those of the share are views of them
    :param optimizer: optimiser of all members; the share continues from its state without changing it
    :param first: number of the first member
    :param last: number after the last member
    """

    def __init__(self, parameters: Sequence[th.Tensor], optimizer: th.optim.Optimizer, first: int, last: int) -> None:
        # The same memory, but not views for autograd: views share a version counter, which is not made for several threads
        self.parameters = [parameter.data[first:last].data.requires_grad_() for parameter in parameters]
        same_class: Callable[..., th.optim.Optimizer] = type(optimizer)
        self.optimizer = same_class([{**optimizer.param_groups[0], "params": self.parameters}])
        for whole, own in zip(parameters, self.parameters, strict=True):
            for name, value in optimizer.state.get(whole, {}).items():
                self.optimizer.state[own][name] = value[first:last].clone() if is_stacked(value, whole) else deepcopy(value)

    def train(self, loss_fn: MemberLoss, members: th.Tensor, batches: Sequence[th.Tensor]) -> th.Tensor:
        """
        Train some members on their batches, in order.

        :param loss_fn: differentiable loss of some members
        :param members: numbers of the members that take part, counted from the share's first, long
        :param batches: rows of these members, [A, B] each
        :return: losses of these members, summed over the rows [A]
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
    """Return the stacked parameters of some members (long, ascending) [A, ...]; not copied if they are all members."""
    return parameters if len(members) == len(parameters[0]) else [parameter[members] for parameter in parameters]


def is_stacked(value: Any, parameter: th.Tensor) -> bool:
    """Tell whether a value of an optimiser's state has one element for each element of the parameter."""
    return isinstance(value, th.Tensor) and value.shape == parameter.shape
