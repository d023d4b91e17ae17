"""Reads the operator's YAML files, so that no two readers could understand one differently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from guard.errors import ConfigError


def read_yaml(path: Path, what: str) -> Any:
    """Read a YAML file; nothing but plain values, and no key given twice.

    Args:
        path: The file.
        what: What it is, for errors: `settings file`.

    Raises:
        ConfigError: If it can't be read or is not such YAML.
    """
    try:
        return parse_yaml(path.read_text(encoding="utf-8"), f"{what} {path}")
    except OSError as error:
        raise ConfigError(f"{what} {path} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} {path} is not UTF-8") from error


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML as `read_yaml` does.

    Raises:
        ConfigError: If it is not such YAML; the message begins with `where`.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        words = " ".join(str(error).split()) or "nested too deeply"
        raise ConfigError(f"{where} is not valid YAML: {words}") from error


class _StrictLoader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping from the node."""
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            raise yaml.YAMLError(f"a key is given twice near line {node.start_mark.line + 1}")
        return mapping
