"""What every command's configuration shares: strict models, YAML files, readable errors."""

import inspect
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from .errors import ConfigError


class StrictModel(BaseModel):
    """A model in which an unknown key is an error, never a silently ignored line."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    @classmethod
    def from_yaml(cls, path: Path) -> Self:
        """Read a YAML file (safe loader) into this model.

        Raises:
            ConfigError: the file is missing, is no YAML mapping, or has a wrong or unknown key;
                the message names the file and the key.
        """
        try:
            text = path.read_text(encoding="utf-8")
            # PyYAML would take the last of two equal keys, and drop the first without a word.
            _refuse_repeats(yaml.compose(text, Loader=yaml.SafeLoader))
            content = yaml.safe_load(text)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            # ValueError: not UTF-8, or what looks like a date and is none.
            raise ConfigError(f"{path}: is not valid YAML: {error}") from error
        if not isinstance(content, dict):
            raise ConfigError(f"{path}: expected a mapping of keys, found {type(content).__name__}")
        return cls.checked(content, str(path))

    @classmethod
    def checked(cls, content: dict[str, Any], origin: str) -> Self:
        """Validate a mapping; errors name `origin` and the key.

        Raises:
            ConfigError: a wrong, missing or unknown key.
        """
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise explain(error, origin) from error


def _refuse_repeats(document: yaml.Node | None) -> None:
    """Refuse a mapping in which a key stands twice.

    Raises:
        MarkedYAMLError: there is one.
    """
    left, seen = [document], set[int]()
    while left:
        node = left.pop()
        if node is None or id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            left += node.value
        if isinstance(node, yaml.MappingNode):
            keys = set[str]()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if key.value in keys:
                        raise yaml.MarkedYAMLError(
                            problem=f"the key {key.value!r} stands there twice",
                            problem_mark=key.start_mark,
                        )
                    keys.add(key.value)
                left.append(value)


class CommandModel(BaseSettings):
    """Base of the commands' models (`cli.Command`): kebab-case options, no environment."""

    model_config = SettingsConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        # The help prints the docstring as it stands, with the indentation of the source.
        cls.__doc__ = inspect.cleandoc(cls.__doc__ or "")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


def explain(error: ValidationError, origin: str, options: bool = False) -> ConfigError:
    """A pydantic error as one that names each key, what was found and what is wrong with it.

    Args:
        origin: where the keys came from, for the message.
        options: name keys as options of a command line.
    """
    lines = []
    for fault in error.errors(include_url=False):
        key = ".".join(str(part) for part in fault["loc"]) or "(top level)"
        if options:
            key = "--" + key.replace("_", "-")
        if fault["type"] == "extra_forbidden":
            lines.append(f"unknown key {key!r}")
        elif fault["type"] == "missing":
            lines.append(f"{key} is missing" if options else f"missing key {key!r}")
        else:
            lines.append(f"{key}: {fault['msg']} (found {fault['input']!r})")
    return ConfigError(f"{origin}: " + "; ".join(lines))
