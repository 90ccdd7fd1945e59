"""Makes the command line's options from `TrainConfig`, so that every setting is stated once."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any

import typer
from rich.markup import escape

from minipar.config import MODELS, TrainConfig


def _help(name: str, metadata: Any, table: dict[str, dict[str, Any]]) -> str:
    text = metadata["help"]
    if metadata["choices"]:
        text += f" [{' | '.join(metadata['choices'])}]"
    defaults = {model: table[model][name] for model in MODELS if name in table[model]}
    if defaults:
        same = len(set(map(str, defaults.values()))) == 1
        shown = (
            str(next(iter(defaults.values()))) if same else ", ".join(f"{m} {v}" for m, v in defaults.items())
        )
        text += f" [default: {shown}]"
    return escape(text)  # brackets would be taken for colours


def config_options(
    defaults: dict[str, dict[str, Any]], **changed: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command that takes `config` one option per setting instead.

    Args:
        defaults: each model's defaults, for the help texts.
        changed: defaults of this command that differ from `TrainConfig`'s.
    """
    hints = typing.get_type_hints(TrainConfig)
    annotated: Any = Annotated  # made at run time, which a type checker does not follow

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        names = [f.name for f in fields(TrainConfig)]

        def wrapper(**given: Any) -> None:
            settings = {name: given.pop(name) for name in names}
            command(config=TrainConfig(**settings), **given)

        parameters = [inspect.Parameter("model", inspect.Parameter.KEYWORD_ONLY, annotation=_MODEL)]
        for f in fields(TrainConfig):
            if f.name == "model":
                continue
            kind = annotated[hints[f.name], typer.Option(help=_help(f.name, f.metadata, defaults))]
            default = changed.get(f.name, f.default)
            parameters.append(
                inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            )
        own = inspect.signature(command, eval_str=True).parameters
        parameters += [
            p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own.values() if p.name != "config"
        ]
        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
        wrapper.__name__, wrapper.__doc__ = command.__name__, command.__doc__
        return wrapper

    return decorate


_MODEL = Annotated[str, typer.Argument(help=f"{', '.join(MODELS[:-1])} or {MODELS[-1]}", metavar="|".join(MODELS))]
