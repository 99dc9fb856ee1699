"""In a source checkout, shows <repo>/kernels as fastpeft.kernels.

A wheel has fastpeft/kernels. A checkout has kernels/ beside fastpeft/, which neither Python's own path search nor an
editable install maps to the import name, so the package module is put into sys.modules before anything asks for it.
kernels/ has no __init__.py: with one, transformers would import it in place of the package called `kernels`.
"""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path

_NAME = f"{__package__}.kernels"


def _show_kernels() -> None:
    package = Path(__file__).parent
    checkout = package.parent / "kernels"
    if _NAME in sys.modules or (package / "kernels").is_dir() or not checkout.is_dir():
        return
    spec = ModuleSpec(_NAME, None, is_package=True)
    spec.submodule_search_locations = [str(checkout)]
    module = sys.modules[_NAME] = module_from_spec(spec)
    # The import system sets this attribute only for what it loads itself.
    vars(sys.modules[__package__])["kernels"] = module


_show_kernels()
