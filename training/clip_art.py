"""Clip art of classes that have few pictures: only training shows it, so held-out pictures stay what they were."""

from pathlib import Path

from training.sources import find_files

__all__ = ["clip_art"]

_FOLDERS: dict[str, tuple[str, ...]] = {
    "bird": ("animals/birds", "animals/birds/penguin"),
    "car": ("transportation/vehicles",),
    "clock": ("signs_and_symbols/clocks",),
    "fish": ("animals/fish",),
    "flower": ("plants/flowers",),
    "fruit": ("food/fruit",),
    "house": ("buildings/homes",),
    "insect": ("animals/bugs",),
    "moon": ("geography/astronomy",),
    "train": ("transportation",),
}
"""Class and folders of the package."""

_ONLY: dict[str, str] = {
    "car": "4wd blazer car_ car. dodge formula hummer old_car redcar road_runner skoda sportcar toyota 1989 _chevrolet",
    "moon": "05_full moon-",
    "train": "tram. tramway",
}
"""How the files' names begin, where a folder has other things as well."""

_NOT: dict[str, str] = {
    "bird": "baby-tux baby_tux_rory cigni cigno_di_notte contour duck_yellow_ii mirjam ninja stormo turkey_on "
    "tux_didier wing",
    "fish": "amibe bluewhale crawfish dolphin kallisti orca paesaggio seahorse",
    "flower": "bouquet cactus cartoon magnolia-white mazzo mirjam pink-rose sun_flower",
    "fruit": "apple_juic apple_mat banana_mat candied champignon eris fruitcolle grapes_lei gumnut juice kallisti pie_ "
    "slate straw_tote tile tree turkey",
    "house": "abitazione casa_in casa_pluri chalet home8 house_fudriot houses lighthouse",
    "insect": "blue_dragonfly caterpillar lumaca mostriciattolo_ quattro ragn spider virus",
}
"""How names begin of what is none of the class, or several, or has a background."""

_HELD_OUT = ("home11.", "lemon1.", "pineapple", "pinkhome3")
"""Pictures that the stamps have as well, and that are held out there."""


def clip_art(name: str) -> list[Path]:
    """Pictures of a class, cut out.

    Args:
        name: one of `training.objects.CLASSES`; some have none.
    """
    files = [
        path
        for folder in _FOLDERS.get(name, ())
        for path in find_files("openclipart-png", f"usr/share/openclipart/png/{folder}/*.png")
    ]
    wanted = tuple(_ONLY.get(name, "").split()) or ""
    left_out = (*_NOT.get(name, "").split(), *_HELD_OUT)
    return [path for path in files if path.name.startswith(wanted) and not path.name.startswith(left_out)]
