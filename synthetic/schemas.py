"""Columns of the four data sets, as on the hub cards of lmms-lab's GQA, MME, textvqa and POPE."""

from datasets import Features, Image, Sequence, Value

_TEXT, _INT, _FLAG = Value("string"), Value("int32"), Value("bool")
_OBJECTS = [{"objectId": _TEXT, "value": _TEXT}]

FEATURES = {
    "GQA_images": Features({"id": _TEXT, "image": Image()}),
    "GQA_instructions": Features(
        {
            "id": _TEXT,
            "imageId": _TEXT,
            "question": _TEXT,
            "answer": _TEXT,
            "fullAnswer": _TEXT,
            "isBalanced": _FLAG,
            "groups": {"global": _TEXT, "local": _TEXT},
            "entailed": _TEXT,
            "equivalent": _TEXT,
            "types": {"structural": _TEXT, "semantic": _TEXT, "detailed": _TEXT},
            "annotations": {"question": _OBJECTS, "answer": _OBJECTS, "fullAnswer": _OBJECTS},
            "semantic": [{"operation": _TEXT, "argument": _TEXT, "dependencies": Sequence(_INT)}],
            "semanticStr": _TEXT,
        }
    ),
    "MME": Features({"question_id": _TEXT, "image": Image(), "question": _TEXT, "answer": _TEXT, "category": _TEXT}),
    "POPE": Features(
        {
            "id": _TEXT,
            "question_id": _TEXT,
            "question": _TEXT,
            "answer": _TEXT,
            "image_source": _TEXT,
            "image": Image(),
            "category": _TEXT,
        }
    ),
    "textvqa": Features(
        {
            "image_id": _TEXT,
            "question_id": _INT,
            "question": _TEXT,
            "question_tokens": Sequence(_TEXT),
            "image": Image(),
            "image_width": _INT,
            "image_height": _INT,
            "flickr_original_url": _TEXT,
            "flickr_300k_url": _TEXT,
            "answers": Sequence(_TEXT),
            "image_classes": Sequence(_TEXT),
            "set_name": _TEXT,
            "ocr_tokens": Sequence(_TEXT),
        }
    ),
}
SPLITS = {
    "GQA_images": "testdev",
    "GQA_instructions": "testdev",
    "MME": "test",
    "POPE": "test",
    "textvqa": "validation",
}
