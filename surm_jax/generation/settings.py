"""Read `generation_config.json`, in which transformers keeps the defaults of text generation for a model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surm_jax.errors import UserError, did_you_mean
from surm_jax.files import read_json
from surm_jax.generation.sampling import Sampling

GENERATION_NAME = "generation_config.json"
"""The file of a folder of transformers that says how its model writes text."""

# Settings that change the text, and the values with which they change nothing. None changes nothing either.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), (1,)),
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "typical_p", "guidance_scale"), (1,)),
    **dict.fromkeys(("min_length", "min_new_tokens", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), (0,)),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "diversity_penalty", "min_p"), (0,)),
    **dict.fromkeys(("token_healing", "remove_invalid_values", "use_mtp"), (False,)),
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "force_words_ids"), ([],)),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "sequence_bias", "top_h", "penalty_alpha"), ()),
    **dict.fromkeys(("exponential_decay_length_penalty", "watermarking_config", "max_time", "stop_strings"), ()),
    **dict.fromkeys(("dola_layers", "constraints", "is_assistant"), (False, [])),
}
# Settings that change only how fast the text is written, what else is returned, or beams, of which there is one.
_WITHOUT_EFFECT = (
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "early_stopping", "length_penalty"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
    *("pad_token_id", "bos_token_id", "decoder_start_token_id", "renormalize_logits", "low_memory", "compile_config"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold", "disable_compile"),
    *("prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind"),
    *("target_lookbehind", "assistant_ensemble_weight", "speculation_type", "continuous_batching_config"),
    *("prefill_chunk_size", "_from_model_config", "transformers_version"),
)
_FOLLOWED = ("do_sample", "temperature", "top_k", "top_p", "max_length", "max_new_tokens", "eos_token_id")
_NEW_TOKENS, _TOP_K = 20, 50  # What transformers takes if the file does not say it.


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The defaults of text generation for a model.

    Attributes:
        sampling: How the next token is chosen.
        end_tokens: The tokens that end a text, or None if the file does not name them.
        max_new_tokens: The largest number of new tokens, or None if the file limits the tokens of a prompt and its
            continuation together (`max_length`).
    """

    sampling: Sampling = field(default_factory=Sampling)
    end_tokens: tuple[int, ...] | None = None
    max_new_tokens: int | None = _NEW_TOKENS


def read_settings(folder: Path) -> Settings:
    """Read the defaults in the folder of a model. Without the file they are those of transformers.

    Raises:
        UserError: The file is damaged, or a setting is unknown, out of range, or cannot be followed.
    """
    path = folder / GENERATION_NAME
    if not path.is_file():
        return Settings()
    fields = {name: value for name, value in read_json(path).items() if value is not None}
    known = {*_NEUTRAL, *_WITHOUT_EFFECT, *_FOLLOWED}
    for name, value in fields.items():
        if name not in known:
            raise UserError(f"{path} has the unknown setting {name!r}{did_you_mean(name, known)}")
        if name in _NEUTRAL and value not in _NEUTRAL[name]:
            raise UserError(f"{path} sets {name}={value!r}, which cannot be followed: remove it from the file")
    if not isinstance(sample := fields.get("do_sample", False), bool):
        raise UserError(f"{path} sets do_sample={sample!r}, which must be true or false")
    try:
        sampling = Sampling(
            temperature=fields.get("temperature", 1.0) if sample else 0.0,
            top_k=fields.get("top_k", _TOP_K) if sample else 0,
            top_p=fields.get("top_p", 1.0) if sample else 1.0,
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    ends = fields.get("eos_token_id")
    ends = ends if ends is None or isinstance(ends, list) else [ends]
    numbers = [("eos_token_id", end) for end in ends or ()]
    numbers += [(name, fields[name]) for name in ("max_length", "max_new_tokens") if name in fields]
    for name, value in numbers:
        if not isinstance(value, int) or isinstance(value, bool) or value < (name != "eos_token_id"):
            raise UserError(f"{path} sets {name}={value!r}, which must be a positive integer")
    return Settings(
        sampling=sampling,
        end_tokens=None if ends is None else tuple(ends),
        max_new_tokens=fields.get("max_new_tokens", None if "max_length" in fields else _NEW_TOKENS),
    )
