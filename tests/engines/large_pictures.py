"""A random Mllama with 1028 features an image, next to which the text hardly counts; mini's vocabulary."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import MllamaConfig, MllamaForConditionalGeneration, MllamaProcessor

from crosstrim import mini

FEATURES_PER_TILE = 16 * 16 + 1


def write(folder: Path) -> Path:
    """Save model and processor to `folder`."""
    config = MllamaConfig.from_pretrained(mini.path())
    config.vision_config.update({"image_size": 224, "patch_size": 14, "num_hidden_layers": 3, "num_global_layers": 1})
    config.vision_config.update({"intermediate_layers_indices": [0, 1], "vision_output_dim": 3 * 128})
    config.dtype = torch.float32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MllamaForConditionalGeneration._from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("_gate", "gate_attn", "gate_ffn", ".gate")):
                    parameter.fill_(0.8)
                elif name.endswith(("q_norm.weight", "k_norm.weight")):
                    parameter.fill_(2.0)
                elif parameter.dim() >= 2 and "embed" not in name:
                    parameter.normal_(0, parameter[0].numel() ** -0.5)
                elif "embed_tokens" in name:
                    parameter.normal_(0, 1)
    model.save_pretrained(folder)
    processor = MllamaProcessor.from_pretrained(mini.path())
    processor.image_processor.size = {"height": 224, "width": 224}
    processor.save_pretrained(folder)
    return folder
