"""jaxgen: a picture from a sentence, in JAX/Flax, for TPU and GPU, and down to a laptop."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Model", "UserError", "export", "load"]

if TYPE_CHECKING:
    from jaxgen.errors import UserError
    from jaxgen.model import Model, export, load


def __getattr__(name: str) -> Any:
    # Nothing heavy is imported before it is used.
    if name not in __all__:
        raise AttributeError(f"module 'jaxgen' has no attribute {name!r}")
    if name == "UserError":
        from jaxgen.errors import UserError

        return UserError
    from jaxgen import model

    return getattr(model, name)
