"""Warnings about training problems that the metrics reveal: one warning per problem, with the numbers and what to change."""

import math
from collections.abc import Sequence
from statistics import fmean, median, pstdev

from sb3_mbmpo.common.warn_once import WarnsOnce

# Warn when real returns have lagged behind for this many iterations in a row
EXPLOITATION_PATIENCE = 5
# Share of the imagined gain over the first real returns that real returns have to reach. With tuned settings, HalfCheetah
# reaches 0.3 after its first three or four iterations, and more than 0.5 later
REAL_SHARE = 0.25
# A validation loss of more than LOSS_JUMP times the usual one is a jump if it also exceeds LOSS_FLOOR, a share of the variance
LOSS_JUMP, LOSS_FLOOR = 3.0, 0.1
# Of the last LINE_SEARCH_WINDOW meta-steps, at least this share has to find an improvement
LINE_SEARCH_WINDOW, LINE_SEARCH_SUCCESS = 30, 0.2


class TrainingHealth(WarnsOnce):
    """
    Monitor of the metrics of each iteration, which warns of problems.

    Its state is plain numbers, so that it is saved with the model and a resumed run does not warn again.
    """

    def __init__(self) -> None:
        super().__init__()
        self._first_returns: list[float] = []  # real returns from before any trained policy acted
        self._has_trained = False
        self._imagined: float | None = None  # the imagined return of the policy that now acts
        self._left_behind = 0
        self._losses: list[float] = []
        self._line_searches: list[bool] = []

    def real_episodes(self, earned: Sequence[float], unit: str = "") -> None:
        """
        Compare real returns with imagined ones, and warn if the policy exploits the models.

        :param earned: returns of the real episodes since the last iteration, comparable with the imagined return
        :param unit: their unit, if it is not the return; begins with a space
        """
        if not earned:
            return
        if not self._has_trained:
            self._first_returns += earned
            return
        if not self._first_returns:  # no episode ended during the random steps
            self._first_returns += earned
        if self._imagined is None:
            return
        first, real = fmean(self._first_returns), fmean(earned)
        gain = self._imagined - first
        noise = max(2 * pstdev(self._first_returns), 0.05 * abs(first))
        exploits = gain > noise and real - first < REAL_SHARE * gain
        self._left_behind = self._left_behind + 1 if exploits else 0
        if self._left_behind >= EXPLOITATION_PATIENCE:
            self._warn(
                "exploitation",
                f"The policy exploits the models: it is imagined to earn {self._imagined:.4g}{unit}, but its real episodes "
                f"earn {real:.4g}, and the first ones, with random actions, {first:.4g}. This has lasted for "
                f"{self._left_behind} iterations in a row. Try a lower `n_meta_steps` or `horizon`, a lower "
                "`dynamics_kwargs['clip_margin']`, or more real steps (`n_steps`, `learning_starts`).",
            )

    def learning_begins(self, n_steps: int, n_random: int, learning_starts: int) -> None:
        """
        Warn if `learn` will end before anything can be learned.

        :param n_steps: real steps that `learn` will take
        :param n_random: random steps that are still missing before the first fit
        :param learning_starts: MBMPO's argument
        """
        if n_random > n_steps:
            self._warn(
                "learning_starts",
                f"Nothing will be learned: `learn` ends after {n_steps} real steps, but the first fit waits for {n_random} "
                f"more random steps (`learning_starts` is {learning_starts}). Pass more `total_timesteps`, or continue with "
                "`learn(..., reset_num_timesteps=False)`; until then the policy is untrained.",
            )

    def imagined_from_the_first(self, longest: int, horizon: int) -> None:
        """
        Warn if real episodes are longer than imagined rollouts that start at the first observation of an episode.

        :param longest: length of the longest real episode, in steps
        :param horizon: length of imagined rollouts, in steps
        """
        if longest > horizon:
            self._warn(
                "horizon",
                f"Real episodes last {longest} steps or more, but imagined rollouts start at their beginning and end after "
                f"{horizon} steps (`horizon`): the rest is never imagined. Unless it looks like the beginning, as in "
                "balancing, set `imagined_start='buffer'`, or a longer `horizon`.",
            )

    def dynamics_fitted(self, val_loss: float, log_likelihood: bool) -> None:
        """
        Record the validation loss of a fit, and warn of jumps.

        :param val_loss: mean over the ensemble members
        :param log_likelihood: True for the negative log-likelihood of probabilistic members, False for a squared error in
            standardised units
        """
        usual = median(self._losses) if self._losses else math.inf
        if log_likelihood:
            # error / variance + log(variance), where the error is as large as the variance says: the same two bounds
            jumps = val_loss > max(usual + LOSS_JUMP - 1, 1 + math.log(LOSS_FLOOR))
        else:
            jumps = val_loss > max(LOSS_JUMP * usual, LOSS_FLOOR)
        if not math.isfinite(val_loss) or jumps:
            before = f" after {usual:.3g}, the median of the earlier fits" if self._losses else ""
            self._warn(
                "dynamics",
                f"The validation loss of the dynamics jumped to {val_loss:.3g}{before}: the models fail to predict the latest "
                "real steps. Try a lower `learning_rate`, more `dynamics_kwargs['max_epochs']`, "
                "`dynamics_kwargs['reinit_every']`, or more real steps per iteration (`n_steps`).",
            )
        if math.isfinite(val_loss):
            self._losses.append(val_loss)

    def meta_trained(self, imagined_return: float | None, line_search_successes: Sequence[bool]) -> None:
        """
        Record the meta-training of an iteration, and warn if the line search keeps failing.

        :param imagined_return: expected return of the meta-policy, comparable with the next ``real_episodes``; None if it is
            not known well enough to judge them
        :param line_search_successes: for each meta-step, in order, whether it found an improvement
        """
        self._has_trained, self._imagined = True, imagined_return
        self._line_searches = (self._line_searches + list(line_search_successes))[-LINE_SEARCH_WINDOW:]
        share = fmean(self._line_searches) if self._line_searches else 1.0
        if len(self._line_searches) == LINE_SEARCH_WINDOW and share < LINE_SEARCH_SUCCESS:
            self._warn(
                "line search",
                f"The line search found an improvement in only {100 * share:.0f} % of the last {LINE_SEARCH_WINDOW} "
                "meta-steps: the policy hardly changes any more. Try a lower `inner_lr`, more `n_imagined_rollouts`, a higher "
                "`cg_damping` or `line_search_max_iter`.",
            )

    def adapted(self, n_failed: int, n_tasks: int) -> None:
        """
        Warn of adaptations that are not finite.

        :param n_failed: number of tasks whose adaptation is not finite
        :param n_tasks: number of all tasks
        """
        if n_failed > 0:
            self._warn(
                "adaptation",
                f"The adaptations to {n_failed} of {n_tasks} tasks are NaN or infinite, so the meta-policy acts for them. Try "
                "a lower `inner_lr`, rewards of another scale, or a narrower `dynamics_kwargs['clip_margin']`.",
            )

    def critic_trained(self, n_failed: int, n_fits: int) -> None:
        """
        Warn of fits of the critic that are not finite.

        :param n_failed: number of fits that were undone because their numbers are not finite
        :param n_fits: number of all fits of the iteration
        """
        if n_failed > 0:
            self._warn(
                "critic",
                f"{n_failed} of {n_fits} fits of the critic gave numbers that are NaN or infinite, so it keeps what it had "
                "learned before. Try rewards of another scale, a lower `gamma` or `learning_rate`, or other "
                "`policy_kwargs['optimizer_kwargs']`.",
            )
