"""The `adapter_config.json` of Hugging Face's peft, read as what it is: a file that anybody may have written.

Every value is checked before it is used, and a setting that would change what an adapter computes in a way that has no
counterpart here is refused by its name.
"""

from pathlib import Path
from typing import Any

from surm_jax.errors import UserError
from surm_jax.files import read_json
from surm_jax.paths import compile_pattern

_MOST_BYTES = 2**20
_LARGEST = 1e30

_WHERE = frozenset({"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"})
"""Settings that say which modules have updates or are trained: what the tensors say, too."""

_ABOUT_TRAINING = frozenset(
    "auto_mapping base_model_name_or_path ensure_weight_tying eva_config inference_mode"
    " init_lora_weights init_weights loftq_config lora_dropout lora_ga_config megatron_core"
    " module_dropout peft_type peft_version qalora_group_size rank_dropout rank_dropout_scale revision task_type"
    " use_effective_conv2d".split()
)
"""Settings that change nothing of what a trained adapter computes with linear layers."""

_NEUTRAL: tuple[Any, ...] = (None, False, "none", [], {})
"""Values with which a setting does nothing."""


class Settings:
    """What an `adapter_config.json` says.

    Attributes:
        path: The file, for messages.
        values: Its content.
    """

    def __init__(self, path: Path) -> None:
        """Read a file.

        Raises:
            UserError: If it cannot be read, or is not an object of JSON, or far too large.
        """
        self.path = path
        if not path.is_file():
            raise UserError(f"no adapter in {path.parent}: cannot read {path.name} (no such file)")
        self.values = read_json(path, _MOST_BYTES)

    def refuse_others(self, known: frozenset[str]) -> None:
        """Check that no unknown setting changes what the adapter computes.

        Raises:
            UserError: If one does; the message names the first.
        """
        for name, value in self.values.items():
            if name not in known | _WHERE | _ABOUT_TRAINING and value not in _NEUTRAL:
                raise self.refusal(name, "which has no counterpart here")
        initial = self.values.get("init_lora_weights", True)
        if not isinstance(initial, bool) and initial not in (None, "gaussian", "eva", "orthogonal"):
            # PiSSA and its like move a part of the base weights into the adapter before training starts.
            raise self.refusal(
                "init_lora_weights",
                "with which peft changes the base weights: convert the adapter to plain LoRA by"
                " peft's save_pretrained(path_initial_model_for_weight_conversion=...)",
            )

    def refusal(self, name: str, why: str) -> UserError:
        """Return the error that says why the value of a setting is refused."""
        return UserError(f"{self.path} sets {name} = {_short(self.values.get(name))}, {why}")

    def flag(self, name: str) -> bool:
        """Return a setting that is true or false, by default false."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.refusal(name, "which must be true or false")
        return bool(value)

    def whole(self, name: str, default: int) -> int:
        """Return a setting that is a whole number."""
        value = self.values.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.refusal(name, "which must be a whole number")
        return value

    def names(self, name: str) -> list[str]:
        """Return a setting that is a list of names; null is an empty one."""
        value = self.values.get(name) or []
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise self.refusal(name, "which must be a list of module names")
        return value

    def of_module(self, name: str, default: float, exceptions: str, module: str, *, whole: bool = False) -> float:
        """Return the value of a setting for one module.

        Args:
            name: The setting, such as "r".
            default: Its value if the file does not have it.
            exceptions: The setting with other values, such as "rank_pattern", by regular expressions: of those that
                match the end of the module's name, as `peft.utils.other.get_pattern_key` has it, the first counts.
            module: The name of the module there.
            whole: Whether the value must be a whole number of at least 1, and not just a finite one that is not 0.

        Raises:
            UserError: If the value is something else, or an expression cannot be used.
        """
        others = self.values.get(exceptions) or {}
        if not isinstance(others, dict):
            raise self.refusal(exceptions, "which must map names of modules to numbers")
        where, value = name, self.values.get(name, default)
        for pattern, other in others.items():
            if self._matches(pattern, module, end=True):
                where, value = f"{exceptions}[{_short(pattern)}]", other
                break
        what = "a whole number of at least 1" if whole else "a number other than 0"
        is_number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not is_number or value == 0 or not abs(value) < _LARGEST or (whole and value < 1):
            raise UserError(f"{self.path} sets {where} = {_short(value)}, which must be {what}")
        return value

    def targets(self, module: str) -> bool | None:
        """Say whether `target_modules` names a module; None if its name is not enough to tell."""
        value = self.values.get("target_modules")
        if value in (None, "all-linear") or any(
            self.values.get(name) not in (None, []) for name in ("layers_to_transform", "exclude_modules")
        ):
            return None
        if isinstance(value, str):
            return self._matches(value, module)
        return any(module == name or module.endswith(f".{name}") for name in self.names("target_modules"))

    def saves(self, module: str) -> bool:
        """Say whether `modules_to_save` names a module or one around it; as in peft, the end of a name counts."""
        parts = module.split(".")
        around = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
        return any(outer.endswith(name) for name in self.names("modules_to_save") for outer in around)

    def _matches(self, pattern: str, module: str, *, end: bool = False) -> bool:
        """Say whether a pattern matches a name.

        Raises:
            UserError: If it is not a regular expression, or takes very long to match.
        """
        try:
            compile_pattern(pattern)
            return compile_pattern(rf"(?:.*\.)?(?:{pattern})" if end else pattern).matches(module)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
