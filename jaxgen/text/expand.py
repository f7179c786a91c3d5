"""Short prompts in more words, by a language model, as text-to-image services do before they draw (arXiv 2212.09611)."""

import re
from collections.abc import Sequence

from jaxgen.errors import UserError
from jaxgen.text.generate import LanguageModel, load_language_model

DEFAULT = "HuggingFaceTB/SmolLM2-360M-Instruct"
# Examples rather than an instruction: a model that was never taught to follow one goes on with them as well.
TEMPLATE = """Short wishes for a picture, and the same in one longer sentence.
Short: a dog in the snow
Long: a brown dog running through deep snow, fir trees behind it, cold morning light
Short: an old man
Long: an old man with a white beard sitting on a wooden chair, a window on the left, soft shadows
Short: {}
Long:"""


def expand_prompts(
    prompts: Sequence[str],
    model: LanguageModel | str = DEFAULT,
    *,
    template: str | None = None,
    max_new_tokens: int = 48,
    temperature: float = 0.7,
    top_p: float = 0.9,
    seed: int = 0,
) -> list[str]:
    """Each prompt in more words. Nothing the user said is lost: an answer that leaves out one of the prompt's words is put
    behind the prompt, and where there is no answer the prompt stays as it is.

    model: loaded, or what load_language_model takes. template: with {} where the prompt goes, by default the model's own, or
    TEMPLATE; the answer ends at a line's end, and goes on with the prompt itself where {} stands last. seed: with a prompt's
    place in the list it decides what is drawn. Raises UserError where the model does not load, the template has no place for
    the prompt, or they are longer than the model takes."""
    if isinstance(model, str):
        model = load_language_model(model)
    template = template or model.templates.get("expand", TEMPLATE)
    asked = filled(template, prompts)
    answers = model.generate(asked, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    join = continued if template.endswith("{}") else merged
    return [join(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]


def filled(template: str, prompts: Sequence[str]) -> list[str]:
    """The template with each prompt, on one line; raises UserError where it has no one place for it."""
    if template.count("{}") != 1:
        raise UserError(f"the template {template!r} needs {{}} once, where the prompt goes")
    return [template.replace("{}", " ".join(prompt.split())) for prompt in prompts]


def first_line(answer: str) -> str:
    """What an answer says on its first line, without quotation marks; "" where it says nothing."""
    return answer.strip().partition("\n")[0].strip(" \"'“”")


def continued(prompt: str, answer: str) -> str:
    """The prompt and what a model wrote after it, to its line's end."""
    line = answer.partition("\n")[0].rstrip()
    gap = "" if line[:1].isspace() or line[:1] in ",.;:!?" else " "
    return prompt.rstrip() + gap + line if line else prompt


def merged(prompt: str, answer: str) -> str:
    """The answer's first line if it says all that the prompt says, else the prompt with the answer behind it."""
    line = first_line(answer)
    if not line:
        return prompt
    said = set(_words(line))
    return line if all(word in said for word in _words(prompt)) else f"{prompt.rstrip(' .,')}, {line}"


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
