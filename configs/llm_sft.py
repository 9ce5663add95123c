r"""The configuration of a job that fine-tunes a decoder, such as a Llama, on texts, prompts with completions, or chats.

    python launch.py --config=configs/llm_sft.py --config.model.checkpoint=FOLDER --config.data.name=FILE.jsonl

`FOLDER` is a folder that the library transformers has saved both the model and its tokenizer to, or hf://owner/name.
Every line of `FILE.jsonl` is a JSON object with `"text"`, with `"prompt"` and `"completion"`, or with `"messages"`,
which the chat template of the tokenizer renders. Only completions and the answers of the assistant are learned, and
texts as a whole. The files `FILE_test.jsonl` and `FILE_validation.jsonl` beside it are evaluated. Without them, some
examples must be held out, as by --config.data.holdout=50.

The method is LoRA of rank 8 on all linear layers of the blocks, with the learning rate 1e-3. It is not tuned for any
model. `--config.peft.target=` chooses other layers: `qv`, `qkv`, `attention`, `mlp` or `all-linear`. Another method is
chosen by `--config.peft.method=low_displacement`, for instance.

A batch has 8 rows of the last of `data.lengths` tokens, into which examples are packed. Longer examples lose their end.
For a model of billions of parameters, add `--config.model.dtype=bfloat16 --config.model.param_dtype=bfloat16
--config.model.remat=block --config.model.scan_layers=True`.
"""

import ml_collections

from surm_jax.training import base_config


def get_config() -> ml_collections.ConfigDict:
    """Return the default configuration with the values of this job."""
    config = base_config()
    config.model.variant = ""
    config.model.checkpoint = "none"
    config.data.name = "FILE.jsonl"
    config.data.lengths = (64, 128, 256, 512)
    config.data.batch_size, config.data.eval_batch_size = 8, 8
    config.peft.method = "lora"
    config.peft.target = "all-linear"
    config.peft.lora.rank = 8
    # The head continues text in every task, so it keeps its pretrained weights.
    config.peft.train = ()
    config.optim.epochs = 3.0
    config.optim.warmup_ratio = 0.03
    config.log.metrics_every = 10
    return config
