"""Steer what a language model writes, without fine-tuning it. Start at `load`, `generate` and the notebooks.

Names are imported on first use, so that `import steer_utils` does not wait for torch.
"""

from importlib import import_module

_WHERE = {
    "models": ("load", "encode"),
    "bags": ("Bag", "bag_of_words"),
    "pplm": ("PPLM",),
    "calibration": ("at_kl",),
    "ranking": ("attribute_scores", "best_of"),
    "generation": ("generate", "compare", "print_n_comparisons"),
    "activation_addition": (
        "ActivationAddition",
        "AdditionSum",
        "apply_activation_additions",
        "get_x_vector",
        "padded",
        "steering_vectors",
    ),
    "classifier_head": ("ClassifierHead",),
    "classifier_head_fit": ("train_classifier_head",),
    "lm_steer": ("AddSteer", "LMSteer", "OffsetSteer"),
    "lm_steer_fit": ("train_lm_steer",),
    "lm_steer_analysis": ("evidence_spans", "highlight", "steer_analysis"),
    "lm_steer_transfer": ("transfer",),
    "lm_steer_words": ("word_lists",),
    "steering_vector": ("SteeringVector",),
    "sweeps": ("sweep",),
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}
_MODULES = (
    "activation_addition",
    "bags",
    "calibration",
    "classifier_head",
    "classifier_head_fit",
    "costs",
    "data",
    "descent",
    "evaluate",
    "generation",
    "group_metrics",
    "hf",
    "lm_steer",
    "lm_steer_fit",
    "labelled",
    "lm_steer_analysis",
    "lm_steer_transfer",
    "lm_steer_words",
    "metrics",
    "models",
    "notebook",
    "perspective",
    "plots",
    "pplm",
    "pplm_jl",
    "ranking",
    "sampling",
    "scorers",
    "teacher_forcing",
)

__all__ = [*_MODULE_OF, *_MODULES]
__version__ = "0.1.0"


def __getattr__(name: str):
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name in _MODULE_OF:
        return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
