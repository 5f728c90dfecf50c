"""Training with a staged decoder: who is there in which layer, what it costs, and how its settings are read."""

import dataclasses
from itertools import accumulate

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface
from visibench.evals.answers import score
from visibench.training import flops, settings
from visibench.training import train as training
from visibench.training.batches import Packer, Phase
from visibench.training.staged import Staging, staged_forward

FOLDER = training.Path(training.__file__).parent
LAYERS, BEFORE, QUESTIONS, SLOT = 6, 5, 3, 4


def small(**more):
    config = settings.read(FOLDER / "train.yaml")
    model = {"hidden": 32, "vision_layers": 3, "layers": LAYERS, "intermediate": 48}
    return config | {"model": model} | more


@pytest.fixture(autouse=True)
def gradients():
    with torch.enable_grad():
        yield


@pytest.fixture
def trainer(tmp_path):
    return training.Trainer(small(), tmp_path)


@pytest.fixture(scope="module")
def batch():
    phase = Phase(**small()["phases"][5])
    phase = dataclasses.replace(phase, images=3, questions=QUESTIONS, renumber=0.5)
    return Packer().batch(phase, 3, 5), phase


def prompt(visual):
    """Embeddings (2, L, 32) and position ids, with gaps where visual tokens may have been dropped."""
    tokens = torch.randn(2, BEFORE + visual + QUESTIONS * SLOT, 32, generator=torch.Generator().manual_seed(visual))
    seen = BEFORE + 2 * torch.arange(visual)
    behind = BEFORE + 2 * visual + torch.arange(SLOT).repeat(QUESTIONS)
    return tokens.requires_grad_(), torch.cat([torch.arange(BEFORE), seen, behind]).expand(2, -1)


def masked(decoder, tokens, positions, visual, staging):
    """The same by masks over the plain prompt: absent keys are hidden, absent tokens keep their embeddings."""
    length, image = tokens.shape[1], BEFORE + visual
    slots = torch.cat([torch.zeros(image), torch.arange(QUESTIONS).repeat_interleave(SLOT) + 1])
    sees = torch.ones(length, length, dtype=torch.bool).tril() & ((slots == 0) | (slots == slots[:, None]))
    there = torch.ones(length, dtype=torch.bool)

    def attention(module, query, key, value, mask, scaling, **_):
        scores = (query @ key.transpose(-1, -2) * scaling).masked_fill(~(sees & there), float("-inf"))
        return (scores.softmax(-1).nan_to_num() @ value).transpose(1, 2), None

    AttentionInterface.register("masked_reference", attention)
    decoder.set_attn_implementation("masked_reference")
    rotary, hidden = decoder.rotary_emb(tokens, position_ids=positions), tokens
    for number, layer in enumerate(decoder.layers):
        there = torch.ones(length, dtype=torch.bool)
        there[BEFORE + staging.there(number, visual) : image] = False
        hidden = torch.where(there[:, None], layer(hidden, position_embeddings=rotary, use_cache=False), hidden)
    decoder.set_attn_implementation("tiny_packed")
    return decoder.norm(hidden)


def packed(trainer, tokens, positions, visual, staging):
    decoder = trainer.model.model.language_model
    return staged_forward(decoder, tokens, positions, BEFORE, visual, staging, questions=QUESTIONS, slot=SLOT)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("sink", ["visual", "bos"])
def test_all_layers_staged_are_the_plain_decoder_bit_for_bit(batch, sink, bf16, tmp_path):
    found = []
    for more in ({}, {"staged": {"enter": 0, "exit": LAYERS, "sink": sink}}):
        trainer = training.Trainer(small(bf16=bf16, **more), tmp_path)
        loss, _ = trainer.losses(*batch)
        loss.backward()
        found.append([loss, *(p.grad for p in trainer.parameters if p.grad is not None)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("visual", [0, 1, 9])
@pytest.mark.parametrize(("enter", "leave"), [(2, 5), (0, 4), (3, LAYERS), (3, 4)])
@pytest.mark.parametrize("sink", ["visual", "bos"])
def test_cutting_and_joining_is_as_masks_would_have_it(trainer, visual, enter, leave, sink):
    staging = Staging(enter, leave, sink)
    tokens, positions = prompt(visual)
    expected = masked(trainer.model.model.language_model, tokens, positions, visual, staging)[:, BEFORE + visual :]
    found = packed(trainer, tokens, positions, visual, staging)
    assert found.shape[1] == tokens.shape[1] - (visual if leave < LAYERS else 0)
    found = found[:, -QUESTIONS * SLOT :]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    for one, other in zip(
        *(torch.autograd.grad((out * weight).sum(), tokens) for out in (found, expected)), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
        assert one[:, BEFORE : BEFORE + visual].abs().sum(-1).all()  # the projector learns from every visual token


def test_text_alone_is_not_touched(trainer):
    tokens, positions = prompt(0)
    decoder = trainer.model.model.language_model
    plain = decoder(inputs_embeds=tokens, position_ids=positions, use_cache=False, questions=QUESTIONS, slot=SLOT)
    assert torch.equal(packed(trainer, tokens, positions, 0, Staging(2, 5)), plain.last_hidden_state)


def test_layers_before_enter_see_the_first_visual_token_or_none(trainer):
    tokens, positions = prompt(9)
    lengths: list[int] = []
    for layer in trainer.model.model.language_model.layers:
        layer.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    for sink in ("visual", "bos"):
        packed(trainer, tokens, positions, 9, Staging(2, 5, sink))
    text = BEFORE + QUESTIONS * SLOT
    assert lengths == [text + n for n in (1, 1, 9, 9, 9, 0, 0, 0, 9, 9, 9, 0)]


@pytest.mark.parametrize("staged", [None, {"enter": 2, "exit": 5}, {"enter": 3, "exit": 4, "sink": "bos"}])
@pytest.mark.parametrize("answers", [0.0, 1.0])
def test_multiply_adds_of_a_step_are_those_that_torch_counts(batch, staged, answers, tmp_path):
    config = small(**({"staged": staged} if staged else {}))
    trainer = training.Trainer(config, tmp_path)
    phase = dataclasses.replace(batch[1], answers=answers)
    with FlopCounterMode(display=False) as counter:
        trainer.losses(batch[0], phase)[0].backward()
    expected, slot = flops.sight_macs(config["model"], phase.images), batch[0]["ids"].shape[2]
    if answers:
        expected += flops.decoder_macs(config["model"], phase, trainer.staging, len(trainer.prefix), slot)
    assert counter.get_total_flops() == 2 * expected


@pytest.mark.parametrize(
    "wrong", [{"enter": 4, "exit": 4}, {"enter": -1, "exit": 4}, {"enter": 1, "exit": 4, "sink": "x"}]
)
def test_staging_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match=r"enter|sink"):
        Staging(**wrong)


def test_settings_take_what_they_do_not_say_from_their_base():
    plain, staged = (settings.read(FOLDER / name) for name in ("train.yaml", "staged-4-10.yaml"))
    assert staged == plain | {"staged": {"enter": 4, "exit": 10, "sink": "visual"}}


def test_stretching_moves_phases_and_knots_behind_a_step(tmp_path):
    (tmp_path / "longer.yaml").write_text(f"base: {FOLDER}/train.yaml\nstretch: {{after: 1300, factor: 1.1}}\n")
    plain, longer = settings.read(FOLDER / "train.yaml"), settings.read(tmp_path / "longer.yaml")
    ends = [list(accumulate(phase["steps"] for phase in config["phases"])) for config in (plain, longer)]
    assert ends[1] == [round(1300 + (end - 1300) * 1.1) for end in ends[0]]
    assert longer["cosine"][-1] == [ends[1][-1], plain["cosine"][-1][1]]
    with pytest.raises(ValueError, match="no phase begins at step 1000"):
        settings.stretched(plain, after=1000, factor=1.1)


def test_a_staged_run_resumes_at_the_exact_step_and_shares_the_steps_of_sight_with_a_plain_one(tmp_path):
    phase = small()["phases"][1] | {"images": 2, "questions": 3}
    sight = phase | {"steps": 2, "answers": 0}
    plain = small(phases=[sight, phase | {"steps": 3}], warmup=2, cosine=[[3, 1.0], [5, 0.1]])
    staged = plain | {"staged": {"enter": 2, "exit": 5}, "evaluate": {"every": 99, "limit": 1}}
    whole = training.train(staged, tmp_path / "whole", workers=0)
    training.train(plain, tmp_path / "broken", until=2, workers=0)
    for until in (4, None):
        resumed = training.train(staged, tmp_path / "broken", until=until, workers=0)
    assert whole.step == resumed.step == 5
    for name, one, other in zip(whole.names, whole.parameters, resumed.parameters, strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("staged", [{}, {"staged": {"enter": 2, "exit": 5, "sink": "bos"}}])
def test_a_run_is_evaluated_under_its_own_staging(staged, tmp_path, monkeypatch):
    """Each test question's method; a staged decoder run densely is another model."""
    evaluate, methods = score.evaluate, []

    def listening(loaded, method, task, **options):
        methods.append(str(method))
        return evaluate(loaded, method, task, **options)

    monkeypatch.setattr(score, "evaluate", listening)
    figures = training.scores(training.Trainer(small(**staged), tmp_path), 1)
    assert "test gqa exact_match" in figures
    assert {*methods} == {"staged:enter=2,exit=5,sink=bos" if staged else "none"}


def test_a_run_may_start_from_a_checkpoint(tmp_path):
    plain, staged, longer = (settings.read(FOLDER / f"adapt{name}.yaml") for name in ("", "-4-10", "-4-10-flops"))
    assert staged == plain | {"staged": {"enter": 4, "exit": 10, "sink": "visual"}}
    assert [phase["steps"] for phase in longer["phases"]] == [587, 73, 74]
    trainer = training.Trainer(staged, tmp_path)
    expected = training.load.load_model("tiny", device="cpu").model.state_dict()
    found = trainer.plain_model().state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
