"""ComfyUI's model folders."""

from __future__ import annotations

from pathlib import Path

models_dir = "models"
folders: dict[str, list[str]] = {}


def add_model_folder_path(folder_name: str, full_folder_path: str) -> None:
    folders.setdefault(folder_name, []).append(full_folder_path)


def get_folder_paths(folder_name: str) -> list[str]:
    return folders.get(folder_name, [])


def get_filename_list(folder_name: str) -> list[str]:
    return [
        path.name for folder in get_folder_paths(folder_name) for path in sorted(Path(folder).glob("*.safetensors"))
    ]


def get_full_path(folder_name: str, filename: str) -> str | None:
    paths = [Path(folder, filename) for folder in get_folder_paths(folder_name)]
    return next((str(path) for path in paths if path.is_file()), None)
