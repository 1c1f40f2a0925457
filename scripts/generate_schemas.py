"""Writes ``latentdm/signatures.py``, from which Hydra gets a schema of each class that a YAML under ``conf/`` uses.

Run ``make schemas`` after a signature or a YAML has changed. Nothing is listed here: a YAML asks for the schema of
``latentdm.masks.RandomMask`` by its path, ``/latentdm/schema/masks/RandomMask@_here_``, and that is its registration.

The signatures are written to a file because reading them needs the classes, and the classes need torch: Hydra would
take seconds to say that a key is misspelt. hydra-zen's ``builds`` makes the same dataclasses from the same signatures,
but at run time and from the imported class, which is the import that is to be avoided.
"""

import inspect
import os
import re
import types
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from hydra.utils import get_object

ROOT = Path(__file__).parent.parent
FILE = ROOT / "latentdm" / "signatures.py"
REFERENCE = re.compile(r"^\s*- +/latentdm/schema/([\w/]+)", re.MULTILINE)
WIDTH = 120
PLAIN = (bool, int, float, str)
HEADER = '''\
"""The parameters of the classes that the YAMLs under ``conf/`` use. Written by ``make schemas``: do not edit.

Path of a class in latentdm → parameter → its type as OmegaConf knows it, and its default.
"""

from typing import Any

from omegaconf import MISSING

# fmt: off
SIGNATURES: dict[str, dict[str, tuple[Any, Any]]] = {
'''


def main() -> None:
    """Write the file."""
    FILE.write_text(generated(ROOT / "conf"), encoding="utf-8")


def generated(conf: Path) -> str:
    """The text of the module that serves all YAMLs of a folder.

    Args:
        conf: the folder of the config groups.

    Raises:
        ValueError: a YAML asks for what latentdm does not have, or a default cannot be written into a schema.
    """
    names = {name for yaml in conf.rglob("*.yaml") for name in REFERENCE.findall(yaml.read_text(encoding="utf-8"))}
    return HEADER + "".join(map(entry, sorted(names))) + "}\n"


def entry(name: str) -> str:
    """The lines of one class or constructor, such as ``masks/RandomMask`` or ``FrozenVAE/from_pretrained``."""
    path = "latentdm." + name.replace("/", ".")
    try:
        target = get_object(path)
    except (ImportError, ValueError) as error:
        raise ValueError(f"/latentdm/schema/{name}: there is no {path}: {error}") from error
    # A constructor such as from_pretrained reads files. The object that uses its result calls it, on every rank.
    fields = ['"_partial_": (bool, True)'] if inspect.ismethod(target) else []
    for parameter in inspect.signature(target, eval_str=True).parameters.values():
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            fields.append(f'"{parameter.name}": ({field_type(parameter)}, {default(parameter, path)})')
    return "\n".join([f'    "{name}": {{', *wrapped(fields), "    },\n"])


def wrapped(fields: list[str], indent: str = " " * 8) -> list[str]:
    """As many fields as fit on each line."""
    lines: list[str] = []
    for each in fields:
        if lines and len(f"{lines[-1]} {each},") <= WIDTH:
            lines[-1] += f" {each},"
        else:
            lines.append(f"{indent}{each},")
    return lines


def field_type(parameter: inspect.Parameter) -> str:
    """The type of a field, as source. ``Any`` where OmegaConf has no type for what the parameter takes."""
    kind = omegaconf_type(parameter.annotation)
    # A typed dict that has a default takes no new keys from the command line.
    if kind.startswith("dict") and parameter.default is not parameter.empty:
        return "Any"
    return kind


def omegaconf_type(annotation: Any) -> str:
    """``int``, ``list[float]``, ``dict[str, Any]``, ``str | None`` …: the nearest type that OmegaConf checks."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in PLAIN:
        return str(annotation.__name__)
    if isinstance(origin or annotation, type) and issubclass(origin or annotation, os.PathLike):
        return "str"
    if origin is Literal:
        return " | ".join(sorted({omegaconf_type(type(value)) for value in arguments}))
    if origin in (Union, types.UnionType):
        return union_type([omegaconf_type(each) for each in arguments if each is not type(None)], arguments)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"dict[str, {element_type(arguments[1:])}]" if arguments[0] is str else "Any"
    if isinstance(origin, type) and issubclass(origin, Collection):
        element = element_type([each for each in arguments if each is not ...])
        return "Any" if element == "Any" else f"list[{element}]"
    return "Any"


def union_type(kinds: list[str], arguments: tuple[Any, ...]) -> str:
    """A union of plain types, or one list, either with None."""
    kinds = sorted(set(kinds))
    plain = {kind.__name__ for kind in PLAIN}
    if not set(kinds) <= plain and not (len(kinds) == 1 and kinds[0].startswith("list")):
        return "Any"
    return " | ".join([*kinds, "None"] if type(None) in arguments else kinds)


def element_type(arguments: Collection[Any]) -> str:
    """The one plain type of all elements, or ``Any``."""
    kinds = {omegaconf_type(each) for each in arguments}
    [kind] = kinds if len(kinds) == 1 else ["Any"]
    return kind if kind in {each.__name__ for each in PLAIN} else "Any"


def default(parameter: inspect.Parameter, path: str) -> str:
    """The default of a field, as source."""
    value = parameter.default
    if value is parameter.empty:
        return "MISSING"
    try:
        return repr(as_plain(value))
    except TypeError as error:
        raise ValueError(
            f"{path}: the default of {parameter.name} is {value!r}; a schema holds None, numbers, texts, and lists and "
            "dicts of them: take None for a default, and make the object from it"
        ) from error


def as_plain(value: Any) -> Any:
    """A default as YAML could hold it: tuples become lists, paths become texts."""
    if value is None or type(value) in PLAIN:
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): as_plain(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [as_plain(each) for each in value]
    raise TypeError


if __name__ == "__main__":
    main()
