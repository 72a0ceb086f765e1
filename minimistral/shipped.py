"""The models that come with the package, and where a model's folder is."""

from pathlib import Path

SHIPPED = Path(__file__).parent / "assets" / "models"
NAMES = ("tales-dense", "tales-moe", "tales-chat")


def find_model(folder_or_name: str | Path) -> Path:
    """The folder of a model: the one given, or a shipped one by its name.

    Raises ValueError where there is neither.
    """
    folder = Path(folder_or_name)
    if folder.is_dir():
        return folder
    names = sorted(path.name for path in SHIPPED.glob("*") if path.is_dir())
    if str(folder_or_name) in names:
        return SHIPPED / folder_or_name
    raise ValueError(f"{str(folder_or_name)!r} is neither a folder nor one of the shipped models "
                     f"{names}: a published checkpoint is loaded from the folder that you "
                     f"downloaded it to")
