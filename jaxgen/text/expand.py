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
    template: str = TEMPLATE,
    max_new_tokens: int = 48,
    temperature: float = 0.7,
    top_p: float = 0.9,
    seed: int = 0,
) -> list[str]:
    """Each prompt in more words. Nothing the user said is lost: an answer that leaves out one of the prompt's words is put
    behind the prompt, and where there is no answer the prompt stays as it is.

    model: loaded, or what load_language_model takes. template: with {} where the prompt goes; the answer ends at a line's
    end. seed: with a prompt's place in the list it decides what is drawn. Raises UserError where the model does not load, the
    template has no place for the prompt, or they are longer than the model takes."""
    if template.count("{}") != 1:
        raise UserError(f"the template {template!r} needs {{}} once, where the prompt goes")
    if isinstance(model, str):
        model = load_language_model(model)
    asked = [template.replace("{}", " ".join(prompt.split())) for prompt in prompts]
    answers = model.generate(asked, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    return [merged(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]


def merged(prompt: str, answer: str) -> str:
    """The answer's first line if it says all that the prompt says, else the prompt with the answer behind it."""
    line = answer.strip().partition("\n")[0].strip(" \"'“”")
    if not line:
        return prompt
    said = set(_words(line))
    return line if all(word in said for word in _words(prompt)) else f"{prompt.rstrip(' .,')}, {line}"


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
