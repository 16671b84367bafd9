"""Command-line flags made from the configuration's fields: the same names, types and messages."""

import argparse
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, get_args

import yaml

from phase5_training.config import TrainingConfig
from phase5_training.errors import UsageError, nearest_match


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line with the nearest flag, raised and not printed."""

    def __init__(self, prog: str, usage: str | None = None, description: str | None = None) -> None:
        # A shortened flag would change its meaning when a flag is added.
        super().__init__(prog, usage, description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving."""
        raise UsageError(f"{self.prog}: {message}; see `{self.prog} --help`")

    def parse_strictly(self, args: Sequence[str]) -> argparse.Namespace:
        """Parse all of ``args``.

        Raises:
            UsageError: an unknown flag, with the nearest that exists, or an argument too many.
        """
        found, rest = self.parse_known_args(self._spelled_out(args))
        for word in rest:
            if word.startswith("-"):
                name = word.split("=", 1)[0]
                flags = [flag for action in self._actions for flag in action.option_strings]
                near = nearest_match(name.lstrip("-"), [f.lstrip("-") for f in flags if f.startswith("--")])
                hint = f"did you mean '--{near}'?" if near else f"see `{self.prog} --help`"
                raise UsageError(f"unknown flag {name!r}; {hint}")
            raise UsageError(f"{word!r} is one argument too many; see `{self.prog} --help`")
        return found

    def _spelled_out(self, args: Sequence[str]) -> list[str]:
        """``--overwrite run.yaml`` as ``--overwrite=true run.yaml``: a file is no yes or no."""
        switches = {flag for action in self._actions if action.nargs == "?" for flag in action.option_strings}
        return [
            f"{word}=true" if word in switches and after.endswith((".yaml", ".yml")) else word
            for word, after in itertools.zip_longest(args, args[1:], fillvalue="")
        ]


def add_config_flags(parser: argparse.ArgumentParser, only: Iterable[str] | None = None) -> None:
    """Add a flag for each field of the configuration.

    A yes-or-no field gets ``--name`` and ``--no-name``; a list takes several words; model_options takes
    ``key=value`` words.

    Args:
        parser: where to add them.
        only: names of fields; None for all.
    """
    group = parser.add_argument_group("options")
    for name, field in TrainingConfig.model_fields.items():
        if only is not None and name not in only:
            continue
        flag, types = "--" + name.replace("_", "-"), _types(field.annotation)
        default = field.get_default(call_default_factory=True)
        shown = (
            {None: "chosen by Forge", "": "empty"}.get(default, default)
            if default not in ({}, [])
            else "none"
        )
        text = f"{(field.description or '').strip()} Default: {shown}.".replace("%", "%%")
        options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": text}
        if bool in types:
            # nargs="?" lets --use-amp stand alone and take "auto" or "false" too.
            group.add_argument(flag, nargs="?", const="true", metavar="BOOL", **options)
            group.add_argument(f"--no-{flag[2:]}", dest=name, action="store_const", const="false",
                               default=argparse.SUPPRESS, help=argparse.SUPPRESS)  # fmt: skip
        elif dict in types:
            group.add_argument(flag, nargs="+", metavar="KEY=VALUE", **options)
        elif list in types:
            group.add_argument(flag, nargs="+", metavar=name.rsplit("_", 1)[-1].upper(), **options)
        else:
            choices = [str(a) for a in _literals(field.annotation)]
            # One word beside any number, as auto for a rate, is no choice of words.
            metavar = (
                "{" + ",".join(choices) + "}"
                if choices and float not in types
                else name.rsplit("_", 1)[-1].upper()
            )
            group.add_argument(flag, metavar=metavar, **options)


def config_values(found: argparse.Namespace) -> dict[str, Any]:
    """The fields given as flags, as Python values ready for the schema.

    Example:
        >>> parser = Parser("forge")
        >>> add_config_flags(parser)
        >>> config_values(parser.parse_strictly(["--batch-size", "8", "--no-use-grokfast"]))
        {'batch_size': 8, 'use_grokfast': False}
    """
    values: dict[str, Any] = {}
    for name, given in vars(found).items():
        if name not in TrainingConfig.model_fields:
            continue
        types = _types(TrainingConfig.model_fields[name].annotation)
        if dict in types:
            values[name] = dict(_key_value(name, word) for word in given)
        elif isinstance(given, list):
            values[name] = given[0] if len(given) == 1 and str in types else list(given)
        elif types <= {str, type(None)}:
            values[name] = None if given == "none" and type(None) in types else given
        else:
            values[name] = _literal(given)
    return values


def _key_value(name: str, word: str) -> tuple[str, Any]:
    key, equals, value = word.partition("=")
    if not equals or not key:
        raise UsageError(f"--{name.replace('_', '-')} has {word!r}; write key=value, as dim=128")
    return key, _literal(value)


def _literal(text: str) -> Any:
    """A word as YAML reads it, so that a flag and a line of the file mean the same."""
    if text.lower() == "none":
        return None
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 takes 1e-3 for text
        except ValueError:
            return value
    return value


def _types(annotation: Any) -> set[Any]:
    """The plain types inside an annotation such as ``Annotated[int, ...] | None``."""
    arguments = get_args(annotation)
    origin = getattr(annotation, "__origin__", None)
    if origin in (list, dict):
        return {origin}
    if not arguments:
        return {annotation if isinstance(annotation, type) else type(annotation)}
    return set().union(*(_types(a) for a in arguments))


def _literals(annotation: Any) -> list[Any]:
    arguments = get_args(annotation)
    if not arguments and not isinstance(annotation, type):
        return [annotation] if isinstance(annotation, (str, int, float)) else []
    return [each for a in arguments if a is not type(None) for each in _literals(a)]
