"""Steer what a language model writes, without fine-tuning it. Start at `load`, `generate` and the notebooks.

Names are imported on first use, so that `import steer_utils` does not wait for torch.
"""

import sys
from importlib import import_module
from types import SimpleNamespace

_NAMES = {  # where the public names are
    "models": "load encode",
    "generation": "generate compare",
    "additions.addition": "ActivationAddition AdditionSum get_x_vector padded steering_vectors "
    "apply_activation_additions",
    "additions.vector": "SteeringVector",
    "additions.contrast": "Ablation mean_difference",
    "additions.sweep": "sweep",
    "additions.serving": "vllm_request",
    "pplm.bags": "Bag bag_of_words",
    "pplm.steer": "PPLM attribute_scores",
    "pplm.classifier": "ClassifierHead train_classifier_head",
    "lm_steer.steer": "AddSteer LMSteer OffsetSteer",
    "lm_steer.training": "train_lm_steer",
    "lm_steer.transfer": "transfer",
    "lm_steer.words": "word_lists",
    "lm_steer.evidence": "evidence_spans steer_analysis",
    "course.notebook": "highlight",
    "course.tables": "print_n_comparisons",
    "measure.metrics": "best_of",
    "measure.strength": "at_kl",
}
_CALLED = {  # modules that notebooks call by their last name alone
    "measure": "metrics judges costs trials",
    "course": "notebook plots drawings exercises tables sliders playground servers steers",
}
_SHORT = {name: f"{room}.{name}" for room, names in _CALLED.items() for name in names.split()}
_ROOMS = ("additions", "pplm", "lm_steer", "measure", "course")
_MODULES = ("models", "embedded", "hf", "probing", "hooks", "sampling", "generation", "checkpoint", "data")
_MODULES = (*_MODULES, "types", "workers")
_WHERE = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = [*_WHERE, *_SHORT, *_ROOMS, *_MODULES]
__version__ = "0.1.0"


def _types_first(name: str, *_: object) -> None:
    """Import `types` before any other module, as beartype checks those after it; it takes a while itself."""
    if name.startswith(f"{__name__}.") and name != f"{__name__}.types":
        import_module(f"{__name__}.types")


sys.meta_path.insert(0, SimpleNamespace(find_spec=_types_first))


def __getattr__(name: str):
    if name in _WHERE:
        return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    if name in __all__:
        return import_module(f"{__name__}.{_SHORT.get(name, name)}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
