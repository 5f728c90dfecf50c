"""Loading models, and turning questions and images into inputs."""

import shutil

import pytest
import torch
import visibench
from PIL import Image
from support import make_llava
from transformers import LlamaConfig, LlamaForCausalLM
from visibench.errors import DataError, InputError, OptionError, UnknownNameError, UnsupportedModelError
from visibench.models.load import EMBEDDED


@pytest.fixture(scope="module")
def tiny():
    return visibench.load_model("tiny", device="cpu")


def test_tiny_answers_in_batches_as_alone(tiny):
    red, blue = Image.new("RGB", (144, 144), "red"), Image.new("L", (90, 60), 128)
    questions = ["What color is the circle?", "Is there a ring in the image?", "How many objects are there?"]
    images = [[red], [red, blue], []]
    batch = tiny.inputs(questions, images)
    image_tokens = (batch["input_ids"] == tiny.adapter.image_token).sum(1)
    assert image_tokens.tolist() == [144, 288, 0]
    assert batch["pixel_values"].shape == (3, 3, 144, 144)
    assert batch["attention_mask"][:, -1].all(), "rows are left padded"
    with visibench.prune(tiny.model, visibench.load_method("fastv", keep=0.5)) as session:
        together = tiny.decode(tiny.model.generate(**batch, max_new_tokens=5)[:, batch["input_ids"].shape[1] :])
        assert session.trace.visual_counts()[:, -1].tolist() == [72, 144, 0]
        for row, (question, pictures) in enumerate(zip(questions, images, strict=True)):
            own = tiny.inputs([question], [pictures])
            alone = tiny.decode(tiny.model.generate(**own, max_new_tokens=5)[:, own["input_ids"].shape[1] :])
            assert alone == together[row : row + 1]


def test_prompt_has_a_fixed_prefix_and_the_image_in_front(tiny):
    batch = tiny.inputs(["What color is the circle?"], [[Image.new("RGB", (144, 144))]])
    ids = batch["input_ids"][0].tolist()
    first = ids.index(tiny.adapter.image_token)
    assert tiny.processor.tokenizer.decode(ids[:first]) == "<s> a chat between a user and an assistant. user :"
    assert tiny.processor.tokenizer.decode(ids[first + 144 :]) == "what color is the circle? assistant :"


def test_description_names_what_results_depend_on(tiny):
    facts = tiny.describe()
    assert facts["name"] == "tiny"
    assert facts["dtype"] == "float32"
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["image_processor"]
    assert facts["attention"] == "sdpa"


def test_local_folder_loads_like_the_name(tiny, tmp_path):
    copy = shutil.copytree(EMBEDDED["tiny"], tmp_path / "copy")
    loaded = visibench.load_model(str(copy), dtype="bfloat16", attn_implementation="eager")
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.describe()["attention"] == "eager"
    batch = loaded.inputs(["What color is the circle?"], [[Image.new("RGB", (144, 144))]])
    assert batch["pixel_values"].dtype == torch.bfloat16
    assert batch["input_ids"].dtype == torch.int64


def test_pickled_weights_are_refused(tmp_path):
    copy = shutil.copytree(EMBEDDED["tiny"], tmp_path / "copy")
    model = make_llava(layers=1)
    (copy / "model.safetensors").unlink()
    torch.save(model.state_dict(), copy / "pytorch_model.bin")
    with pytest.raises(DataError, match="safetensors"):
        visibench.load_model(str(copy))


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("tinny", {}, UnknownNameError, "did you mean 'tiny'"),
        ("./missing", {}, UnknownNameError, "not a folder"),
        ("tiny", {"device": "gpu"}, OptionError, "unknown device 'gpu'"),
        ("tiny", {"dtype": "int8"}, OptionError, "unknown dtype"),
        ("tiny", {"attn_implementation": "fast"}, OptionError, "'fast' cannot be observed; Known: eager"),
    ],
)
def test_what_cannot_be_loaded_says_why_in_one_line(name, options, error, message):
    with pytest.raises(error, match=message) as caught:
        visibench.load_model(name, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_says_so():
    with pytest.raises(OptionError, match="--device cpu"):
        visibench.load_model("tiny", device="cuda")


def test_folders_without_a_multimodal_model_say_so(tmp_path):
    with pytest.raises(DataError, match="cannot load"):
        visibench.load_model(str(tmp_path))
    LlamaForCausalLM(
        LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    ).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="'llama' has no adapter for images"):
        visibench.load_model(str(tmp_path))


def test_questions_and_images_must_pair_up(tiny):
    with pytest.raises(InputError, match="2 questions, but images for 1"):
        tiny.inputs(["a", "b"], [[]])
