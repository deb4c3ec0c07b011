"""A random Mllama with 1028 features an image, next to which the text hardly counts; mini's vocabulary."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import MllamaConfig, MllamaProcessor

from crosstrim import mini
from tests.support.tiny import randomised

FEATURES_PER_TILE = 16 * 16 + 1


def write(folder: Path) -> Path:
    """Save model and processor to `folder`."""
    config = MllamaConfig.from_pretrained(mini.path())
    config.vision_config.update({"image_size": 224, "patch_size": 14, "num_hidden_layers": 3, "num_global_layers": 1})
    config.vision_config.update({"intermediate_layers_indices": [0, 1], "vision_output_dim": 3 * 128})
    config.dtype = torch.float32
    model = randomised(config)
    model.save_pretrained(folder)
    processor = MllamaProcessor.from_pretrained(mini.path())
    processor.image_processor.size = {"height": 224, "width": 224}
    processor.save_pretrained(folder)
    return folder
