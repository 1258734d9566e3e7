"""The packages of the wheel. The rest is in pyproject.toml, which has no way to add configs/ to the packages it finds.

configs/ is at the root of the repository, where people edit it; in a wheel it is skyreels_v3/configs.
"""

from setuptools import find_packages, setup

CONFIGS = "skyreels_v3.configs"

setup(
    packages=[*find_packages(include=["skyreels_v3", "skyreels_v3.*"]), CONFIGS],
    package_dir={CONFIGS: "configs"},
    package_data={CONFIGS: ["*.yaml"], "skyreels_v3": ["py.typed", "weights/*.safetensors", "web/page.*"]},
)
