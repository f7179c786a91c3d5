"""The data sets by name: one line each."""

from collections.abc import Callable
from typing import Any

from jaxgen.data import parquet, tar
from jaxgen.data.builder import Records, prepare
from jaxgen.data.config import DataConfig
from jaxgen.data.emoji import Emoji
from jaxgen.data.flickr8k import Flickr8k
from jaxgen.data.folder import Folder
from jaxgen.data.recipe import Recipe
from jaxgen.data.scenes import Scenes
from jaxgen.data.shards import Format, ShardSet
from jaxgen.data.tfds_sets import TfdsSet
from jaxgen.errors import UserError
from jaxgen.storage import Path, as_path

RECIPES: dict[str, Callable[[DataConfig, str], Any]] = {
    "scenes": lambda c, _: Scenes(c.image_size, c.train_examples, c.paraphrases, languages=c.languages),
    "emoji": lambda c, _: Emoji(_directory(c), c.skin_tones),
    "flickr8k": lambda c, _: Flickr8k(_directory(c)),
    "folder": lambda c, path: Folder(as_path(path)),
    "tfds": lambda c, name: TfdsSet(name, c.source, c.caption_template),
    "tar": lambda c, shards: _shards(c, tar.FORMAT, shards),
    "parquet": lambda c, shards: _shards(c, parquet.FORMAT, shards),
}
ARGUMENTS = {"folder": "PATH", "tfds": "NAME", "tar": "SHARDS", "parquet": "SHARDS"}


def recipe(config: DataConfig) -> tuple[str, Recipe | ShardSet]:
    """(name without its argument, recipe) of a configuration; raises UserError for an unknown name."""
    name, colon, argument = config.name.partition(":")
    if name not in RECIPES or bool(colon) != (name in ARGUMENTS):
        known = ", ".join(f"{n}:{ARGUMENTS[n]}" if n in ARGUMENTS else n for n in RECIPES)
        raise UserError(f"data.name={config.name}: unknown; known: {known}")
    return name, RECIPES[name](config, argument)


def records(config: DataConfig, split: str) -> Any:
    """A split by index (encoded picture, captions, meta), the set prepared or indexed first where that is needed."""
    name, chosen = recipe(config)
    if isinstance(chosen, ShardSet):
        return chosen.records(split, as_path(config.dir))
    return Records(prepare(name, chosen, as_path(config.dir)), split)


def _shards(config: DataConfig, form: Format, pattern: str) -> ShardSet:
    sized = config.max_aspect_ratio > 1
    return ShardSet(form, pattern, config.caption_field, config.max_bad_shards, config.window, sized)


def _directory(config: DataConfig) -> Path:
    if config.source is None:
        raise UserError(f"data.name={config.name} reads its official layout from a directory: set data.source=DIR")
    path = as_path(config.source)
    if not path.is_dir():
        raise UserError(f"data.source={config.source}: no such directory")
    if not any(path.iterdir()):
        raise UserError(f"data.source={config.source} is empty")
    return path
