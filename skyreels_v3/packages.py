"""Checks for optional packages, which some flags need and a plain installation lacks. No torch."""

from __future__ import annotations

from importlib.util import find_spec

from skyreels_v3.errors import UserError


def has_packages(*modules: str) -> bool:
    """Whether modules are installed; they are looked up but not imported."""
    return all(find_spec(module) is not None for module in modules)


def check_packages(flag: str, install: str, *modules: str, value: str = "", otherwise: str = "leave it out") -> None:
    """Raise UserError if modules that a flag needs are not installed.

    Args:
        install: the package to install with pip.
        value: the value of the flag, if only that needs them.
        otherwise: what else to do.
    """
    if not has_packages(*modules):
        reason = f"{value}: " if value else ""
        reason += f"needs the package {install.partition('[')[0]}"
        raise UserError(flag, f"{reason}; pip install {quoted(install)}, or {otherwise}")


def quoted(install: str) -> str:
    """Quote a package name for the shell if it has an extra in brackets, which zsh takes for a file pattern."""
    return f'"{install}"' if "[" in install else install
