"""The settings in the `adapter_config.json` of Hugging Face's peft, which may come from an untrusted source.

Every value is checked before it is used. A setting that changes what the adapter computes is refused if surm_jax has no
counterpart for it, and the error message names the setting.
"""

from pathlib import Path
from typing import Any

from surm_jax.errors import UserError
from surm_jax.files import read_json
from surm_jax.paths import compile_pattern

_MOST_BYTES = 2**20
_LARGEST = 1e30

_WHERE = frozenset({"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"})
"""The names of settings that select modules, either for an update or to be trained as a whole.

`load_peft` finds these modules by the names of the tensors instead.
"""

_ABOUT_TRAINING = frozenset(
    "auto_mapping base_model_name_or_path ensure_weight_tying eva_config inference_mode"
    " init_lora_weights init_weights loftq_config lora_dropout lora_ga_config megatron_core"
    " module_dropout peft_type peft_version qalora_group_size rank_dropout rank_dropout_scale revision task_type"
    " use_effective_conv2d".split()
)
"""The names of settings that do not change what a trained adapter computes in linear layers."""

_NEUTRAL: tuple[Any, ...] = (None, False, "none", [], {})
"""The values with which a setting has no effect. An unknown setting may have one of them."""


class Settings:
    """The settings in an `adapter_config.json`, with methods that check a value and return it.

    Attributes:
        path: The path of the file, for error messages.
        values: The values of the settings as JSON gives them, by name.
    """

    def __init__(self, path: Path) -> None:
        """Read the file of settings at a path.

        Raises:
            UserError: If the file cannot be read, is larger than 1 MiB, or holds no JSON object.
        """
        self.path = path
        if not path.is_file():
            raise UserError(f"no adapter in {path.parent}: cannot read {path.name} (no such file)")
        self.values = read_json(path, _MOST_BYTES)

    def refuse_others(self, known: frozenset[str]) -> None:
        """Refuse settings that change what the adapter computes but have no counterpart in surm_jax.

        Args:
            known: The names of the settings that the adapter's format reads.

        Raises:
            UserError: If the file has such a setting. The message names the first one.
        """
        for name, value in self.values.items():
            if name not in known | _WHERE | _ABOUT_TRAINING and value not in _NEUTRAL:
                raise self.refusal(name, "which has no counterpart here")
        initial = self.values.get("init_lora_weights", True)
        if not isinstance(initial, bool) and initial not in (None, "gaussian", "eva", "orthogonal"):
            # PiSSA and similar methods move a part of the base weights into the adapter before training starts.
            raise self.refusal(
                "init_lora_weights",
                "with which peft changes the base weights: convert the adapter to plain LoRA with"
                " peft's save_pretrained(path_initial_model_for_weight_conversion=...)",
            )

    def refusal(self, name: str, why: str) -> UserError:
        """Return the error for a refused value of a setting.

        Args:
            name: The name of the setting.
            why: A clause that says why its value is refused, such as "which must be true or false".
        """
        return UserError(f"{self.path} sets {name} = {_short(self.values.get(name))}, {why}")

    def flag(self, name: str) -> bool:
        """Return the value of a setting that must be true or false. The default is false.

        Raises:
            UserError: If the value is neither.
        """
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.refusal(name, "which must be true or false")
        return bool(value)

    def whole(self, name: str, default: int) -> int:
        """Return the value of a setting that must be a whole number, or the default if the setting is missing.

        Raises:
            UserError: If the value is not a whole number.
        """
        value = self.values.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.refusal(name, "which must be a whole number")
        return value

    def names(self, name: str) -> list[str]:
        """Return the value of a setting that must be a list of names. A missing setting or null is an empty list.

        Raises:
            UserError: If the value is not a list of strings.
        """
        value = self.values.get(name) or []
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise self.refusal(name, "which must be a list of module names")
        return value

    def of_module(self, name: str, default: float, exceptions: str, module: str, *, whole: bool = False) -> float:
        """Return the value of a numeric setting for one module.

        Args:
            name: The name of the setting, such as "r".
            default: The value if the setting is missing.
            exceptions: The name of another setting, such as "rank_pattern", that maps regular expressions to the values
                of some modules. The first one that matches the end of the module's name applies, as in
                `peft.utils.other.get_pattern_key`.
            module: The name of the module in peft.
            whole: Whether the value must be a whole number of at least 1. Otherwise it may be any number but 0 whose
                absolute value is below 1e30.

        Raises:
            UserError: If the value is not such a number, or a regular expression is not valid.
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
        """Return whether `target_modules` selects a module for an update, or `None` if its name alone does not decide.

        The name does not decide if the setting is missing or "all-linear", or if `layers_to_transform` or
        `exclude_modules` is set too.
        """
        value = self.values.get("target_modules")
        if value in (None, "all-linear") or any(
            self.values.get(name) not in (None, []) for name in ("layers_to_transform", "exclude_modules")
        ):
            return None
        if isinstance(value, str):
            return self._matches(value, module)
        return any(module == name or module.endswith(f".{name}") for name in self.names("target_modules"))

    def saves(self, module: str) -> bool:
        """Return whether `modules_to_save` selects a module, or another module that contains it.

        As in peft, an entry selects every module with a name that ends with it.
        """
        parts = module.split(".")
        around = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
        return any(outer.endswith(name) for name in self.names("modules_to_save") for outer in around)

    def _matches(self, pattern: str, module: str, *, end: bool = False) -> bool:
        """Return whether a regular expression matches the name of a module.

        The expression must match the whole name. With `end`, it may instead match the last components of the name, such
        as "b.c" of "a.b.c".

        Raises:
            UserError: If the pattern is not a valid regular expression, or matching takes very long.
        """
        try:
            compile_pattern(pattern)
            return compile_pattern(rf"(?:.*\.)?(?:{pattern})" if end else pattern).matches(module)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
