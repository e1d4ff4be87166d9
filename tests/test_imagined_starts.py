"""Where imagined rollouts start: every real state is as likely as another, or recent ones are likelier."""

import numpy as np
import pytest
import torch as th
from tiny import Drift, tiny_model, vec_drift

from sb3_mbmpo import MBMPO


def starts_of(model, n_rows=2_000):
    """Return the indices in the buffer of the real steps from which imagined rollouts start; all observations differ."""
    trainer = model._meta_trainer(model._generators, n_threads=1)
    starts = trainer.sample_starts(4, n_rows // 4).flatten(0, 1)
    obs = model._transitions().obs
    is_there = (starts.unsqueeze(1) == obs.unsqueeze(0)).all(2)
    assert is_there.any(1).all(), "a start that is not a real state"
    return is_there.float().argmax(1)


def test_every_real_state_is_equally_likely_as_a_start():
    model = tiny_model(imagined_start="buffer", recent_starts=0.0).learn(60)
    counts = th.bincount(starts_of(model), minlength=60).double()
    assert len(counts) == 60
    # Pearson's chi-squared with 59 degrees of freedom is above 110 in one of 10,000 draws
    assert ((counts - 2_000 / 60).square() / (2_000 / 60)).sum() < 110


def test_a_share_of_the_starts_is_recent():
    model = tiny_model(imagined_start="buffer", recent_starts=0.7).learn(60)
    model._n_new_steps = 20  # as during the training that follows 20 real steps
    recent = float((starts_of(model) >= 40).double().mean())
    # 0.7 by choice, and a third of the others by chance: 0.8, with a standard deviation of 0.009
    assert 0.76 < recent < 0.84
    model.recent_starts = 1.0
    assert (starts_of(model) >= 40).all()


def test_the_newest_steps_are_the_last_rows_even_of_a_buffer_that_is_full():
    model = tiny_model(vec_drift(2), buffer_size=40, imagined_start="buffer").learn(100)
    assert model.replay_buffer.full
    assert model.replay_buffer.pos == 10
    rows = model._transitions()
    newest = (model.replay_buffer.pos - 1) % model.replay_buffer.buffer_size
    np.testing.assert_array_equal(rows.next_obs[-2:], model.replay_buffer.next_observations[newest])
    oldest = model.replay_buffer.pos
    np.testing.assert_array_equal(rows.obs[:2], model.replay_buffer.observations[oldest])


def test_what_was_met_since_the_last_fit_is_new_to_the_next(monkeypatch):
    seen = []
    model = tiny_model(vec_drift(2), n_steps=20, learning_starts=40)
    original = model.dynamics.fit

    def fit(data, **kwargs):
        seen.append((len(data.obs), kwargs["n_new_rows"]))
        return original(data, **kwargs)

    monkeypatch.setattr(model.dynamics, "fit", fit)
    model.learn(80)
    assert seen == [(40, 40), (60, 20), (80, 20)]


def test_a_model_without_its_buffer_imagines_from_a_sample_of_it(tmp_path):
    model = tiny_model(imagined_start="buffer").learn(40)
    known = {tuple(row) for row in model._transitions().obs.tolist()}
    model.save(tmp_path / "model")
    loaded = MBMPO.load(tmp_path / "model", env=Drift())
    first = loaded.imagined_env(n_envs=30, seed=0).reset()
    assert {tuple(row) for row in first.tolist()} <= known
    assert loaded.adapt(model_index=0).predict(first)[0].shape == (30, 2)


@pytest.mark.parametrize("imagined_start", ["initial", "buffer"])
def test_imagining_before_any_real_step_is_refused(imagined_start):
    model = tiny_model(imagined_start=imagined_start)
    for imagine in (lambda: model.adapt(model_index=0), model.imagined_env):
        with pytest.raises(ValueError, match="call `learn` first"):
            imagine()
