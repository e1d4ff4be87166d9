"""What goes wrong in training in a way that metrics show: each thing is warned of once, with the numbers and what to turn."""

import math
import warnings
from collections.abc import Sequence
from statistics import fmean, median, pstdev

# How many iterations in a row real returns stay behind before it is believed
EXPLOITATION_PATIENCE = 5
# Share of the imagined gain over the first real returns that real returns have to reach. A tuned HalfCheetah is at 0.3 after
# its first three or four iterations, and at more than 0.5 later
REAL_SHARE = 0.25
# A validation loss that is this many times the usual one is a jump, if the models also miss this share of the variance
LOSS_JUMP, LOSS_FLOOR = 3.0, 0.1
# How many of the last meta-steps have to find an improvement
LINE_SEARCH_WINDOW, LINE_SEARCH_SUCCESS = 30, 0.2


class TrainingHealth:
    """
    Sees the metrics of one iteration after the other and warns. Plain numbers, so that it is saved with the model: a resumed
    run does not warn again.
    """

    def __init__(self) -> None:
        self._warned: set[str] = set()
        self._first_returns: list[float] = []  # real ones, before any policy acted
        self._has_trained = False
        self._imagined: float | None = None  # what the policy that acts now was imagined to earn
        self._left_behind = 0
        self._losses: list[float] = []
        self._line_searches: list[bool] = []

    def real_episodes(self, earned: Sequence[float], unit: str = "") -> None:
        """
        Compare what was earned with what had been imagined.

        :param earned: by the real episodes since the last iteration, comparable with what had been imagined
        :param unit: in which unit, if it is not the return; begins with a space
        """
        if not earned:
            return
        if not self._has_trained:
            self._first_returns += earned
            return
        if not self._first_returns:  # random steps without the end of an episode
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
                f"earn {real:.4g}, and the first ones, with random actions, {first:.4g}. This is the iteration number "
                f"{self._left_behind} in a row. Try a lower `n_meta_steps` or `horizon`, a lower "
                "`dynamics_kwargs['clip_margin']`, or more real steps (`n_steps`, `learning_starts`).",
            )

    def learning_begins(self, n_steps: int, n_random: int, learning_starts: int) -> None:
        """
        Warn if nothing can be learned in the steps to come.

        :param n_steps: real steps that `learn` will do
        :param n_random: random ones that the first fit still waits for
        :param learning_starts: as MBMPO's argument
        """
        if n_random > n_steps:
            self._warn(
                "learning_starts",
                f"Nothing will be learned: `learn` ends after {n_steps} real steps, and the first fit waits for {n_random} "
                f"more random ones (`learning_starts` is {learning_starts}). Ask for more `total_timesteps`, or go on with "
                "`learn(..., reset_num_timesteps=False)`; the policy is untrained until then.",
            )

    def imagined_from_the_first(self, longest: int, horizon: int) -> None:
        """
        Warn if real episodes are longer than the imagined rollouts that start where they start.

        :param longest: real episode, in steps
        :param horizon: of imagined rollouts, which start at real first observations only
        """
        if longest > horizon:
            self._warn(
                "horizon",
                f"Real episodes last {longest} steps or more, but imagined rollouts begin with them and end after {horizon} "
                "(`horizon`): what comes later is never imagined. Unless it looks like what came before, as in balancing, "
                "set `imagined_start='buffer'`, or a longer `horizon`.",
            )

    def dynamics_fitted(self, val_loss: float, log_likelihood: bool) -> None:
        """
        Take note of the loss of a fit, and warn of jumps.

        :param val_loss: mean over the members
        :param log_likelihood: it is one, of probabilistic members, and not a squared error in standardised units
        """
        usual = median(self._losses) if self._losses else math.inf
        # A log-likelihood may be negative: what is a factor for an error is a difference of logarithms there
        jumps = val_loss - usual > math.log(LOSS_JUMP) if log_likelihood else val_loss > max(LOSS_JUMP * usual, LOSS_FLOOR)
        if not math.isfinite(val_loss) or jumps:
            before = f", after {usual:.3g} as the median of the fits before" if self._losses else ""
            self._warn(
                "dynamics",
                f"The validation loss of the dynamics jumped to {val_loss:.3g}{before}: the models do not predict what the "
                "policy met last. Try a lower `learning_rate`, more `dynamics_kwargs['max_epochs']`, "
                "`dynamics_kwargs['reinit_every']`, or more real steps an iteration (`n_steps`).",
            )
        if math.isfinite(val_loss):
            self._losses.append(val_loss)

    def meta_trained(self, imagined_return: float | None, line_search_successes: Sequence[bool]) -> None:
        """
        Take note of the meta-training of an iteration.

        :param imagined_return: what the meta-policy is expected to earn, comparable with the next ``real_episodes``; None: not
            known well enough to judge them
        :param line_search_successes: whether the meta-steps, in their order, found an improvement
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

        :param n_failed: tasks whose adaptation is not finite
        :param n_tasks: all tasks
        """
        if n_failed > 0:
            self._warn(
                "adaptation",
                f"The adaptations to {n_failed} of {n_tasks} tasks are NaN or infinite, so the meta-policy acts for them. Try "
                "a lower `inner_lr`, rewards of another scale, or a narrower `dynamics_kwargs['clip_margin']`.",
            )

    def critic_trained(self, n_failed: int, n_fits: int) -> None:
        """
        :param n_failed: fits of the critic that were undone because their numbers are not finite
        :param n_fits: all fits of the iteration
        """
        if n_failed > 0:
            self._warn(
                "critic",
                f"{n_failed} of {n_fits} fits of the critic gave numbers that are NaN or infinite, so it keeps what it had "
                "learned before. Try rewards of another scale, a lower `gamma` or `learning_rate`, or other "
                "`policy_kwargs['optimizer_kwargs']`.",
            )

    def _warn(self, subject: str, message: str) -> None:
        if subject not in self._warned:
            self._warned.add(subject)
            warnings.warn(message)
