"""YAML texts of settings, whose keys may be nested or dotted, as flat tables that know their lines.

Owns the reading and the checks of single values. Which keys there are is its callers' to say.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, cast

import yaml

from legion_shm.errors import ConfigError

__all__ = ["Setting", "read_settings"]

_WORDS = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}


@dataclass(frozen=True)
class Setting:
    """One value with the place where it stands. ``where`` reads ``legion_config, line 12``."""

    key: str
    value: object
    where: str

    def error(self, expected: str) -> ConfigError:
        given = repr(self.value)
        given = given if len(given) <= 80 else given[:77] + "..."
        return ConfigError(f"{self.where}: {self.key}: expected {expected}, got {given}", key=self.key)

    @property
    def empty(self) -> bool:
        """Whether nothing was written: a template leaves keys empty that keep their default."""
        return self.value is None or (isinstance(self.value, str) and not self.value.strip())

    def flag(self) -> bool:
        if isinstance(self.value, bool):
            return self.value
        word = _WORDS.get(str(self.value).strip().lower()) if isinstance(self.value, (str, int)) else None
        if word is None:
            raise self.error("true or false")
        return word

    def text(self) -> str:
        if isinstance(self.value, bool) or not isinstance(self.value, (str, int, float)):
            raise self.error("text")
        return str(self.value).strip()

    def seconds(self) -> float:
        number = self._number("a number of seconds above 0")
        if not 0 < number < float("inf"):
            raise self.error("a number of seconds above 0")
        return number

    def count(self, least: int, most: int) -> int:
        wanted = f"a whole number from {least} to {most}"
        number = self._number(wanted)
        if number != number or number in (float("inf"), float("-inf")) or number != int(number):
            raise self.error(wanted)
        if not least <= number <= most:
            raise self.error(wanted)
        return int(number)

    def words(self) -> tuple[str, ...]:
        """Command line arguments: one text, split as a shell would, or a list."""
        if isinstance(self.value, str):
            try:
                return tuple(shlex.split(self.value))
            except ValueError as error:
                raise self.error(f"command line arguments ({error})") from None
        return self.texts()

    def texts(self) -> tuple[str, ...]:
        """One text or a list of them."""
        value = self.value
        if isinstance(value, str):
            return (value,)
        if not isinstance(value, list):
            raise self.error("text, or a list of texts")
        items: list[str] = []
        for item in cast("list[object]", value):
            if isinstance(item, bool) or not isinstance(item, (str, int, float)):
                raise self.error("text, or a list of texts")
            items.append(str(item))
        return tuple(items)

    def _number(self, wanted: str) -> float:
        value = self.value
        if isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                raise self.error(wanted) from None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(wanted)
        return float(value)


def read_settings(
    text: str, known: Collection[str], *, where: str, free: Collection[str] = ()
) -> dict[str, Setting]:
    """The settings in a YAML text by dotted key.

    ``known``: every key there is. Those in ``free`` hold a mapping of names of the user's own choice, which
    come as ``key.name``. Raises ConfigError that names the line, and the key where there is one.
    """
    loader: Any = yaml.SafeLoader(text) if "\0" not in text else None
    try:
        if loader is None:
            raise ConfigError(f"{where}: not valid YAML: it holds a NUL character")
        root: yaml.Node | None = loader.get_single_node()
        if root is None:
            return {}
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{where}, {_line(root)}: expected a mapping of settings")
        found = _Found(loader, known, free, where)
        found.read(root, "")
        return found.settings
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{where}{place}: not valid YAML: {error.problem or error}") from None
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where}: not valid YAML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{where}: not valid YAML: it is nested too deeply") from None
    finally:
        if loader is not None:
            loader.dispose()


class _Found:
    def __init__(self, loader: Any, known: Collection[str], free: Collection[str], where: str) -> None:
        self._loader, self._known, self._free, self._where = loader, known, free, where
        self.settings: dict[str, Setting] = {}

    def read(self, node: yaml.MappingNode, prefix: str) -> None:
        self._loader.flatten_mapping(node)
        for key_node, value_node in node.value:
            key = prefix + str(self._value(key_node))
            where = f"{self._where}, {_line(key_node)}"
            if key in self._free:
                self._section(value_node, key, where)
            elif key in self._known or key.rpartition(".")[0] in self._free:
                self._add(Setting(key, self._value(value_node), where))
            elif any(name.startswith(key + ".") for name in (*self._known, *self._free)):
                self._section(value_node, key, where)
            elif any(key.startswith(name + ".") for name in self._free):
                self._add(Setting(key, self._value(value_node), where))
            else:
                raise ConfigError(f"{where}: {key}: unknown{self._hint(key)}", key=key)

    def _section(self, node: yaml.Node, key: str, where: str) -> None:
        if isinstance(node, yaml.MappingNode):
            self.read(node, key + ".")
        elif self._value(node) is not None:
            raise Setting(key, self._value(node), where).error("a mapping")

    def _add(self, setting: Setting) -> None:
        other = self.settings.setdefault(setting.key, setting)
        if other is not setting:
            earlier = other.where.rpartition(", ")[2]
            raise ConfigError(
                f"{setting.where}: {setting.key}: it is set in {earlier} already", key=setting.key
            )

    def _value(self, node: yaml.Node) -> Any:
        return self._loader.construct_object(node, deep=True)

    def _hint(self, key: str) -> str:
        last = key.rpartition(".")[2]
        same = [name for name in self._known if name.rpartition(".")[2] == last]
        near = same or difflib.get_close_matches(key, list(self._known), n=1, cutoff=0.75)
        if near:
            return f"; did you mean {near[0]}?"
        return f"; there are {', '.join(sorted({*self._known, *self._free}))}"


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"
