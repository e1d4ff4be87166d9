"""The report's figures in TensorBoard while training."""

import pytest
from stable_baselines3 import PPO
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import Drift, assert_same, parameters, tiny_model
from tiny_report import FIGURES

from sb3_mbmpo import DiagnosticsCallback
from sb3_mbmpo.report import callback as diagnostics_callback
from sb3_mbmpo.report import model_plots
from sb3_mbmpo.report.study import ModelStudy


@pytest.mark.parametrize(("every", "steps"), [(1, [20, 40, 60, 80]), (2, [40, 80]), (3, [60, 80]), (9, [80])])
def test_the_callback_looks_when_it_is_due_and_at_the_end(monkeypatch, every, steps):
    looked = []
    quick = ModelStudy({}, None, None, None, [])
    monkeypatch.setattr(diagnostics_callback, "study_model", lambda *_: looked.append(callback.num_timesteps) or quick)
    monkeypatch.setattr(ModelStudy, "metrics", lambda self: {})
    monkeypatch.setattr(model_plots, "model_pictures", lambda study: [])
    callback = DiagnosticsCallback(Drift(), every_n_iterations=every)
    tiny_model().learn(80, callback=callback)
    assert looked == steps


def test_figures_and_errors_go_to_tensorboard(tmp_path):
    callback = DiagnosticsCallback(Drift(), every_n_iterations=9, n_episodes=1)
    tiny_model(tensorboard_log=str(tmp_path)).learn(40, callback=callback)
    events = EventAccumulator(str(next(tmp_path.iterdir())), size_guidance={"images": 0})
    events.Reload()
    names = {f"diagnostics/{name}" for name in FIGURES if name not in ("learning_curve", "expectations", "time")}
    assert set(events.Tags()["images"]) == names
    for tag in names:
        assert [event.step for event in events.Images(tag)] == [40]
    for key in ("one_step_rmse", "horizon_rmse"):
        assert [event.step for event in events.Scalars(f"diagnostics/{key}")] == [40]


def test_looking_does_not_change_what_is_learned():
    def learned(callback):
        return parameters(tiny_model().learn(60, callback=callback))

    assert_same(learned(None), learned(DiagnosticsCallback(Drift(), every_n_iterations=1, n_episodes=1)))


def test_the_callback_says_what_it_cannot_do():
    with pytest.raises(ValueError, match="every_n_iterations"):
        DiagnosticsCallback(Drift(), every_n_iterations=0)
    with pytest.raises(ValueError, match="PPO"):
        PPO("MlpPolicy", "Pendulum-v1").learn(1, callback=DiagnosticsCallback(Drift()))
