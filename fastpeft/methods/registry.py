"""All methods, in the order in which they are applied."""

from .bottleneck.method import BottleneckMethod
from .lora.method import LoraMethod
from .method import Method
from .prefix.method import PrefixMethod
from .prompt.method import PromptMethod
from .selective.method import SelectiveMethod

METHODS: tuple[Method, ...] = (LoraMethod(), BottleneckMethod(), PromptMethod(), PrefixMethod(), SelectiveMethod())


def method_of(op: str, config: object) -> Method:
    """The method whose config this is.

    Raises:
        TypeError: it is no config.
    """
    for method in METHODS:
        if type(config) is method.config:
            return method
    known = ", ".join(f"fastpeft.{method.config.__name__}" for method in METHODS)
    raise TypeError(f"{op}: config is {type(config).__name__}, expected {known}, or a list of them")


def method_named(name: str) -> Method:
    """The method of this name."""
    return next(method for method in METHODS if method.name == name)


def methods_of(state) -> list[Method]:
    """The methods in use on a model, in their order."""
    return [method for method in METHODS if method.name in state.records]
