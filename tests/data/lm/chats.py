"""Chat templates and a small tokenizer for tests."""

import json
from pathlib import Path

import tokenizers

MARKED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|a|>"
    "{% generation %}{{ m.content }}<|e|>{% endgeneration %}\n{% else %}<|u|>{{ m.content }}<|e|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|a|>{% endif %}"
)
PLAIN = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
CHAT = [
    {"role": "user", "content": "Is it  wet?", "name": None},
    {"role": "assistant", "content": "It rains."},
    {"role": "user", "content": "Und 雨?"},
    {"role": "assistant", "content": "It pours. Zoë"},
]
SPECIAL = ["<pad>", "<s>", "</s>", "<|a|>", "<|u|>", "<|e|>"]


def write_tokenizer(folder: Path, template: str | None = PLAIN, **settings) -> Path:
    """Write a tokenizer of byte pairs into a folder, as that of Llama 3, and return the folder."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    library.train_from_iterator([Path(__file__).read_text("utf-8"), "rains pours red blue green" * 9], trainer)
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    folder.mkdir(exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>"} | ({"chat_template": template} if template else {})
    values = {"tokenizer_class": "PreTrainedTokenizerFast", **named, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder
