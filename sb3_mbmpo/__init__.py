"""Model-Based Meta-Policy Optimization (MB-MPO) for Stable-Baselines3.

The public names are imported on first use (PEP 562): a bare `import sb3_mbmpo` does not import PyTorch, so that tools that
only need the version, and a hook that runs when Python starts, are fast.
"""

__version__ = "0.1.0"

__all__ = ["MBMPO", "DiagnosticsCallback", "DynamicsEnsemble", "MlpPolicy", "ModelVecEnv", "__version__"]

# Type checkers know this name; importing it from `typing` would slow every start of Python by milliseconds, see zoo/_hook.py
TYPE_CHECKING = False
if TYPE_CHECKING:
    from sb3_mbmpo.dynamics import DynamicsEnsemble
    from sb3_mbmpo.imagination.vec_env import ModelVecEnv
    from sb3_mbmpo.mbmpo import MBMPO
    from sb3_mbmpo.policies import MlpPolicy
    from sb3_mbmpo.report.callback import DiagnosticsCallback
else:  # hidden from type checkers, which would take a module with __getattr__ to have every attribute
    _MODULE_OF = {
        "MBMPO": "sb3_mbmpo.mbmpo",
        "DiagnosticsCallback": "sb3_mbmpo.report.callback",
        "DynamicsEnsemble": "sb3_mbmpo.dynamics",
        "MlpPolicy": "sb3_mbmpo.policies",
        "ModelVecEnv": "sb3_mbmpo.imagination.vec_env",
    }

    def __getattr__(name):
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its public names are {', '.join(__all__)}.")
        from importlib import import_module

        value = getattr(import_module(_MODULE_OF[name]), name)
        globals()[name] = value  # the next access does not come here
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
