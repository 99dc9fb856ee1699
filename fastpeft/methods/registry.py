"""All methods, in the order in which they are applied."""

from .attachment import Attachment
from .bottleneck.method import BottleneckMethod
from .lora.method import LoraMethod
from .method import Mergeable, Method
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
    given = f"the class {config.__name__}" if isinstance(config, type) else type(config).__name__
    raise TypeError(f"{op}: config is {given}, expected {known}, PEFT's config of one of these, or a list of them")


def method_named(name: str) -> Method:
    """The method of this name."""
    return next(method for method in METHODS if method.name == name)


def methods_of(state: Attachment) -> list[Method]:
    """The methods in use on a model, in their order."""
    return [method for method in METHODS if method.name in state.records]


def mergeable_of(state: Attachment) -> list[Mergeable]:
    """Those of them whose adapters can be merged."""
    return [method for method in methods_of(state) if isinstance(method, Mergeable)]
