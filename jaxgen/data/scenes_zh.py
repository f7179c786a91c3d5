"""The scenes' captions in Chinese: 一个小的红色圆形在一个大的蓝色正方形的左边, 三个小的红色圆形."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxgen.data.scenes import Scene

# What scenes call it (a count by its number): the canonical word, then the synonyms of training.
WORDS: dict[str | int, tuple[str, ...]] = {
    1: ("一个", "1个"),
    2: ("两个", "2个", "一对"),
    3: ("三个", "3个", "一组三个"),
    4: ("四个", "4个", "一组四个"),
    "small": ("小的", "小小的", "小号的"),
    "large": ("大的", "大大的", "大号的"),
    "red": ("红色", "红色的", "鲜红色"),
    "green": ("绿色", "绿色的", "草绿色"),
    "blue": ("蓝色", "蓝色的", "宝蓝色"),
    "yellow": ("黄色", "黄色的", "金黄色"),
    "purple": ("紫色", "紫色的", "深紫色"),
    "orange": ("橙色", "橙色的", "橘色"),
    "white": ("白色", "白色的", "雪白色"),
    "black": ("黑色", "黑色的", "乌黑色"),
    "circle": ("圆形", "圆圈", "圆点"),
    "square": ("正方形", "方块", "方形"),
    "triangle": ("三角形", "三角", "三角块"),
    "diamond": ("菱形", "菱形块", "钻石形"),
    "cross": ("十字形", "十字", "加号"),
    "ring": ("圆环", "环形", "空心圆"),
    "stands": ("在", "位于", "处于"),
    "left": ("左边", "左侧", "左方"),
    "right": ("右边", "右侧", "右方"),
    "above": ("上面", "上方", "上边"),
    "below": ("下面", "下方", "下边"),
}
TEMPLATES = ("{}", "画{}", "请画出{}", "图中有{}", "一张有{}的图片", "灰色背景上有{}")


def caption(scene: "Scene") -> str:
    """The canonical caption."""
    return _sentence(scene, lambda thing: WORDS[thing][0])


def paraphrase(scene: "Scene", rng: np.random.Generator) -> str:
    """Another way to say it, for training."""

    def say(thing: str | int) -> str:
        word, *others = WORDS[thing]
        return others[rng.integers(len(others))] if rng.random() < 0.4 else word

    template = TEMPLATES[rng.integers(len(TEMPLATES))]
    return template.format(_sentence(scene, say))


def _sentence(scene: "Scene", say: Callable[[str | int], str]) -> str:
    named = ["".join(map(say, o.description)) for o in scene.objects]
    if scene.relation is None:
        return say(len(named)) + named[0]
    return f"{say(1)}{named[0]}{say('stands')}{say(1)}{named[1]}的{say(scene.relation)}"
