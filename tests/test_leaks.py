"""Repetition leaves nothing behind in memory."""

import gc
import tracemalloc

import torch as th
from tiny import tiny_model, vec_drift


def test_iterations_adaptations_and_saves_leave_nothing_behind(tmp_path):
    model = tiny_model(vec_drift(random_start=False), stats_window_size=2).learn(60)

    def everything(n_times):
        """Do everything ``n_times``, and return the bytes of traced Python objects and the number of tensors."""
        for _ in range(n_times):
            model.learn(20, reset_num_timesteps=False)
            model.adapt(model_index=1)
            model.save(tmp_path / "model")
            model.save_replay_buffer(tmp_path / "buffer")
            model.dynamics.save(tmp_path / "ensemble")
        gc.collect()
        # These grow by design: by a row per episode, and by a sample of the buffer
        model._initial_obs, model._start_sample = model._initial_obs[:2], model._start_sample[:2]
        return tracemalloc.get_traced_memory()[0], sum(issubclass(type(each), th.Tensor) for each in gc.get_objects())

    everything(1)  # before tracing, which would slow down imports at first use
    tracemalloc.start()
    try:
        everything(1)
        # The first repetitions also fill caches, of PyTorch and of others
        size, tensors = everything(4)
        size_later, tensors_later = everything(8)
    finally:
        tracemalloc.stop()
    assert tensors_later == tensors
    # For an iteration, an adaptation and three saves; the smallest possible leak, a copy of the policy, is larger
    assert (size_later - size) / 8 < 5 * 1024, "bytes that each repetition leaks"
