"""Files and folders that a command writes, checked before it computes for minutes."""

from pathlib import Path


def check_files(files: dict[str, Path | None]) -> None:
    """Raises ValueError for a file that could not be written after the run.

    Args:
      files: by option; None for an option that is not given.
    """
    for option, file in files.items():
        if file is not None and file.is_dir():
            raise ValueError(f"{option} {file} is a folder. Write the name of a file.")
        if file is not None and not file.parent.is_dir():
            raise ValueError(
                f"{option} {file}: there is no folder {file.parent}. Make it, or write another."
            )


def check_folder(option: str, folder: Path | None) -> None:
    """Raises ValueError for a folder that could not be made after the run; nothing for None."""
    for place in (folder, *folder.parents) if folder is not None else ():
        if place.exists() and not place.is_dir():
            raise ValueError(
                f"{option} {folder}: {place} is a file, not a folder. Write the name of a folder."
            )
