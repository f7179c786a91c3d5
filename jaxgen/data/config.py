"""Which pictures a run learns from, and how they are fed."""

from dataclasses import dataclass, field

from jaxgen.data import buckets
from jaxgen.errors import UserError

LANGUAGES = ("en", "zh")


@dataclass(frozen=True)
class RewriteConfig:
    """Training captions in other words (rewrite.py); off without a source."""

    source: str = ""  # of a language model: a directory (of configs/caption_lm.py) or a Hub id
    template: str = ""  # "… {} …", the caption in it; by default the one the model was trained with, or a few examples
    share: float = 0.5  # of captions that are seen reworded
    variants: int = 2  # a caption
    max_new_tokens: int = 32  # an answer that does not end within them is not taken
    temperature: float = 0.7
    top_p: float = 0.95
    seed: int = 0

    def validate(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise UserError(
                f"data.rewrite.share={self.share} must lie in (0, 1]; without data.rewrite.source nothing is reworded"
            )
        if self.variants < 1 or self.max_new_tokens < 2:
            raise UserError("data.rewrite.variants must be at least 1, data.rewrite.max_new_tokens at least 2")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise UserError("data.rewrite.temperature must be at least 0, data.rewrite.top_p lie in (0, 1]")
        if self.template and self.template.count("{}") != 1:
            raise UserError(f"data.rewrite.template={self.template!r} needs {{}} once, where the caption goes")


@dataclass(frozen=True)
class DataConfig:
    """`name` is scenes, emoji, flickr8k, folder:PATH, tfds:NAME, tar:SHARDS or parquet:SHARDS."""

    name: str = "scenes"
    image_size: int = 32  # pixels along each side of a square
    # Up to how many times as wide as high, or as high as wide, pictures keep their proportions, with as many pixels as the
    # square has (buckets.py); 1 makes squares of all.
    max_aspect_ratio: float = 1.0
    source: str | None = None  # directory with the official layout (emoji, flickr8k)
    dir: str = "~/.cache/jaxgen/data"  # prepared sets are kept here; may be remote
    train_examples: int = 50_000  # scenes only: how many to draw
    paraphrases: int = 1  # scenes only: further captions of each training picture
    languages: tuple[str, ...] = ("en",)  # scenes only: of the captions, "en" and "zh"; their order does not matter
    skin_tones: bool = True  # emoji only: the five skin tones of people and hands, too; half of the set
    caption_template: str | None = None  # tfds only: for sets with class labels, "a photo of a {label}"
    caption_field: str | None = None  # tar and parquet only: of a .json, or a column; by default the first of the usual names
    max_bad_shards: int = 10  # tar and parquet only: shards that cannot be read before the run stops
    window: int = 128  # parquet only: MB of row groups in which pictures are mixed; a host holds up to twice as much
    flip: bool | None = None  # mirror half of the pictures; by default as the set allows
    crop: bool | None = None  # random crops of an eighth; by default as the set allows
    threads: int | None = None  # that read and decode pictures; by default 4, and 64 where pictures come over a network
    max_bad: int = 100  # unreadable pictures met in training before the run stops
    keep_in_memory: int = 512  # MB; a decoded set up to this size is decoded once
    # Keep what the family makes of each picture (latents, tokens) in files beside the set, rather than make it in each step;
    # by default on a CPU, where pictures are not cropped at random.
    precompute: bool | None = None
    rewrite: RewriteConfig = field(default_factory=RewriteConfig)

    def validate(self) -> None:
        if self.image_size < 8:
            raise UserError(f"data.image_size={self.image_size}: at least 8 pixels")
        if self.max_aspect_ratio < 1:
            raise UserError(f"data.max_aspect_ratio={self.max_aspect_ratio} must be at least 1, which makes squares of all")
        buckets.shapes(self.image_size, self.max_aspect_ratio)  # raises where there are none
        for name in ("train_examples", "threads", "window"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"data.{name}={getattr(self, name)} must be at least 1")
        if min(self.paraphrases, self.max_bad, self.max_bad_shards, self.keep_in_memory) < 0:
            raise UserError("data.paraphrases, data.max_bad, data.max_bad_shards and data.keep_in_memory cannot be negative")
        unknown = [language for language in self.languages if language not in LANGUAGES]
        if unknown or not self.languages:
            raise UserError(f"data.languages={','.join(self.languages)}: choose from {', '.join(LANGUAGES)}")
        if self.caption_template is not None and "{label}" not in self.caption_template:
            raise UserError(f"data.caption_template={self.caption_template!r} needs a {{label}} in it")
