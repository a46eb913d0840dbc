"""Build the atlas from the public packages: ``python -m training.base.atlas PACKAGES_DIR``.

``PACKAGES_DIR`` holds the unpacked npm packages named in :data:`PACKAGES` (``npm pack NAME@VERSION``, then ``tar xzf`` into a
folder of the package's own name). Needs ``resvg_py`` (extra ``dev``) to rasterise SVG. The result is committed, so only
people who change the atlas run this.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from studio.art.atlas import ACCESSORIES, CELL, STYLES, resize, trim

PACKAGES = {
    "3d": "@lobehub/fluent-emoji-3d@1.1.0",
    "cartoon": "@iconify-json/noto@1.2.9",
    "flat": "@iconify-json/twemoji@1.2.5",
}
TABLE = "emojibase-data@17.0.0 (labels, tags), joined by hexcode to each set's icon names"

GROUPS = {"animals & nature", "food & drink", "travel & places", "activities", "objects"}
CLASS_OF_SUBGROUP = {
    "mammals": "animal", "reptiles": "animal", "amphibians": "animal", "birds": "bird", "bugs": "bug",
    "marine life": "sea animal", "flowers": "flower", "other plants": "plant", "fruit": "fruit", "vegetables": "vegetable",
    "cooked / prepared": "food", "asian": "food", "sweets & candy": "dessert", "drink": "drink", "dishware": "kitchenware",
    "globes & maps": "landscape", "geographic locations": "landscape", "buildings": "building",
    "religious buildings": "building", "other places": "landscape", "ground transportation": "vehicle",
    "water transportation": "boat", "air transportation": "aircraft", "weather": "weather sign",
    "events & holidays": "decoration", "award medals": "award", "sports": "sports gear", "games & hobbies": "toy",
    "arts & crafts": "art supply", "clothing": "clothing", "musical instruments": "instrument", "music": "instrument",
    "tools": "tool", "computer": "device", "phone": "device", "light, film & video": "device", "sound": "device",
    "science equipment": "tool", "medical": "tool", "books & paper": "book", "money": "object", "mail": "object",
    "writing": "stationery", "office supplies": "stationery", "lock & keys": "object", "household items": "household item",
    "other objects": "object", "hotel": "object",
}  # fmt: skip

NAMED_A = {
    "frog": "frog", "pig face": "pig", "panda": "panda", "fox": "fox", "lion": "lion", "penguin": "penguin",
    "baby chick": "chick", "spouting whale": "whale", "octopus": "octopus", "lady beetle": "ladybug",
    "butterfly": "butterfly", "red apple": "apple", "watermelon": "watermelon", "doughnut": "doughnut",
    "hamburger": "hamburger", "banana": "banana", "automobile": "car", "sailboat": "sailboat", "rocket": "rocket",
    "house": "house", "castle": "castle", "soccer ball": "soccer ball", "mushroom": "mushroom", "cactus": "cactus",
}  # fmt: skip
NAMED_B = {
    "carrot": "carrot", "strawberry": "strawberry", "birthday cake": "cake", "owl": "owl", "turtle": "turtle",
    "tropical fish": "fish", "crab": "crab", "elephant": "elephant", "bus": "bus", "airplane": "airplane",
    "locomotive": "train", "basketball": "basketball", "guitar": "guitar", "key": "key", "umbrella": "umbrella",
    "light bulb": "light bulb", "camera": "camera", "wrapped gift": "gift", "sunflower": "sunflower", "tulip": "tulip",
    "evergreen tree": "pine tree", "snail": "snail", "teddy bear": "teddy bear", "drum": "drum",
}  # fmt: skip
SYNONYMS = {
    "frog": ["toad"], "pig": ["piglet"], "panda": ["panda bear"], "fox": ["red fox"], "lion": ["male lion"],
    "penguin": ["little penguin"], "chick": ["baby chick"], "whale": ["spouting whale"], "octopus": ["eight-armed octopus"],
    "ladybug": ["lady beetle"], "butterfly": ["moth"], "apple": ["red apple"], "watermelon": ["melon slice"],
    "doughnut": ["donut"], "hamburger": ["burger"], "banana": ["peeled banana"], "car": ["automobile"],
    "sailboat": ["sailing boat"], "rocket": ["spaceship"], "house": ["home"], "castle": ["fortress"],
    "soccer ball": ["football"], "mushroom": ["toadstool"], "cactus": ["desert cactus"], "strawberry": ["red berry"],
    "cake": ["birthday cake"], "owl": ["horned owl"], "turtle": ["tortoise"], "fish": ["tropical fish"],
    "crab": ["red crab"], "airplane": ["plane"], "train": ["locomotive"], "guitar": ["electric guitar"],
    "camera": ["photo camera"], "gift": ["wrapped gift"], "pine tree": ["evergreen tree"], "snail": ["garden snail"],
    "umbrella": ["parasol"], "key": ["golden key"], "teddy bear": ["stuffed bear"], "drum": ["snare drum"],
}  # fmt: skip
ACCESSORY_LABELS = {"hat": "top hat", "crown": "crown", "bow": "ribbon", "glasses": "glasses", "balloon": "balloon"}

# Subjects people will want to teach first, and everything drawn like them, stay unseen.
ALWAYS_HELDOUT = {
    "cat face", "cat", "black cat", "dog face", "dog", "guide dog", "service dog", "poodle", "zebra", "dolphin", "pizza",
    "honeybee", "unicorn", "koala", "tiger face", "tiger", "rabbit face", "rabbit", "bear", "snowman", "jack-o-lantern",
    "trophy", "helicopter", "police car", "avocado", "pineapple", "rose", "T-Rex", "duck", "cow face", "monkey face",
    "teapot", "robot", "flamingo", "hedgehog", "giraffe", "cupcake", "tractor", "artist palette", "Christmas tree",
}  # fmt: skip
CLASS_SEEN_COUNT = 250
SKIP = set(ACCESSORY_LABELS.values()) | {
    "foggy", "construction", "railway track", "microbe", "joker", "musical score", "page with curl", "world map",
    "shinto shrine", "confetti ball", "fog", "seat", "station", "ice", "level slider",
}  # fmt: skip


def svg_icon(icons: dict[str, Any], name: str, side: int) -> Image.Image:
    import resvg_py

    icon = icons["icons"].get(name) or icons["icons"][icons["aliases"][name]["parent"]]
    width, height = (icon.get(k, icons.get(k, 16)) for k in ("width", "height"))
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{side}" height="{side}" '
        f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}">{icon["body"]}</svg>'
    )
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side)))).convert("RGBA")


def sprite_of(row: dict[str, Any], style: str, packages: Path, icons: dict[str, dict[str, Any]]) -> np.ndarray:
    """One trimmed sprite whose longer side is :data:`CELL`."""
    if style == "3d":
        path = packages / "@lobehub/fluent-emoji-3d" / "assets" / f"{row['styles']['fluent-3d']}.webp"
        image = Image.open(path).convert("RGBA")
    else:
        image = svg_icon(icons[style], row["styles"][{"cartoon": "noto", "flat": "twemoji"}[style]], 4 * CELL)
    full = trim(np.asarray(image))
    scale = CELL / max(full.shape[:2])
    return resize(full, max(round(full.shape[0] * scale), 1), max(round(full.shape[1] * scale), 1))


def family(label: str) -> str:
    """Concepts with one key go to the same split: ``cow`` and ``cow face`` are near-copies of each other."""
    words = [w for w in label.lower().replace("-", " ").split() if w not in {"face", "oncoming", "with", "new", "the", "red"}]
    return words[-1] if words else label


def split(labels: list[str], classes: dict[str, str]) -> tuple[list[str], dict[str, list[str]]]:
    """Class-seen and held-out labels, by the sha1 of the family; every class word keeps some of both."""
    key = {label: hashlib.sha1(family(label).encode()).hexdigest() for label in labels}
    named_families = {family(label) for label in (*NAMED_A, *NAMED_B)}
    heldout_families = {family(label) for label in ALWAYS_HELDOUT}
    free = [x for x in labels if family(x) not in heldout_families and x not in ALWAYS_HELDOUT]
    # Near-copies of named concepts may only be class-seen: held out, they would be half known.
    seen = [x for x in free if family(x) in named_families]
    by_class: dict[str, list[str]] = defaultdict(list)
    for label in sorted((x for x in free if x not in seen), key=lambda x: (key[x], x)):
        by_class[classes[label]].append(label)
    quota = (CLASS_SEEN_COUNT - len(seen)) / sum(len(v) for v in by_class.values())
    for members in by_class.values():
        seen += members[: round(len(members) * quota)]
    heldout = sorted((x for x in labels if x not in set(seen)), key=lambda x: (x not in ALWAYS_HELDOUT, key[x], x))
    return seen, {"concept": heldout[:120], "zoo": heldout[120:-60], "reserve": heldout[-60:]}


def build(packages: Path, table: Path, out: Path) -> None:
    rows = json.loads(table.read_text("utf-8"))
    by_label = {row["label"]: row for row in rows}
    needed = {"fluent-3d", "noto", "twemoji", "fluent-emoji-flat"}  # in the flat set = released by Microsoft under MIT
    chosen = [
        row for row in rows
        if row["group"] in GROUPS and row["subgroup"] in CLASS_OF_SUBGROUP and needed <= set(row["styles"])
        and row["label"] not in SKIP
    ]  # fmt: skip
    names = {**NAMED_A, **NAMED_B}
    missing = set(names) - {row["label"] for row in chosen}
    if missing:
        raise SystemExit(f"named concepts not in the table: {sorted(missing)}")
    taken = set(names.values())
    name_of = {row["label"]: names.get(row["label"], row["label"]) for row in chosen}
    for label, name in name_of.items():  # the other 'whale' must not share the named one's name
        if label not in names and name in taken:
            name_of[label] = f"{name} (2)"

    icons = {s: json.loads((packages / PACKAGES[s].rsplit("@", 1)[0] / "icons.json").read_text()) for s in ("cartoon", "flat")}
    columns = 32
    entries = chosen + [by_label[ACCESSORY_LABELS[a]] for a in ACCESSORIES if a in ACCESSORY_LABELS]
    out.mkdir(parents=True, exist_ok=True)
    for style in STYLES:
        sheet = np.zeros((-(-len(entries) // columns) * CELL, columns * CELL, 4), np.uint8)
        for index, row in enumerate(entries):
            art = sprite_of(row, style, packages, icons).copy()
            art = (art // 4) * 4 + art // 64  # six bits a channel halve the file and are not seen at 24-30 px
            art[art[..., 3] == 0] = 0
            y, x = (v * CELL for v in divmod(index, columns))
            sheet[y : y + art.shape[0], x : x + art.shape[1]] = art
        Image.fromarray(sheet).save(out / f"{style}.webp", lossless=True, quality=100, method=6, exact=True)

    classes = {row["label"]: CLASS_OF_SUBGROUP[row["subgroup"]] for row in chosen}
    seen, heldout = split([x for x in name_of if x not in names], classes)
    listing = [
        {
            "name": name_of[row["label"]],
            "class": classes[row["label"]],
            "synonyms": SYNONYMS.get(name_of[row["label"]], []),
            "hex": row["hex"],
            "label": row["label"],
            "tags": row["tags"],
        }
        for row in chosen
    ]
    parts = {part: [name_of[x] for x in labels] for part, labels in heldout.items()}
    pairs = [
        [subject, motion]
        for subject, motion in zip(list(NAMED_A.values())[:8], ["left", "right", "up", "down"] * 2, strict=True)
    ]
    dump = {
        "concepts.json": {"cell": CELL, "columns": columns, "packages": PACKAGES, "names": TABLE, "concepts": listing},
        "splits.json": {
            "named_a": list(NAMED_A.values()),
            "named_b": list(NAMED_B.values()),
            "class_seen": [name_of[x] for x in seen],
            "heldout": parts,
            "heldout_motion_pairs": pairs,
        },
    }
    for name, content in dump.items():
        (out / name).write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n", "utf-8")
    print(f"{len(chosen)} concepts, class-seen {len(seen)}, held-out " + ", ".join(f"{k} {len(v)}" for k, v in parts.items()))


if __name__ == "__main__":
    import typer

    def main(packages: Path, table: Path, out: Path = Path("assets/atlas")) -> None:
        """Build sprites, names and splits from unpacked PACKAGES and the joined TABLE (JSON rows: label, hex, group,
        styles)."""
        build(packages, table, out)

    typer.run(main)
