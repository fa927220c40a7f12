"""Reads a run's settings from a YAML file and the command line into `fastjepa.config.Config`, and writes them back.

The dataclasses are the schema: a value is read as its field's annotation says, not as YAML 1.1 would guess it, so `1e-3`
is a number (YAML reads text) and `output_dir: 2024-01-01` is text (YAML reads a date). Everything that is wrong with the
keys and types is reported at once, each with the file, the line, the key, the value and what was expected.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import math
import textwrap
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeGuard, TypeVar, get_args, get_origin, get_type_hints

import yaml

from fastjepa.config.settings import Config, ObjectiveConfig
from fastjepa.config.shipped import shipped_names
from fastjepa.errors import ConfigError

logger = logging.getLogger(__name__)

_Section = TypeVar("_Section")
_Pairs = list[tuple[yaml.Node, yaml.Node]]

_COMMAND_LINE = "command line"
_DEFAULT_OBJECTIVE = "ijepa"
# Settings that have moved since a run may have been written, so that its config.yaml and checkpoints can still be read.
_RENAMED = {
    "masks": "objective.masks",
    "model.predictor_embed_dim": "objective.predictor_embed_dim",
    "model.predictor_depth": "objective.predictor_depth",
}
_NULL = "tag:yaml.org,2002:null"
_PLAIN_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", types.NoneType: "null"}


def load_config(
    path: str | Path | None, overrides: Sequence[str], objective_class: Callable[[str], type[ObjectiveConfig]]
) -> Config:
    """Read a run's settings. `fastjepa.objectives.registry.load_config` calls it with the methods that there are.

    Args:
        path: a YAML file; its keys replace the defaults. None: all defaults. An empty file is all defaults, too.
        overrides: `section.key=value`, the value written as in YAML; they replace the file's, a later one an earlier one.
        objective_class: the settings of a method, by `objective.name`; raises ConfigError for an unknown one.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or has an unknown, repeated, ill-typed or impossible setting;
            one problem a line.
    """
    documents = [] if path is None else [(_read_text(Path(path)), str(path))]
    problems = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if equals:
            documents.append((f"{key.strip()}: {value}", _COMMAND_LINE))
        else:
            problems.append(f"{_COMMAND_LINE}: {override}: expected section.key=value, such as optim.lr=1e-3")
    sources = ([str(path)] if path is not None else []) + ([_COMMAND_LINE] if overrides else [])
    return _read(documents, problems, " and ".join(sources) or "defaults", objective_class)


def config_from_record(record: Mapping[str, Any], objective_class: Callable[[str], type[ObjectiveConfig]]) -> Config:
    """The settings that a checkpoint records as nested dictionaries.

    Raises:
        ConfigError: they have a key or value that this version does not know.
    """
    return _read([(yaml.dump(dict(record), Dumper=_Dumper), "the checkpoint")], [], "the checkpoint", objective_class)


def _read(
    documents: Sequence[tuple[str, str]],
    problems: Sequence[str],
    sources: str,
    objective_class: Callable[[str], type[ObjectiveConfig]],
) -> Config:
    """The settings of YAML texts, each with the name of its source, the later in place of the earlier."""
    name, named_by = _DEFAULT_OBJECTIVE, "defaults"
    for text, source in documents:
        if (found := _objective_name(text)) is not None:
            name, named_by = found, source
    try:
        objective = objective_class(name)
    except ConfigError as error:
        raise ConfigError(f"{named_by}: {error}") from error
    reader = _Reader({"objective": objective})
    reader.problems += problems
    for text, source in documents:
        reader.read(text, source)
    if reader.problems:
        raise ConfigError("\n".join(reader.problems))
    try:
        return _build(Config, reader.values, {"objective": objective})
    except ValueError as error:
        raise ConfigError(f"{sources}: {error}") from error


def _objective_name(text: str) -> str | None:
    """`objective.name` in a YAML text, if it is there: which keys are valid depends on it."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return None  # it is reported when the text is read
    name = _value_of(root, "objective.name") or _value_of(_value_of(root, "objective"), "name")
    return str(name.value) if isinstance(name, yaml.ScalarNode) else None


def _value_of(node: yaml.Node | None, key: str) -> yaml.Node | None:
    """The last value of a key of a mapping; None if there is none."""
    values = [value for own, value in node.value if own.value == key] if isinstance(node, yaml.MappingNode) else []
    return values[-1] if values else None


def dump_config(config: Config) -> str:
    """YAML text with every setting, in the order of the dataclasses, no null standing for a named model's value."""
    return yaml.dump(dataclasses.asdict(config.resolved()), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Writes tuples as one-line lists."""


_Dumper.add_representer(
    tuple, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)
)


class _Mismatch(Exception):
    """A YAML node does not fit the annotation."""


class _Reader:
    """Collects settings from YAML documents, the later in place of the earlier, and all that is wrong with them."""

    def __init__(self, classes: Mapping[str, type]) -> None:
        self.schema = _schema(Config, classes)
        self.values: dict[str, Any] = {}
        """Dotted key -> value."""
        self.problems: list[str] = []

    def read(self, text: str, source: str) -> None:
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader) or yaml.ScalarNode(_NULL, "")
        except yaml.YAMLError as error:
            line, problem = _syntax_problem(error, text)
            place = f"{source}: {text}" if source == _COMMAND_LINE else f"{source}, line {line}"
            self.problems.append(f"{place}: not valid YAML: {problem}")
            return
        if (pairs := _pairs(root)) is not None:
            renamed: dict[str, str] = {}
            self._read_section(pairs, "", source, set(), renamed)
            if renamed:
                changes = ", ".join(f"{old} is now {new}" for old, new in renamed.items())
                logger.warning("%s: read by the names that settings have today: %s", source, changes)
        else:
            self.problems.append(f"{_place(source, root)}: expected lines of `key: value`, got {_excerpt(root)}")

    def _read_section(self, pairs: _Pairs, prefix: str, source: str, seen: set[str], renamed: dict[str, str]) -> None:
        for key_node, node in pairs:
            key = prefix + (key_node.value if isinstance(key_node, yaml.ScalarNode) else _excerpt(key_node))
            if key not in self.schema and (today := _name_of_today(key)) in self.schema:
                renamed[key] = today
                key = today
            place = _place(source, key_node)
            annotation = self.schema.get(key)
            if annotation is None:
                self.problems.append(f"{place}: unknown key {key}{self._hint(key)}")
            elif key in seen:
                self.problems.append(f"{place}: {key} is given twice: remove one")
            elif _is_section(annotation) and (inner := _pairs(node)) is not None:
                self._read_section(inner, f"{key}.", source, seen, renamed)
            else:
                try:
                    self.values[key] = _convert(node, annotation)
                except _Mismatch:
                    self.problems.append(f"{place}: {key} = {_excerpt(node)}: expected {_describe(annotation)}")
            seen.add(key)

    def _hint(self, unknown: str) -> str:
        """The valid key of the most similar name, in whatever section; else the section's keys."""
        section, _, name = unknown.rpartition(".")

        def likeness(key: str) -> tuple[float, float]:
            own = key.rpartition(".")[2]
            score = max(difflib.SequenceMatcher(None, name, own).ratio(), 0.95 * (name in own))
            return score, difflib.SequenceMatcher(None, unknown, key).ratio()

        nearest = max(self.schema, key=likeness)
        if likeness(nearest)[0] >= 0.6:
            return f"; did you mean {nearest}?"
        siblings = [key for key in self.schema if key.rpartition(".")[0] == section]
        return f"; valid keys: {', '.join(siblings or self.schema)}"


def _name_of_today(key: str) -> str:
    """The name that a setting of an earlier version has today."""
    for old, new in _RENAMED.items():
        if key == old or key.startswith(f"{old}."):
            return new + key.removeprefix(old)
    return key


def _schema(cls: type, classes: Mapping[str, type], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> annotation, for every setting and (its dataclass) for every section.

    Args:
        classes: dotted key of a section -> the dataclass that takes the place of its annotation.
    """
    schema: dict[str, Any] = {}
    for name, hint in get_type_hints(cls).items():
        annotation = classes.get(prefix + name, hint)
        schema[prefix + name] = annotation
        if _is_section(annotation):
            schema |= _schema(annotation, classes, f"{prefix}{name}.")
    return schema


def _is_section(annotation: Any) -> TypeGuard[type]:
    return dataclasses.is_dataclass(annotation)


def _build(cls: type[_Section], values: dict[str, Any], classes: Mapping[str, type], prefix: str = "") -> _Section:
    """The dataclass `cls` with the values of the dotted keys under `prefix`; raises what its __post_init__ raises."""
    arguments: dict[str, Any] = {}
    for name, hint in get_type_hints(cls).items():
        annotation = classes.get(prefix + name, hint)
        if _is_section(annotation):
            arguments[name] = _build(annotation, values, classes, f"{prefix}{name}.")
        elif prefix + name in values:
            arguments[name] = values[prefix + name]
    return cls(**arguments)


def _convert(node: yaml.Node, annotation: Any) -> Any:
    """The node's value as the annotation wants it; _Mismatch if it does not fit."""
    if isinstance(annotation, types.UnionType):
        for alternative in get_args(annotation):
            try:
                return _convert(node, alternative)
            except _Mismatch:
                continue
        raise _Mismatch
    if get_origin(annotation) is tuple:
        items = get_args(annotation)
        if not isinstance(node, yaml.SequenceNode):
            raise _Mismatch
        if items[-1] is Ellipsis:
            items = (items[0],) * len(node.value)
        if len(items) != len(node.value):
            raise _Mismatch
        return tuple(_convert(child, item) for child, item in zip(node.value, items, strict=True))
    if not isinstance(node, yaml.ScalarNode):
        raise _Mismatch
    return _convert_scalar(node, annotation)


def _convert_scalar(node: yaml.ScalarNode, annotation: Any) -> Any:
    kind = node.tag.rpartition(":")[2]  # what YAML takes it for; a quoted scalar is always "str"
    quoted = node.style is not None
    if annotation is types.NoneType and kind == "null":
        return None
    if annotation is bool and kind == "bool":
        return yaml.SafeLoader.bool_values[node.value.lower()]
    if annotation is str and kind != "null":
        return node.value
    if get_origin(annotation) is Literal and node.value in get_args(annotation):
        return node.value
    if annotation in (int, float) and not quoted:
        try:
            number = annotation(node.value)
        except ValueError:
            raise _Mismatch from None
        if abs(number) < math.inf:  # neither infinite nor not a number; isfinite fails on large integers
            return number
    raise _Mismatch


def _describe(annotation: Any) -> str:
    """The annotation in plain words."""
    arguments = get_args(annotation)
    if isinstance(annotation, types.UnionType):
        return " or ".join(_describe(alternative) for alternative in arguments)
    if get_origin(annotation) is Literal:
        return f"one of: {', '.join(arguments)}"
    if get_origin(annotation) is tuple:
        count = "" if arguments[-1] is Ellipsis else f"{len(arguments)} "
        return f"a list of {count}{_describe(arguments[0]).removeprefix('a ')}s"
    if _is_section(annotation):
        return f"a section with the keys {', '.join(field.name for field in dataclasses.fields(annotation))}"
    return _PLAIN_WORDS[annotation]


def _pairs(node: yaml.Node) -> _Pairs | None:
    """Keys and values of a mapping; none if there is nothing, as in an empty file or section; None for anything else."""
    if node.tag == _NULL:
        return []
    return node.value if isinstance(node, yaml.MappingNode) else None


def _syntax_problem(error: yaml.YAMLError, text: str) -> tuple[int, str]:
    """The line and what PyYAML says of it."""
    if isinstance(error, yaml.reader.ReaderError):
        return text.count("\n", 0, error.position) + 1, f"{error.reason}: U+{error.character:04X}"
    assert isinstance(error, yaml.MarkedYAMLError)  # all others that composing raises
    assert error.problem_mark is not None
    return error.problem_mark.line + 1, ", ".join(filter(None, (error.context, error.problem)))


def _place(source: str, node: yaml.Node) -> str:
    return source if source == _COMMAND_LINE else f"{source}, line {node.start_mark.line + 1}"


def _excerpt(node: yaml.Node) -> str:
    """The node as it is written."""
    start, end = node.start_mark, node.end_mark
    assert start.buffer is not None  # kept by PyYAML whenever it reads from a str
    return textwrap.shorten(start.buffer[start.pointer : end.pointer], 80, placeholder=" ...") or "nothing"


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: expected a YAML file") from error
    except OSError as error:
        folder = path if path.is_dir() else path.parent
        names = sorted(file.name for file in folder.glob("*.yaml")) if folder.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=1)
        shipped = difflib.get_close_matches(path.stem, shipped_names(), n=1)
        hint = f"{folder} holds {', '.join(names) or 'no .yaml file'}"
        if near or shipped:
            hint = f"did you mean {folder / near[0] if near else shipped[0]}?"
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); {hint}") from error
