"""Parse configurations into the dataclasses of `surm_jax.training.config`, and resolve their relative paths."""

import ast
import contextlib
import dataclasses
import functools
import importlib
import sys
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from surm_jax import data
from surm_jax.errors import UserError, did_you_mean
from surm_jax.peft import METHODS, make_method
from surm_jax.pretrained.sources import is_path
from surm_jax.record.inputs import started_in
from surm_jax.record.workdir import read_config, relocated
from surm_jax.training.config import PeftConfig, RunConfig


def base_config(plugins: Collection[str] = (), folders: Iterable[Path] = ()) -> ml_collections.ConfigDict:
    """Return a configuration with the default value of every key, from which a configuration file starts.

    >>> config = base_config()
    >>> config.peft.lora.rank, config.optim.groups.head.weight_decay
    (1, 0.0)

    Args:
        plugins: Names of Python modules to import first, so that the methods that they register have keys in the
            configuration. The names also become the value of the key `plugins`.
        folders: See `import_plugins`.

    Raises:
        UserError: A module cannot be imported.
    """
    import_plugins(plugins, folders)
    return ml_collections.ConfigDict(to_dict(RunConfig(plugins=tuple(plugins))))


def plugins_of(given: Sequence[str]) -> tuple[str, ...]:
    """Return the modules that the command-line option `--config.plugins` names, as a tuple.

    `launch.py` imports them before it reads the configuration, because they may register methods, whose settings are
    keys of the configuration.

    >>> plugins_of(["('my_family',)"]), plugins_of([])
    (('my_family',), ())

    Args:
        given: The values of the option, one for each time that it was given. The last one counts.

    Raises:
        UserError: The value is not a tuple of strings.
    """
    try:
        modules = ast.literal_eval(given[-1]) if given else ()
    except (ValueError, SyntaxError):
        modules = None
    if not isinstance(modules, tuple) or not all(isinstance(module, str) for module in modules):
        raise UserError(f"config.plugins must be a tuple of module names, such as \"('my_family',)\", got {given[-1]}")
    return modules


def import_plugins(modules: Iterable[str], folders: Iterable[Path] = ()) -> None:
    """Import Python modules of the user that register methods, matrix families, models or tasks.

    They are looked for in `sys.path`, the given folders and the working directory, in this order. The folders are
    appended to `sys.path`.

    Raises:
        UserError: A module cannot be imported.
    """
    places = [str(folder) for folder in (*folders, Path.cwd())]
    for module in modules:
        sys.path += [place for place in places if place not in sys.path]
        try:
            importlib.import_module(module)
        except Exception as error:  # Importing a module runs the user's code, which can raise anything.
            raise UserError(
                f"config.plugins: cannot import {module!r} ({type(error).__name__}: {error}); looked for in"
                f" {', '.join(places)} and in $PYTHONPATH"
            ) from error


def parse(config: ml_collections.ConfigDict | Mapping[str, Any], folders: Iterable[Path] = ()) -> RunConfig:
    """Check all keys and values of a configuration, and convert it to the dataclass `RunConfig`.

    The modules in its key `plugins` are imported first, also from the given folders. Missing keys get their defaults.

    >>> parse(base_config()).model.variant
    'B/16'

    Raises:
        UserError: A key is unknown (the message names the most similar one), a key without default is missing, a value
            is not allowed, or a plugin cannot be imported.
    """
    tree = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else dict(config)
    import_plugins(_value(tuple[str, ...], tree.get("plugins", ()), "config.plugins"), folders)
    peft = dict(_section(tree.get("peft", {}), "config.peft"))
    settings = [field.name for field in dataclasses.fields(PeftConfig) if field.name != "methods"]
    _require_known("config.peft", peft, (*settings, *METHODS))
    methods = {
        name: make_method(name, dict(_section(peft.pop(name), f"config.peft.{name}")))
        for name in METHODS
        if name in peft
    }
    tree["peft"] = peft
    parsed = _build(RunConfig, tree, "config")
    return dataclasses.replace(
        parsed, peft=dataclasses.replace(parsed.peft, methods={**parsed.peft.methods, **methods})
    )


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Return a configuration as nested dictionaries. `parse` converts them back."""
    tree = dataclasses.asdict(config)
    tree["peft"].update(tree["peft"].pop("methods"))
    return tree


def complete(tree: Mapping[str, Any], folders: Iterable[Path] = ()) -> dict[str, Any]:
    """Check a saved configuration, and add the default values of missing keys."""
    return to_dict(parse(tree, folders))


def saved_config(workdir: Path, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Read the configuration of the run in a folder, and replace some of its values.

    Plugins and relative paths are also looked for in the folder where the run was started.

    Args:
        workdir: The folder of the run.
        overrides: New values of keys. Only the keys in `surm_jax.record.workdir.CHANGEABLE` may get another value: the
            places of data and weights, and keys that change the results only by rounding.

    Raises:
        UserError: There is no run in the folder, its configuration is damaged, or `overrides` gives another value to a
            key that must not change.
    """
    tree = read_config(workdir, functools.partial(complete, folders=list(started_in(workdir))))
    return resolved(parse(relocated(tree, overrides or {})), workdir)


def resolved(config: RunConfig, workdir: Path) -> RunConfig:
    """Return a configuration in which existing relative paths of data and weights are absolute.

    A relative path is looked for in the working directory, and then in the one where the run was first started.

    Args:
        config: The configuration.
        workdir: The folder of the run.
    """
    folders = [Path.cwd(), *started_in(workdir)]
    name, checkpoint = config.data.name, config.model.checkpoint
    return dataclasses.replace(
        config,
        data=dataclasses.replace(
            config.data,
            name=_absolute(name, folders) if data.is_path(name) else name,
            dir=_absolute(config.data.dir, folders) if config.data.dir else "",
        ),
        model=dataclasses.replace(
            config.model, checkpoint=_absolute(checkpoint, folders) if is_path(checkpoint) else checkpoint
        ),
    )


def _absolute(path: str, folders: Iterable[Path]) -> str:
    with contextlib.suppress(RuntimeError):  # There is no such user. The error is raised where the path is opened.
        for folder in folders:
            if (place := folder / Path(path).expanduser()).exists():
                return str(place.absolute())
    return path


def keys(config: ml_collections.ConfigDict) -> list[str]:
    """Return all dotted keys of a configuration, those of sections and of the values in them.

    >>> "peft.lora.rank" in keys(base_config())
    True
    """
    found = []
    for key, value in config.items():
        found.append(key)
        if isinstance(value, ml_collections.ConfigDict):
            found += [f"{key}.{below}" for below in keys(value)]
    return found


def require_key(config: ml_collections.ConfigDict, key: str) -> None:
    """Check that a configuration has a key, and that this key is not a section.

    Args:
        config: The configuration.
        key: The key in dotted form, such as "optim.steps".

    Raises:
        UserError: There is no such key (the message names the most similar one), or it is a section.
    """
    known = keys(config)
    if key not in known:
        raise UserError(f"the configuration has no key {key!r}{meant_key(config, key) or did_you_mean(key, known)}")
    if isinstance(config[key], ml_collections.ConfigDict):
        inside = _values_in(config, key)
        near = f": give one of its keys, such as --config.{inside[0]}" if inside else " without keys"
        raise UserError(f"config.{key} is a section{near}")


def require_steps(config: ml_collections.ConfigDict, overrides: Mapping[str, Any]) -> None:
    """Raise an error if `--config.optim.steps` is given on the command line but has no effect.

    Args:
        config: The configuration.
        overrides: The values given on the command line, by dotted key.

    Raises:
        UserError: The configuration sets `optim.epochs`, from which the number of steps is computed.
    """
    epochs = config.optim.epochs
    if epochs and "optim.steps" in overrides and "optim.epochs" not in overrides:
        raise UserError(
            f"config.optim.epochs={epochs:g} determines the number of steps: give --config.optim.epochs=0 with"
            " --config.optim.steps"
        )


def meant_key(config: ml_collections.ConfigDict, name: str) -> str:
    """Return "did you mean ...?" for an error message, with up to three keys that end in `name`, or an empty text.

    It helps if the user left out the section of a key, such as `log` in `log.checkpoint_every`.

    >>> meant_key(base_config(), "rank_of_noise"), meant_key(base_config(), "checkpoint_every")
    ('', '; did you mean --config.log.checkpoint_every?')
    """
    ends = [key for key in keys(config) if f".{key}".endswith(f".{name}")]
    meant = [inside[0] for key in sorted(ends, key=lambda key: key.count(".")) if (inside := _values_in(config, key))]
    return f"; did you mean {' or '.join(f'--config.{key}' for key in meant[:3])}?" if meant else ""


def _values_in(config: ml_collections.ConfigDict, key: str) -> list[str]:
    """Return the dotted keys of all values inside a section, or `[key]` if `key` is not a section.

    They are sorted for suggestions: less deeply nested keys come first, and among those of equal depth the keys of the
    chosen method, such as `optim.learning_rate.lora` for the method `lora`.
    """
    values = [known for known in keys(config) if not isinstance(config[known], ml_collections.ConfigDict)]
    inside = [value for value in values if f"{value}.".startswith(f"{key}.")]
    return sorted(inside, key=lambda value: (value.count("."), not value.endswith(f".{config.peft.method}"), value))


def _section(value: Any, path: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{path} must be a section with keys, got {value!r}")
    return value


def _require_known(path: str, given: Iterable[str], known: Collection[str]) -> None:
    for key in given:
        if key not in known:
            raise UserError(f"{path} has no key {key!r}{did_you_mean(key, known)} (known: {', '.join(known)})")


def _build(cls: type, tree: Mapping[str, Any], path: str) -> Any:
    hints = typing.get_type_hints(cls)
    _require_known(path, tree, hints)
    for field in dataclasses.fields(cls):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in tree:
            raise UserError(f"{path} lacks the key {field.name!r}")
    return cls(**{key: _value(hints[key], value, f"{path}.{key}") for key, value in tree.items()})


def _value(hint: Any, value: Any, path: str) -> Any:
    """Convert a value of a configuration to the type of its dataclass field, or raise an error.

    Lists become tuples, integers become floats where a float is expected, and dictionaries become dataclasses.

    Args:
        hint: The type of the field.
        value: The value in the configuration.
        path: The dotted key with "config.", for error messages.

    Raises:
        UserError: The value has another type.
    """
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _build(hint, _section(value, path), path)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{path} must be a tuple, got {value!r}")
        return tuple(_value(arguments[0], item, f"{path}.{place}") for place, item in enumerate(value))
    if origin is Mapping and arguments[1] is Any:
        return dict(_section(value, path))
    if origin is Mapping:
        _require_known(path, _section(value, path), METHODS)
        return {key: _value(arguments[1], item, f"{path}.{key}") for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise UserError(f"{path} must be of the type {hint.__name__}, got {value!r}")
    return value
