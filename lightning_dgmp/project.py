"""What a command line names of a project, made without an import of Lightning, of which the project has its own."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

__all__ = ["make_data", "make_module", "place_of", "text_of"]


def make_module(spec: str, arguments: dict[str, Any]) -> Any:
    """The LightningModule that ``spec`` names, called with ``arguments`` if it is a class or a function.

    Raises:
        ValueError: If it cannot be made, or is none.
    """
    found = _make(spec, "The module", arguments)
    from lightning_dgmp.host import LightningModule  # that of the project, which is imported by now

    if not isinstance(found, LightningModule):
        raise ValueError(f"The module must be a `LightningModule`, but {spec!r} is a `{type(found).__name__}`.")
    return found


def make_data(spec: str, arguments: dict[str, Any]) -> Any:
    """The data module or loader that ``spec`` names.

    Raises:
        ValueError: If it cannot be made, or is neither.
    """
    found = _make(spec, "`--data`", arguments)
    if isinstance(found, nn.Module) or not (hasattr(found, "train_dataloader") or isinstance(found, Iterable)):
        raise ValueError(
            f"`--data` must be a LightningDataModule or a loader, but {spec!r} is a `{type(found).__name__}`."
        )
    return found


def _load(spec: str, what: str) -> Any:
    """What ``spec`` names, as ``package.module:Name`` or ``path/to/script.py:Name``.

    Raises:
        ValueError: If there is no such thing, with the reason.
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise ValueError(f"{what} must be given as `package.module:Name` or `script.py:Name`, but is {spec!r}.")
    argv, sys.argv = sys.argv, [place]  # those of the command are not for it
    try:
        if place.endswith(".py"):
            path = Path(place).resolve()
            sys.path.insert(0, str(path.parent))
            found = importlib.util.spec_from_file_location(path.stem, path)
            assert found is not None
            assert found.loader is not None
            module = sys.modules[path.stem] = importlib.util.module_from_spec(found)
            found.loader.exec_module(module)
        else:
            sys.path.insert(0, "")
            module = importlib.import_module(place)
    except Exception as error:
        raise ValueError(f"{what} is {spec!r}, but `{place}` cannot be imported: {text_of(error)}") from error
    except SystemExit:
        raise ValueError(
            f"{what} is {spec!r}, but `{place}` ends the process when it is imported, as scripts do that parse"
            ' arguments. Let it do that under `if __name__ == "__main__":` alone, or name a module that does not.'
        ) from None
    finally:
        sys.argv = argv
    try:
        return getattr(module, name)
    except AttributeError:
        near = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")][:10]
        raise ValueError(f"{what} is {spec!r}, but `{place}` has no `{name}`. It has {', '.join(near)}.") from None


def _make(spec: str, what: str, arguments: dict[str, Any]) -> Any:
    """What ``spec`` names, called with ``arguments`` if it is a class or a function.

    Raises:
        ValueError: If it cannot be made.
    """
    found = _load(spec, what)
    if inspect.isclass(found) or inspect.isroutine(found):
        try:
            found = found(**arguments)
        except Exception as error:
            raise ValueError(f"{what} is {spec!r}, but calling it failed: {text_of(error)}") from error
    return found


def place_of(error: BaseException) -> str:
    """The file and the line of the project's code from which an error comes."""
    libraries = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
    foreign = {Path(__file__).parent, *libraries}
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if foreign.isdisjoint(Path(frame.filename).parents)]
    return "{0.filename}:{0.lineno}".format((own or frames)[-1])


def text_of(error: BaseException) -> str:
    """Its type and what it says."""
    return f"{type(error).__name__}: {error}"
