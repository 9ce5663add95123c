"""Data sets, and pipelines that make batches of their examples.

For images, `load` returns the data set, and `train_batches` and `eval_batches` make batches of its examples. For text,
load the data set with `load` and a tokenizer with `load_tokenizer`, encode the sentences with `Tokenizer.encode`, and
pass the result to `text_train_batches` and `text_eval_batches`.
"""

from surm_jax.data.batches import EvalBatches, TrainBatches
from surm_jax.data.holdout import first_examples, hold_out
from surm_jax.data.images.dataset import ArraySource, ImageDataset, ImageSource, identity_of, keep_classes
from surm_jax.data.images.pipeline import eval_batches, train_batches
from surm_jax.data.images.transforms import Augment, eval_image, train_image
from surm_jax.data.lm.encoding import LearnedTokens, encode_lines
from surm_jax.data.lm.lines import LineDataset, LineSource, is_lines, load_lines
from surm_jax.data.lm.pipeline import NO_LABEL, line_eval_batches, pack, packed_train_batches
from surm_jax.data.lm.prompts import Prompts, read_prompts
from surm_jax.data.lm.tokenizer import PromptTokenizer, load_prompt_tokenizer
from surm_jax.data.sources import is_path, is_text, load
from surm_jax.data.states import States, digest_of
from surm_jax.data.text.dataset import TextDataset, TextSource
from surm_jax.data.text.glue import GLUE_TASKS, glue_task
from surm_jax.data.text.pipeline import lengths_in_use, text_eval_batches, text_train_batches
from surm_jax.data.text.tokenizer import Tokenizer, TokenSource, load_tokenizer

__all__ = [
    "GLUE_TASKS",
    "NO_LABEL",
    "ArraySource",
    "Augment",
    "EvalBatches",
    "ImageDataset",
    "ImageSource",
    "LearnedTokens",
    "LineDataset",
    "LineSource",
    "PromptTokenizer",
    "Prompts",
    "States",
    "TextDataset",
    "TextSource",
    "TokenSource",
    "Tokenizer",
    "TrainBatches",
    "digest_of",
    "encode_lines",
    "eval_batches",
    "eval_image",
    "first_examples",
    "glue_task",
    "hold_out",
    "identity_of",
    "is_lines",
    "is_path",
    "is_text",
    "keep_classes",
    "lengths_in_use",
    "line_eval_batches",
    "load",
    "load_lines",
    "load_prompt_tokenizer",
    "load_tokenizer",
    "pack",
    "packed_train_batches",
    "read_prompts",
    "text_eval_batches",
    "text_train_batches",
    "train_batches",
    "train_image",
]
