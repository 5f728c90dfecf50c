"""The embedded model: its parts load as any LLaVA does, and its training is what it says."""

import csv
import dataclasses
import string
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration
from visibench.models.load import EMBEDDED
from visibench.synthetic.questions import FORBIDDEN, KINDS, WORDS, SceneQuestion
from visibench.synthetic.scene import GRID, HELD_OUT, SIZE, render, sample_scene, sample_word
from visibench.training import train as training
from visibench.training.batches import IGNORE, SUFFIX, Packer, Phase, Stream
from visibench.training.build import make_model, make_processor, make_tokenizer
from visibench.training.knowledge import LABEL_WORDS, MOST, ORDINALS, hints, patch_words

FOLDER = Path(training.__file__).parent
CHECKPOINT = EMBEDDED["tiny"]
shipped = pytest.mark.skipif(not (CHECKPOINT / "model.safetensors").exists(), reason="no checkpoint yet")
KIND_WEIGHTS = {"exist": 1.0, "color": 1.0, "side": 1.0, "verify_text": 1.0, "text": 2.0}


@pytest.fixture
def config():
    phase = {"images": 2, "questions": 3, "patches": 40, "objects": (1, 3), "kinds": KIND_WEIGHTS, "sign": 1.0}
    return {
        "seed": 3,
        "model": {"hidden": 32, "vision_layers": 3, "layers": 2, "intermediate": 48},
        "lr": 0.002,
        "warmup": 2,
        "cosine": [[3, 1.0], [6, 0.05]],
        "weight_decay": 0.02,
        "hint_weight": 1.0,
        "bf16": False,
        "log_every": 2,
        "evaluate": {"every": 4, "limit": 4},
        "save_seconds": 3600,
        "phases": [phase | {"steps": 2, "questions": 0, "answers": 0, "kinds": {}}, phase | {"steps": 4}],
    }


@pytest.fixture(scope="module")
def packer():
    return Packer()


def image(seed=0, **wanted):
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng, forbidden=FORBIDDEN, **wanted)
    return scene, Image.fromarray(render(scene))


def prompt(processor, question):
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


# ---- tokenizer and processor ------------------------------------------------------------------------------------


def test_every_word_of_questions_and_prompts_is_one_token():
    tokenizer = make_tokenizer()
    for word in (*WORDS, *LABEL_WORDS):
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1, word
    rng = np.random.default_rng(0)
    for scene, _ in (image(seed, sign=True) for seed in range(30)):
        for ask in KINDS.values():
            question = ask(scene, rng)
            text = f"{question.text if question else ''}{SUFFIX} Please answer yes or no."
            tokens = tokenizer.convert_ids_to_tokens(tokenizer(text.replace("Please ", "")).input_ids)
            assert "<unk>" not in tokens, text


def test_words_on_signs_are_spelled_and_joined_again():
    tokenizer = make_tokenizer()
    rng = np.random.default_rng(0)
    for _ in range(300):
        word = sample_word(rng, test=bool(rng.random() < 0.5), forbidden=FORBIDDEN | {"and"})
        ids = tokenizer(word, add_special_tokens=False).input_ids
        assert tokenizer.convert_ids_to_tokens(ids) == [word[0], *("##" + letter for letter in word[1:])]
        assert tokenizer.decode(ids) == word
    assert all(
        letter in tokenizer.get_vocab() and f"##{letter}" in tokenizer.get_vocab() for letter in string.ascii_lowercase
    )


def test_an_image_is_144_tokens_after_a_fixed_prefix():
    processor = make_processor()
    _, picture = image()
    text = prompt(processor, f"What color is the circle?{SUFFIX}")
    batch = processor(text=[text, text], images=[picture, picture], return_tensors="pt")
    assert batch["pixel_values"].shape == (2, 3, SIZE, SIZE)
    assert (batch["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<image>")).sum(1).tolist() == [144, 144]
    tokens = processor.tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
    assert tokens[:11] == ["<s>", "a", "chat", "between", "a", "user", "and", "an", "assistant", ".", "user"]
    assert tokens[-2:] == ["assistant", ":"]
    assert "<unk>" not in tokens


def test_batches_are_padded_on_the_left():
    processor = make_processor()
    texts = [prompt(processor, question) for question in ("What color is the circle?", "Is there a ring?")]
    batch = processor(text=texts, images=[image(s)[1] for s in (0, 1)], padding=True, return_tensors="pt")
    assert batch["attention_mask"][:, -1].all()
    assert not batch["attention_mask"][1, 0]


def test_pixels_are_normalised_as_in_training():
    _, picture = image()
    pixels = make_processor().image_processor(picture, return_tensors="pt")["pixel_values"][0]
    expected = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(pixels, expected, atol=1e-5, rtol=0)


# ---- batches ----------------------------------------------------------------------------------------------------


def test_a_batch_depends_on_seed_and_step_alone(packer):
    phase = Phase(steps=4, images=2, questions=2, patches=48, objects=(1, 3), kinds=KIND_WEIGHTS)
    run, resumed = list(Stream([phase], 5, 0)), list(Stream([phase], 5, 2))
    assert len(run), len(resumed) == (4, 2)
    for one, other in zip(run[2:], resumed, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one if key != "kinds")
    assert not torch.equal(run[0]["pixels"], run[1]["pixels"])


def test_what_is_asked_about_is_never_dropped(packer):
    phase = Phase(steps=1, images=16, questions=1, patches=72, objects=(1, 5), kinds=KIND_WEIGHTS, sign=1.0)
    batch = packer.batch(phase, 0, 0)
    background = packer.words["background"]
    for labels, chosen in zip(batch["labels"], batch["chosen"], strict=True):
        something = set((~(labels == background).any(1)).nonzero().flatten().tolist())
        assert something
        assert something <= set(chosen.tolist())
        assert chosen.tolist() == sorted(set(chosen.tolist()))


def test_patches_are_named_after_what_they_show():
    scene, _ = image(3, sign=True, count=(2, 4))
    words = patch_words(scene)
    assert len(words) == GRID * GRID
    for o in scene.objects:
        x, y = (int(c) // 12 for c in o.centre)
        assert {o.shape, o.colour, o.size, "left" if x < 6 else "right"} <= set(words[y * GRID + x])
    spelled = {(named[0], named[1]) for named in words if named[1] in ORDINALS}
    letters = [scene.sign.word[0], *("##" + letter for letter in scene.sign.word[1:])]
    assert spelled == set(zip(letters, ORDINALS, strict=False))


def test_hints_are_what_the_image_shows(packer):
    """Whatever a hint says of a thing is what the question kinds themselves answer about it."""
    rng = np.random.default_rng(4)
    seen = set()
    for _ in range(60):
        scene = sample_scene(rng, sign=True, count=(1, 5), forbidden=FORBIDDEN | {"third"})
        for kind, ask in KINDS.items():
            question = ask(scene, rng)
            if question is None:
                continue
            ids, start = packer.tail(question, "")
            tokens = packer.tokenizer.convert_ids_to_tokens(ids[:start])
            known = hints(tokens, scene, question)
            assert all(len(words) <= MOST and set(words) <= set(packer.words) for words in known.values())
            if kind in ("color", "shape", "size", "side", "count", "exist", "exist_pair"):
                named = min(known)
                assert question.answer in known[named], question
            if kind != "text":
                assert question.answer in known[tokens.index("?")]
            seen.add(kind)
    assert seen == set(KINDS)


@pytest.mark.parametrize(
    ("said", "right"), [("bado", ["yes", "yes", "yes", "yes"]), ("bako", ["yes", "yes", "no", "no"])]
)
def test_hints_follow_a_quoted_word_letter_by_letter(packer, said, right):
    scene, _ = image(5, sign=True)
    scene = dataclasses.replace(scene, sign=dataclasses.replace(scene.sign, word="bado"))
    question = SceneQuestion("verify_text", f'Is the word on the sign "{said}"?', "yes" if said == "bado" else "no")
    ids, start = packer.tail(question, "")
    tokens = packer.tokenizer.convert_ids_to_tokens(ids[:start])
    known = hints(tokens, scene, question)
    opening = tokens.index('"')
    assert known[opening] == ["b"]
    assert [known[opening + k][-1] for k in (1, 2, 3, 4)] == right
    assert [known[opening + k][0] for k in (1, 2, 3)] == ["##a", "##d", "##o"]


def test_facts_are_the_truth_behind_yes_and_no():
    rng = np.random.default_rng(6)
    facts = 0
    for _ in range(80):
        scene = sample_scene(rng, count=(2, 5))
        for ask in (KINDS[k] for k in ("verify_color", "verify_side", "verify_count", "relation")):
            question = ask(scene, rng)
            if question:
                words = question.text.rstrip("?").split()
                assert (question.fact in words) == (question.answer == "yes"), question
                facts += 1
    assert facts > 200


def test_training_never_names_what_is_held_out(packer):
    phase = Phase(
        steps=1, images=1, questions=40, patches=72, objects=(3, 5), kinds={"exist_pair": 1, "verify_color": 1}
    )
    rng = np.random.default_rng(0)
    asked = [q for _ in range(20) for q in packer.ask(sample_scene(rng, count=(3, 5)), phase, rng)]
    named = {tuple(q.text.rstrip("?").split()) for q in asked}
    assert not any({shape, colour} <= set(words) for words in named for shape, colour in HELD_OUT)


# ---- training ---------------------------------------------------------------------------------------------------


def test_packed_questions_equal_separate_prompts(config, tmp_path, packer):
    """Logits at every answer token are those which the plain model gives to the processor's own prompt."""
    trainer = training.Trainer(config, tmp_path)
    phase = Phase(steps=1, images=2, questions=4, patches=144, objects=(1, 4), kinds=KIND_WEIGHTS, sign=1.0)
    batch = packer.batch(phase, 7, 0)
    packed = trainer.answer_logits(trainer.see(batch["pixels"]), batch)
    model, processor = make_model(**config["model"]).eval(), make_processor()
    model.load_state_dict(trainer.model.state_dict())
    for row in range(phase.images):
        picture = Image.fromarray(batch["pixels"][row].numpy())
        for slot in range(phase.questions):
            ids, targets = batch["ids"][row, slot], batch["targets"][row, slot]
            answered = (targets != IGNORE).nonzero().flatten()
            asked = ids[: answered[0] + 1]
            text = (
                packer.tokenizer.decode(asked).replace("assistant :", "ASSISTANT:").replace("assistant:", "ASSISTANT:")
            )
            inputs = processor(
                text=prompt(processor, text.removesuffix(" ASSISTANT:")), images=picture, return_tensors="pt"
            )
            assert inputs["input_ids"][0, -len(asked) :].tolist() == asked.tolist(), (
                "prompts of training and use differ"
            )
            rest = ids[answered[0] + 1 : answered[-1] + 1][None]
            inputs["input_ids"] = torch.cat([inputs["input_ids"], rest], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            inputs.pop("mm_token_type_ids", None)
            alone = model(**inputs).logits[0, -len(answered) :]
            torch.testing.assert_close(packed[row, slot, answered], alone, atol=1e-4, rtol=1e-4)


def test_renumbered_patches_are_a_shorter_prompt(config, tmp_path, packer):
    """With new positions for all patches, logits are the plain decoder's for a sequence of just these tokens."""
    trainer = training.Trainer(config, tmp_path)
    phase = Phase(1, 2, 3, 20, (1, 1), KIND_WEIGHTS, sign=1.0, renumber=1.0)
    batch = packer.batch(phase, 7, 0)
    patches = trainer.see(batch["pixels"])
    packed = trainer.answer_logits(patches, batch)
    model = trainer.plain_model()
    embed = model.get_input_embeddings()
    for row, slot in ((0, 0), (1, 2)):
        tokens = [embed(trainer.prefix), patches[row, batch["chosen"][row]], embed(batch["ids"][row, slot])]
        alone = model(inputs_embeds=torch.cat(tokens)[None]).logits[0, -batch["ids"].shape[2] :]
        torch.testing.assert_close(packed[row, slot], alone, atol=1e-4, rtol=1e-4)


def test_the_learning_rate_goes_from_knot_to_knot(config, tmp_path):
    trainer = training.Trainer(config | {"warmup": 2, "cosine": [[3, 1.0], [5, 0.2], [5, 0.5], [7, 0.1]]}, tmp_path)
    factors = []
    for trainer.step in range(7):
        factors.append(trainer.rate() / config["lr"])
    assert factors == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.6, 0.5, 0.3])


def test_resumed_training_equals_an_unbroken_one(config, tmp_path):
    with torch.enable_grad():
        whole = training.train(config, tmp_path / "whole", workers=0)
        training.train(config, tmp_path / "broken", until=3, workers=0)
        resumed = training.train(config, tmp_path / "broken", workers=0)
    assert whole.step == resumed.step == 6
    for name, one, other in zip(whole.names, whole.parameters, resumed.parameters, strict=True):
        assert torch.equal(one, other), name
    curves = list(csv.reader((tmp_path / "whole" / "curves.csv").open()))
    assert {row[0] for row in curves} == {"2", "4", "6"}
    assert {"patch_loss", "answer_loss", "text", "know_truth", "see_shape"} <= {row[1] for row in curves}
    assert [row[0] for row in curves if row[1] == "test pope pope_f1_score"] == ["4"]


def test_export_is_loaded_by_plain_from_pretrained(config, tmp_path):
    trainer = training.Trainer(config, tmp_path / "run")
    trainer.export(tmp_path / "checkpoint")
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "checkpoint", dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "checkpoint")
    inputs = processor(text=prompt(processor, "What color is it?"), images=image()[1], return_tensors="pt")
    assert model(**inputs).logits.shape[-1] == model.config.text_config.vocab_size
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert not list((tmp_path / "checkpoint").glob("*.bin")), "no pickles"


def test_the_committed_config_is_valid():
    config = yaml.safe_load((FOLDER / "train.yaml").read_text())
    phases = [Phase(**phase) for phase in config["phases"]]
    assert any(phase.patches == GRID * GRID and phase.answers for phase in phases), "some phase answers as in use"
    assert all(kind in KINDS for phase in phases for kind in phase.kinds)
    assert config["model"]["layers"] >= 12


# ---- the shipped checkpoint -------------------------------------------------------------------------------------


@shipped
def test_shipped_checkpoint_is_small_and_complete():
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) <= 16 * 2**20
    assert {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors"} <= {
        file.name for file in CHECKPOINT.iterdir()
    }
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab(), "the checkpoint was trained with other words"
    assert tokenizer.padding_side == "left"


@shipped
def test_shipped_checkpoint_sees():
    """Plain ``generate`` on fresh test scenes: far better than the most frequent answer, and it stops."""
    model = LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    assert model.config.text_config.num_hidden_layers >= 12
    rng = np.random.default_rng(9)
    texts, pictures, answers = [], [], []
    while len(texts) < 48:
        scene = sample_scene(rng, test=True, sign=False, count=(1, 2))
        question = KINDS["color"](scene, rng)
        if question:
            texts.append(prompt(processor, question.text + SUFFIX))
            pictures.append(Image.fromarray(render(scene)))
            answers.append(question.answer)
    inputs = processor(text=texts, images=pictures, padding=True, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=8)
    said = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert out.shape[1] - inputs["input_ids"].shape[1] < 8, "no answer needs that many tokens"
    assert np.mean([a == b for a, b in zip(said, answers, strict=True)]) > 0.4
