"""Eight-question data sets in the hub's schemas, and a LLaVA checkpoint with random weights to answer them."""

from pathlib import Path

from datasets import Dataset, DatasetDict, Features, Image, Sequence, Value, disable_progress_bars
from PIL import Image as Pillow
from PIL import ImageDraw
from support import make_llava
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

disable_progress_bars()
TEXT, INT, FLAG = Value("string"), Value("int32"), Value("bool")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "black")
MME_CATEGORIES = ("color", "existence", "OCR", "code_reasoning")
_OBJECTS = [{"objectId": TEXT, "value": TEXT}]
FEATURES = {
    "MME": Features({"question_id": TEXT, "image": Image(), "question": TEXT, "answer": TEXT, "category": TEXT}),
    "POPE": Features(
        dict.fromkeys(("id", "question_id", "question", "answer", "image_source"), TEXT)
        | {"image": Image(), "category": TEXT}
    ),
    "textvqa": Features(
        {"image_id": TEXT, "question_id": INT, "question": TEXT, "question_tokens": Sequence(TEXT), "image": Image()}
        | {"image_width": INT, "image_height": INT, "flickr_original_url": TEXT, "flickr_300k_url": TEXT}
        | {"answers": Sequence(TEXT), "image_classes": Sequence(TEXT), "set_name": TEXT, "ocr_tokens": Sequence(TEXT)}
    ),
    "GQA_images": Features({"id": TEXT, "image": Image()}),
    "GQA_instructions": Features(
        dict.fromkeys(("id", "imageId", "question", "answer", "fullAnswer"), TEXT)
        | {"isBalanced": FLAG, "groups": {"global": TEXT, "local": TEXT}, "entailed": TEXT, "equivalent": TEXT}
        | {"types": {"structural": TEXT, "semantic": TEXT, "detailed": TEXT}}
        | {"annotations": {"question": _OBJECTS, "answer": _OBJECTS, "fullAnswer": _OBJECTS}}
        | {"semantic": [{"operation": TEXT, "argument": TEXT, "dependencies": Sequence(INT)}], "semanticStr": TEXT}
    ),
}


def picture(colour: str, label: str = "") -> Pillow.Image:
    image = Pillow.new("RGB", (48, 32), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((8, 6, 38, 26), fill=colour)
    draw.text((10, 10), label, fill="black")
    return image


def _mme() -> list[dict]:
    rows = []
    for number, category in enumerate(MME_CATEGORIES):
        shared = {
            "question_id": f"{category}/{number:04d}.png",
            "image": picture(COLOURS[number]),
            "category": category,
        }
        for colour, answer in ((COLOURS[number], "Yes"), ("white", "No")):
            rows.append(shared | {"question": f"Is the box {colour}? Please answer yes or no.", "answer": answer})
    return rows


def _pope() -> list[dict]:
    return [
        {
            "id": str(i),
            "question_id": str(i + 1),
            "question": f"Is there a {COLOURS[i]} box in the image?",
            "answer": "no" if i % 2 else "yes",
            "image_source": f"COCO_val2014_{i // 2:012d}",
            "image": picture(COLOURS[i // 2 * 2]),
            "category": ("adversarial", "popular", "random")[i % 3],
        }
        for i in range(8)
    ]


def _textvqa() -> list[dict]:
    return [
        {
            "image_id": f"{i:016x}",
            "question_id": 34602 + i,
            "question": f"what word is on sign {i}?",
            "question_tokens": ["what", "word"],
            "image": picture(COLOURS[i], "yes"),
            "image_width": 48,
            "image_height": 32,
            "flickr_original_url": "",
            "flickr_300k_url": "",
            "answers": ["yes"] * (10 - i) + ["stop"] * i,
            "image_classes": ["Sign"],
            "set_name": "val",
            "ocr_tokens": ["yes"],
        }
        for i in range(8)
    ]


def _gqa() -> list[dict]:
    return [
        {
            "id": f"2011{i:05d}",
            "imageId": f"n{i // 2}",
            "question": "Is the box red?" if i % 2 else "What color is the box?",
            "answer": ("yes" if i == 1 else "no") if i % 2 else COLOURS[i // 2],
            "fullAnswer": "",
            "isBalanced": True,
            "groups": {"global": None, "local": "13-x"},
            "entailed": "[]",
            "equivalent": "[]",
            "types": {"structural": "verify" if i % 2 else "query", "semantic": "attr", "detailed": "color"},
            "annotations": {"question": [{"objectId": "0", "value": "1"}], "answer": [], "fullAnswer": []},
            "semantic": [{"operation": "select", "argument": "box", "dependencies": []}],
            "semanticStr": "select: box",
        }
        for i in range(8)
    ]


def tables() -> dict[str, tuple[str, Dataset]]:
    """Data set name → (split, rows)."""
    rows = {
        "MME": ("test", _mme()),
        "POPE": ("test", _pope()),
        "textvqa": ("validation", _textvqa()),
        "GQA_images": ("testdev", [{"id": f"n{i}", "image": picture(COLOURS[i])} for i in range(4)]),
        "GQA_instructions": ("testdev", _gqa()),
    }
    return {name: (split, Dataset.from_list(data, features=FEATURES[name])) for name, (split, data) in rows.items()}


def save_to_disk(root: Path, **replaced: Dataset) -> Path:
    """Write the data sets as ``save_to_disk`` does; ``replaced`` gives other rows for a set."""
    for name, (split, rows) in tables().items():
        DatasetDict({split: replaced.get(name, rows)}).save_to_disk(root / name)
    return root


def save_like_hub(root: Path) -> Path:
    """Write the data sets as the hub holds them: parquet, with the configurations in a README."""
    configurations: dict[str, list[tuple[str, str, str]]] = {}
    for name, (split, rows) in tables().items():
        repository, _, part = name.partition("_")
        configuration = f"testdev_balanced_{part}" if part else "default"
        folder = configuration if part else "data"
        file = root / repository / folder / f"{split}-00000-of-00001.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        rows.to_parquet(file)
        configurations.setdefault(repository, []).append((configuration, split, f"{folder}/{split}-*"))
    for repository, entries in configurations.items():
        lines = [
            f"- config_name: {name}\n  data_files:\n  - split: {split}\n    path: {path}\n"
            for name, split, path in entries
        ]
        (root / repository / "README.md").write_text("---\nconfigs:\n" + "".join(lines) + "---\n")
    return root


def save_checkpoint(root: Path) -> Path:
    """A LLaVA with random weights, 16 visual tokens an image, and its processor, for ``from_pretrained``."""
    words = [
        "yes",
        "no",
        "stop",
        "is",
        "the",
        "box",
        "there",
        "a",
        "in",
        "image",
        "what",
        "color",
        "word",
        "on",
        "sign",
        "please",
        "answer",
        "or",
        "using",
        "single",
        "phrase",
    ]
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", *words, *COLOURS]
    vocabulary += [f"w{i}" for i in range(63 - len(vocabulary))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **special, extra_special_tokens={"image_token": "<image>"}
    )
    images = CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    processor = LlavaProcessor(
        images, fast, patch_size=6, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    processor.save_pretrained(root)
    model = make_llava()
    # Many tokens end an answer, so that random answers are short.
    model.generation_config.eos_token_id = list(range(2, 63, 2))
    model.save_pretrained(root)
    return root
