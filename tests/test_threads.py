"""Coarse parallelism: results, errors, and settings that are restored."""

import threading

import pytest
import torch as th

from sb3_mbmpo.common import threads

CPU = th.device("cpu")


@pytest.fixture
def two_threads():
    before = th.get_num_threads()
    th.set_num_threads(2)
    yield
    th.set_num_threads(before)


def test_jobs_run_at_the_same_time_with_single_threaded_operations(two_threads):
    meeting = threading.Barrier(3, timeout=60)

    def job(number):
        meeting.wait()  # passes only when all three are here
        return number, th.get_num_threads()

    assert threads.in_parallel([lambda i=i: job(i) for i in range(3)], 3) == [(0, 1), (1, 1), (2, 1)]
    assert th.get_num_threads() == 2


def test_a_single_job_stays_in_its_thread():
    assert threads.in_parallel([threading.get_ident], 2) == [threading.get_ident()]


@pytest.mark.parametrize("n_threads", [1, 2])
def test_gradients_are_recorded_whatever_the_callers_mode(n_threads):
    with th.no_grad():
        assert threads.in_parallel([th.is_grad_enabled] * 2, n_threads) == [True, True]


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_arrives_after_those_under_way_have_ended(failing, two_threads):
    ended, both_began, failed = [], threading.Barrier(2, timeout=60), threading.Event()

    def job(number):
        both_began.wait()
        if number == failing:
            failed.set()
            raise KeyError(number)
        failed.wait(60)
        ended.append(number)

    with pytest.raises(KeyError):
        threads.in_parallel([lambda i=i: job(i) for i in range(2)], 2)
    assert ended == [1 - failing]
    assert th.get_num_threads() == 2


def test_as_many_workers_as_pytorch_has_threads_but_no_more_than_there_are_cpus(two_threads, monkeypatch, tmp_path):
    monkeypatch.setattr(threads, "Path", lambda _: tmp_path / "cpu.max")
    for cpus, quota, expected in [
        (64, None, 2),
        (1, None, 1),
        (64, "max 100000", 2),
        (64, "150000 100000", 1),
        (64, "50000 100000", 1),
        (64, "400000 100000", 2),
    ]:
        monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _, cpus=cpus: set(range(cpus)), raising=False)
        if quota is not None:
            (tmp_path / "cpu.max").write_text(quota)
        assert threads.worker_threads(CPU) == expected, (cpus, quota)


def test_gpus_are_parallel_themselves():
    assert threads.worker_threads(th.device("cuda")) == 1


@pytest.mark.parametrize("work", [0, 0.5, 1, 3, 4, 10, 30, 100, 1000])
def test_worthwhile_threads_take_little_more_than_the_least_time_and_are_not_more_than_the_best(work):
    times = {n: work / n + n for n in range(1, 100)}
    best, chosen = min(times, key=times.__getitem__), threads.worthwhile_threads(3 * work, 3)
    assert 1 <= chosen <= best
    assert times[chosen] <= 1.25 * times[best]


@pytest.mark.parametrize("number", [0, 1, 5, 12])
@pytest.mark.parametrize("n_shares", [1, 2, 5, 7])
def test_even_shares_are_everything_once_and_differ_by_one_at_most(number, n_shares):
    shares = [list(range(number))[share] for share in threads.even_shares(number, n_shares)]
    assert [i for share in shares for i in share] == list(range(number))
    assert len(shares) == n_shares
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
