"""crosstrim as a model of lmms-eval, which finds it by the entry point group `lmms_eval.models`."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """What lmms-eval is told: the model's name, and where its two classes are."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="crosstrim",
        chat_class_path="crosstrim.eval.lmms.model.Crosstrim",
        simple_class_path="crosstrim.eval.lmms.model.CrosstrimSimple",
    )
