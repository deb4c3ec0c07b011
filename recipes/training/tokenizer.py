"""A small tokenizer and a real processor, laid out as Llama-3.2-Vision's are."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import MllamaProcessor, PreTrainedTokenizerFast
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from .settings import MAX_TILES, Settings

BEGIN, END, END_OF_TURN = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
PADDING, IMAGE = "<|finetune_right_pad_id|>", "<|image|>"
_SPECIALS = [
    BEGIN,
    END,
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    END_OF_TURN,
    "<|python_tag|>",
    PADDING,
]
# Llama 3's own rule for cutting text into words.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{%- if message['content'] is string %}
{{- message['content'] | trim }}
{%- else %}
{%- for part in message['content'] %}
{%- if part['type'] == 'image' %}
{{- '<|image|>' }}
{%- elif part['type'] == 'text' %}
{{- part['text'] | trim }}
{%- endif %}
{%- endfor %}
{%- endif %}
{{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""


def build_tokenizer(corpus: list[str], words: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE on the questions; any text at all can be encoded, since every byte is a token.

    Args:
        corpus: the questions and answers.
        words: tokens of the byte alphabet and the merges. The special tokens follow, which ends the text vocabulary,
            and right after it the image token, as Mllama demands.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=words,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The blank line after a header and the role names must be one token each.
    tokenizer.train_from_iterator([*corpus, *["user\n\nassistant\n\nsystem"] * 99], trainer)
    if tokenizer.get_vocab_size() != words:
        raise ValueError(f"the corpus gives {tokenizer.get_vocab_size()} tokens, not {words}: ask for so many")
    tokenizer.add_special_tokens([*_SPECIALS, IMAGE])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END_OF_TURN,
        pad_token=PADDING,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=2048,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast, settings: Settings) -> MllamaProcessor:
    """Return the processor: the tokenizer, the chat template and transformers' PIL image processor."""
    side = {"height": settings.tile, "width": settings.tile}
    image_processor = MllamaImageProcessorPil(
        size=side, max_image_tiles=MAX_TILES, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return MllamaProcessor(image_processor, tokenizer, chat_template=CHAT_TEMPLATE)
