"""Any TFDS image set by name, with a caption feature or a caption template for its class labels.

Preparing a standard set needs TensorFlow (extra `tf`) once; the prepared records are then kept as ours are."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jaxgen.data.recipe import Example
from jaxgen.errors import UserError
from jaxgen.storage import first_line

TEMPLATES = {
    "cifar10": "a photo of a {label}",
    "cifar100": "a photo of a {label}",
    "mnist": "a handwritten digit {label}",
    "fashion_mnist": "a picture of a {label}",
    "oxford_flowers102": "a photo of a {label}, a type of flower",
    "oxford_iiit_pet": "a photo of a {label}",
    "food101": "a photo of {label}",
    "imagenette": "a photo of a {label}",
}
CAPTIONS = (("captions", "text"), ("captions",), ("caption",), ("text",), ("description",))


@dataclass(frozen=True)
class TfdsSet:
    """Mirrored only where asked: captions may speak of sides, digits have them."""

    name: str
    data_dir: str | None = None
    template: str | None = None
    flip = False
    crop = False

    def identity(self) -> str:
        text = f"{self.name} {self._template()}"
        return "v1_" + hashlib.sha256(text.encode()).hexdigest()[:12]

    def splits(self) -> tuple[str, ...]:
        return tuple(_ours(split) for split in self._prepared().info.splits)

    def examples(self, split: str) -> Iterator[Example]:
        import tensorflow_datasets as tfds

        builder = self._prepared()
        original = next(name for name in builder.info.splits if _ours(name) == split)
        try:
            source = builder.as_data_source(original, decoders={"image": tfds.decode.SkipDecoding()})
        except NotImplementedError:
            raise UserError(
                f"tfds:{self.name} was prepared before in {builder.data_dir} as {builder.info.file_format.value}, which "
                "cannot be read by index: set data.source to another directory for a copy that can"
            ) from None
        for index in range(len(source)):
            record = source[index]
            yield Example(str(index), record["image"], self._captions(builder.info.features, record))

    def _captions(self, features: Any, record: Any) -> list[str]:
        template = self._template()
        if template and "label" in features:
            label = features["label"].int2str(int(record["label"]))
            return [template.format(label=label.replace("_", " "))]
        for path in CAPTIONS:
            value = record
            for name in path:
                value = value.get(name) if isinstance(value, dict) else None
            if value is not None:
                several = [value] if isinstance(value, bytes | str) else list(value)
                return [c.decode() if isinstance(c, bytes) else str(c) for c in several]
        raise UserError(
            f"tfds:{self.name} has no caption feature among {', '.join(features)}: "
            'give data.caption_template, as in "a photo of a {label}"'
        )

    def _template(self) -> str | None:
        return self.template or TEMPLATES.get(self.name.split("/")[0].split(":")[0])

    def _prepared(self) -> Any:
        """The builder, its records on disk: before that TFDS does not know a set's splits."""
        builder = self._builder()
        try:
            builder.download_and_prepare(file_format="array_record")
        except Exception as error:
            missing = "tensorflow" in str(error).lower() or isinstance(error, ImportError)
            mend = 'install TensorFlow once for that: `uv sync --extra tf` or `pip install "jaxgen[tf]"`' if missing else ""
            raise UserError(f"tfds:{self.name} cannot be prepared ({first_line(error)[:200]}); {mend}".rstrip("; ")) from error
        return builder

    def _builder(self) -> Any:
        import tensorflow_datasets as tfds

        try:
            return tfds.builder(self.name, data_dir=self.data_dir)
        except tfds.core.DatasetNotFoundError:
            raise UserError(f"data.name=tfds:{self.name}: TFDS knows no such set; see its catalogue") from None
        except ImportError as error:
            raise UserError(
                f"tfds:{self.name} needs a package that is missing ({first_line(error)[:200]}): for TensorFlow run "
                '`uv sync --extra tf` or `pip install "jaxgen[tf]"`'
            ) from None


def _ours(split: str) -> str:
    return {"valid": "validation", "val": "validation"}.get(split, split)
