import math

import pytest
import torch

from piste_workloads.llm.config import Model
from piste_workloads.llm.model import GPT, cross_entropy, parameter_count, rotary_angles, rotate

VOCABULARY = 256
CPU = torch.device("cpu")


def gpt(seed: int = 0, **settings: object) -> GPT:
    torch.manual_seed(seed)
    return GPT(
        Model.model_validate({"layers": 2, "heads": 2, "width": 16, "context": 12, **settings}), VOCABULARY
    )


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def test_rotary_scores_depend_on_the_difference_of_positions_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    cosine, sine = (table.double() for table in rotary_angles(32, 8, CPU))

    def score(i: int, j: int) -> float:
        return float(rotate(query, cosine[i], sine[i]) @ rotate(key, cosine[j], sine[j]))

    for shift in (1, 5, 20):
        assert score(7 + shift, 3 + shift) == pytest.approx(score(7, 3), rel=1e-5)
    assert score(7, 4) != pytest.approx(score(7, 3), rel=1e-3)


def test_rotation_keeps_lengths_and_leaves_position_zero() -> None:
    x = torch.randn(1, 1, 5, 8, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, *rotary_angles(5, 8, CPU))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(turned[..., 0, :], x[..., 0, :])
    assert not torch.allclose(turned[..., 1, :], x[..., 1, :])


@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
def test_a_later_token_does_not_change_earlier_logits(mlp: str) -> None:
    model = gpt(mlp=mlp)
    tokens = random_tokens(2, 12)
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % VOCABULARY
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=0, atol=0)
    assert (before[:, 7:] != after[:, 7:]).any(dim=-1).all()


def test_earlier_tokens_change_later_logits() -> None:
    model = gpt()
    tokens = random_tokens(1, 12)
    changed = tokens.clone()
    changed[:, 0] = (changed[:, 0] + 1) % VOCABULARY
    assert (model(tokens)[:, -1] != model(changed)[:, -1]).any()


def test_the_tied_head_is_the_embedding() -> None:
    tied, untied = gpt(tied=True), gpt(tied=False)
    assert tied.head.weight is tied.token_embedding.weight
    assert untied.head.weight is not untied.token_embedding.weight
    assert "head.weight" not in dict(tied.named_parameters())


@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_parameter_count_formula(mlp: str, tied: bool) -> None:
    model = gpt(mlp=mlp, tied=tied, width=24)
    assert sum(p.numel() for p in model.parameters()) == parameter_count(model.config, VOCABULARY)


def test_the_setting_of_gpt2_small_has_124_million_parameters() -> None:
    config = Model(layers=12, heads=12, width=768, context=1024, mlp="gelu", tied=True)
    assert parameter_count(config, 50_257) == 123_551_232  # GPT-2 without positions, biases and shifts


def test_swiglu_and_gelu_have_about_as_many_parameters() -> None:
    swiglu, gelu = (parameter_count(Model(width=384, mlp=mlp), 256) for mlp in ("swiglu", "gelu"))
    assert swiglu == pytest.approx(gelu, rel=0.01)


@pytest.mark.parametrize("tied", [True, False])
def test_the_first_loss_is_near_that_of_a_uniform_guess(tied: bool) -> None:
    tokens = random_tokens(16, 13)
    loss = cross_entropy(gpt(tied=tied)(tokens[:, :-1]), tokens[:, 1:])
    assert loss.item() == pytest.approx(math.log(VOCABULARY), abs=0.05)


def test_the_first_weights_have_the_stated_deviations() -> None:
    parameters = dict(gpt(layers=8, width=128, heads=4).named_parameters())
    deviation = {name: parameter.std().item() for name, parameter in parameters.items()}
    assert deviation["token_embedding.weight"] == pytest.approx(0.02, rel=0.03)
    assert deviation["blocks.3.attention.query.weight"] == pytest.approx(128**-0.5, rel=0.03)
    assert deviation["blocks.3.mlp.up.weight"] == pytest.approx(128**-0.5, rel=0.03)
    assert deviation["blocks.3.attention.projection.weight"] == pytest.approx(0.02 / 4, rel=0.03)
    assert deviation["blocks.3.mlp.down.weight"] == pytest.approx(0.02 / 4, rel=0.03)


def test_generation_repeats_under_an_equal_generator_and_goes_beyond_the_context() -> None:
    model = gpt()
    prompt = random_tokens(3, 4)

    def generate(seed: int) -> torch.Tensor:
        return model.generate(prompt, 20, 1.0, 10, torch.Generator().manual_seed(seed))

    first = generate(1)
    assert first.shape == (3, 24)
    assert torch.equal(first[:, :4], prompt)
    assert torch.equal(first, generate(1))
    assert not torch.equal(first, generate(2))


def test_temperature_zero_and_top_1_take_the_likeliest_token() -> None:
    model = gpt(dropout=0.5)
    prompt = random_tokens(2, 4)
    greedy = model.generate(prompt, 6, 0.0, 0, torch.Generator())
    assert model.training  # as before, and its dropout did not act:
    assert torch.equal(greedy, model.generate(prompt, 6, 1.3, 1, torch.Generator()))
    model.eval()
    for position in range(4, 10):
        likeliest = model(greedy[:, :position])[:, -1].argmax(dim=-1)
        assert torch.equal(greedy[:, position], likeliest)


def test_dropout_acts_in_training_alone() -> None:
    model = gpt(dropout=0.5)
    tokens = random_tokens(1, 12)
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_widths_that_heads_cannot_share_are_refused() -> None:
    with pytest.raises(ValueError, match="width = 10 must be an even multiple of heads = 4"):
        Model(width=10, heads=4)
    with pytest.raises(ValueError, match="width = 12 must be an even multiple of heads = 4"):
        Model(width=12, heads=4)
