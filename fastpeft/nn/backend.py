"""Which backend serves a layer, in a word, for reports."""

from .. import ops


def serving_backend(op: str, *args, **kwargs) -> str:
    """The name of the backend that would serve ``fastpeft.ops.<op>(*args, **kwargs)``.

    Where ``FASTPEFT_BACKEND`` asks for one that cannot serve the call, it is the error that the call would raise.

    Args:
        op: The name of a function of ``fastpeft.ops``.
        args: Its arguments, as for ``ops.explain``.
        kwargs: The same.
    """
    try:
        return ops.explain(op, *args, **kwargs).backend
    except ValueError as error:
        return str(error)
