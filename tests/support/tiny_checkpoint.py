"""The random model of `tiny` as a folder on disk, with a character tokenizer and the real processor."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import MllamaProcessor, PreTrainedTokenizerFast
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from tests.support import tiny

SPECIALS = [
    "<|finetune_right_pad_id|>",
    "<|begin_of_text|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
]
CHARACTERS = "\n abcdefghijklmnopqrstuvwxyz0123456789?.,!-:'\"()/+*=_#"
CHAT_TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{%- for part in message['content'] %}"
    "{{- '<|image|>' if part['type'] == 'image' else part['text'] }}"
    "{%- endfor %}{{- '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    words = SPECIALS + list(CHARACTERS)
    words += [f"<{spare}>" for spare in range(tiny.VOCABULARY - len(words))]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="?"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens([*SPECIALS, "<|image|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=SPECIALS[tiny.BOS],
        eos_token=SPECIALS[tiny.EOS],
        pad_token=SPECIALS[tiny.PAD],
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def processor() -> MllamaProcessor:
    side = {"height": tiny.TILE_PIXELS, "width": tiny.TILE_PIXELS}
    images = MllamaImageProcessorPil(size=side, max_image_tiles=4, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return MllamaProcessor(images, tokenizer(), chat_template=CHAT_TEMPLATE)


def write(folder: Path) -> Path:
    """Save model and processor to `folder`, as `load` expects them."""
    tiny.build().save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder
