"""Prepares recipes as TFDS data sets in array_record files, and reads them back; no TensorFlow."""

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxgen.data.recipe import Recipe, decode, size_of
from jaxgen.errors import UserError
from jaxgen.parallel.runtime import synchronise
from jaxgen.storage import Path, as_path, copy_whole, explain, is_full, is_remote, write_json

VERSION = "1.0.0"
INFO = "dataset_info.json"  # of TFDS; a set is there when this is
LOCAL = "~/.cache/jaxgen/data"


def prepare(name: str, recipe: Recipe, root: Path) -> Any:
    """The TFDS builder of a prepared set under `root`; prepares it first where it is missing. Process 0 prepares.

    Unreadable pictures and those without a caption are dropped and counted in problems.json."""
    import logging

    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    logging.getLogger("absl").setLevel(logging.ERROR)  # its advice is for authors of published sets

    class Captioned(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(VERSION)
        problems: dict[str, int] = {}  # noqa: RUF012

        def _info(self) -> Any:
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "captions": tfds.features.Sequence(tfds.features.Text()),
                "meta": tfds.features.Text(),
            }
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, manager: Any) -> dict[str, Any]:
            found = {}
            for split in recipe.splits():
                examples = self._generate_examples(split)
                first = next(examples, None)
                if first is not None:  # TFDS cannot write an empty split
                    found[split] = itertools.chain([first], examples)
            if not found:
                raise UserError(f"data.name={name}: not one readable picture with a caption ({dict(self.problems)})")
            return found

        def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
            seen = set()
            for example in recipe.examples(split):
                captions = [c.strip() for c in example.captions if c.strip()]
                problem = "no caption" if not captions else "unreadable" if decode(example.image) is None else None
                if example.key in seen:
                    problem = "listed twice"
                if problem:
                    self.problems[problem] = self.problems.get(problem, 0) + 1
                    continue
                seen.add(example.key)
                yield example.key, {"image": example.image, "captions": captions, "meta": example.meta}

    Captioned.name = name
    config = tfds.core.BuilderConfig(name=recipe.identity(), version=VERSION)
    # array_record files are written and read on a local disk; a remote root holds the copy that all hosts share.
    local = as_path(LOCAL) if is_remote(root) else root
    opened = lambda: Captioned(data_dir=os.fspath(local), config=config, file_format="array_record")  # noqa: E731
    builder = opened()
    directory = Path(builder.data_dir)
    shared = root / directory.relative_to(local)
    if is_remote(root) and not (directory / INFO).exists() and (shared / INFO).exists():
        copy_whole(shared, directory, last=INFO)
        builder = opened()
    if not (directory / INFO).exists() and jax.process_index() == 0:
        print(f"preparing {name} in {directory}", file=sys.stderr, flush=True)
        try:
            with contextlib.redirect_stdout(sys.stderr):  # a run's first line is its own
                builder.download_and_prepare()
        except (OSError, RuntimeError) as error:  # array_record's writer raises RuntimeError
            if not isinstance(error, OSError) and not is_full(error):
                raise
            if not (directory / INFO).exists():
                raise explain(error, directory) from error
            builder = opened()  # another run, begun at the same time, was the first to finish it
        if builder.problems:
            write_json(directory / "problems.json", builder.problems)
            told = ", ".join(f"{count} {problem}" for problem, count in builder.problems.items())
            print(f"{name}: left out {told}", file=sys.stderr)
    if is_remote(root) and jax.process_index() == 0 and not (shared / INFO).exists():
        copy_whole(directory, shared, last=INFO)
    if jax.process_count() > 1:
        synchronise(f"prepared {name}")
        if is_remote(root) and not (directory / INFO).exists():
            copy_whole(shared, directory, last=INFO)
        builder = opened()
    return builder


class Records:
    """A split of a prepared set, by index: encoded picture, captions, meta."""

    def __init__(self, builder: Any, split: str):
        import tensorflow_datasets as tfds

        known = sorted(builder.info.splits)
        if split not in known:
            mend = " (eval.every=0 trains without)" if split == "validation" else ""
            raise UserError(f"{builder.name} has no split {split!r}; it has {', '.join(known)}{mend}")
        # Its examples as they are written: read by TFDS they take five times as long.
        self._examples = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()}).data_source
        self._listed = Path(builder.data_dir) / f"captions-{split}.json"

    def __len__(self) -> int:
        return len(self._examples)

    @property
    def sizes(self) -> np.ndarray:
        """[N, 2]: height and width of each picture. All are read; they were seen to be readable when they were prepared."""
        return np.array([size_of(self[k][0]) or (1, 1) for k in range(len(self))])

    def __getitem__(self, index: int) -> tuple[bytes, list[str], str]:
        from tensorflow_datasets.proto import tf_example_pb2

        example = tf_example_pb2.Example.FromString(self._examples[int(index)])  # ty: ignore
        image, captions, meta = (example.features.feature[name].bytes_list.value for name in ("image", "captions", "meta"))
        return image[0], [caption.decode() for caption in captions], meta[0].decode()

    def captions(self) -> list[list[str]]:
        """Those of each picture, from a file beside the records once they have been read from these."""
        with contextlib.suppress(OSError, ValueError):
            captions = json.loads(self._listed.read_text())
            if len(captions) == len(self):
                return captions
        captions = [self[index][1] for index in range(len(self))]
        if jax.process_index() == 0:
            with contextlib.suppress(UserError):  # they can be read again
                write_json(self._listed, captions)
        return captions
