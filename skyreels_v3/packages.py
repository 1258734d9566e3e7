"""Optional packages: those that a flag needs and a plain installation lacks. No torch."""

from __future__ import annotations

from importlib.util import find_spec

from skyreels_v3.errors import UserError


def has_packages(*modules: str) -> bool:
    """Whether modules can be imported, as far as their files tell."""
    return all(find_spec(module) is not None for module in modules)


def check_packages(flag: str, install: str, *modules: str, value: str = "", otherwise: str = "leave it out") -> None:
    """Raise UserError if modules that a flag needs are not installed.

    Args:
        install: what pip calls their package.
        value: of the flag, if only that needs them.
        otherwise: what to do without them.
    """
    if not has_packages(*modules):
        reason = f"{value}: " if value else ""
        reason += f"needs the package {install.partition('[')[0]}"
        raise UserError(flag, f"{reason}; pip install {quoted(install)}, or {otherwise}")


def quoted(install: str) -> str:
    """What pip calls a package, as shells take it: zsh looks for files that match an extra in brackets."""
    return f'"{install}"' if "[" in install else install
