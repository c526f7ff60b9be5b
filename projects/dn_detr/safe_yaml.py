"""Read YAML of other people: nothing is executed, and a few lines stay small."""

from __future__ import annotations

from typing import Any

import yaml

MOST_ALIASES = 20
"""Aliases of one document: nested ones multiply, here to at most about 1500 times its size."""

# The one tag of Python that configurations of others use; Detectron2 then reads it as well.
yaml.SafeLoader.add_constructor(
    "tag:yaml.org,2002:python/tuple", lambda loader, node: tuple(loader.construct_sequence(node))
)


class BoundedLoader(yaml.SafeLoader):  # type: ignore[misc]
    """Safe loader that bounds what aliases (`*name`) can multiply."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """See the base class."""
        if self.check_event(yaml.AliasEvent):
            self.aliases = getattr(self, "aliases", 0) + 1
            if self.aliases > MOST_ALIASES:
                raise yaml.YAMLError(f"there must be at most {MOST_ALIASES} aliases (*name)")
        return super().compose_node(parent, index)


def read_yaml(text: str) -> Any:
    """Read one YAML document; a byte order mark at its start is ignored.

    Raises:
        yaml.YAMLError: for invalid YAML, tags of Python objects, too many aliases or levels.
    """
    try:
        return yaml.load(text.removeprefix("\ufeff"), BoundedLoader)
    except RecursionError as error:
        raise yaml.YAMLError("it has too many levels") from error
    except (ValueError, TypeError) as error:  # impossible dates, unhashable keys
        raise yaml.YAMLError(str(error)) from error
