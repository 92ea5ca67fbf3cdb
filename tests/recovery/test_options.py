"""Options that cannot be are refused with one line."""

import pytest

from secateur.errors import SecateurError
from secateur.recovery.loop import learning_rate
from secateur.recovery.options import Recovery


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"train": ("bias",)}, "no set of parameters 'bias'. Did you mean 'biases'"),
        ({"train": ()}, "Nothing would be trained"),
        ({"train": ("all", "norms")}, "--train all already trains what norms would"),
        ({"train": ("kept", "adapters")}, "--train kept already trains what adapters would"),
        ({"adapter": "maksed"}, "no adapter 'maksed'. Did you mean 'masked'"),
        ({"objective": "mse"}, "no objective 'mse'"),
        ({"schedule": "step"}, "no schedule of the learning rate 'step'"),
        ({"precision": "int8"}, "no value of precision 'int8'"),
        ({"keep": "first"}, "no value of keep 'first'"),
        ({"rank": 0}, "The 'rank' of recover must be a whole number of at least 1. Got 0"),
        ({"rank": True}, "The 'rank' of recover"),
        ({"steps": 0}, "The 'steps' of recover"),
        ({"batch_size": 0}, "The 'batch_size' of recover"),
        ({"accumulate": 0}, "The 'accumulate' of recover"),
        ({"checkpoint_every": 0}, "The 'checkpoint_every' of recover"),
        ({"seed": -1}, "The 'seed' of recover"),
        ({"lr": 0.0}, "The 'lr' of recover must be a number above 0"),
        ({"lr": float("nan")}, "The 'lr' of recover"),
        ({"scale": float("inf")}, "The 'scale' of recover"),
        ({"warmup": 1.5}, r"must be a number in [0, 1]"),
        ({"distil_weight": -0.1}, "The 'distil_weight' of recover"),
        ({"temperature": 0}, "The 'temperature' of recover"),
        ({"clip": -1}, "The 'clip' of recover"),
        ({"window": 0}, "A window must contain a non-linearity: at least one block"),
        ({"objective": "reconstruct", "train": ("head",)}, "leave head out of --train"),
        ({"objective": "reconstruct", "adapter": "lora"}, "no peft adapters"),
        ({"objective": "reconstruct", "keep": "best"}, "leave out --keep best"),
        ({"objective": "reconstruct", "targets": "pruned"}, "needs --inputs pruned"),
    ],
)
def test_refused(options, said):
    with pytest.raises(SecateurError) as raised:
        Recovery(**options)
    assert said in str(raised.value) and "\n" not in str(raised.value) and raised.value.exit_code == 2


def test_one_word_is_a_list_of_one():
    assert Recovery(train="norms").train == ("norms",)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_learning_rate_rises_to_its_highest_and_falls(schedule):
    options = Recovery(steps=20, warmup=0.25, lr=0.5, schedule=schedule)
    rates = [learning_rate(options, step) for step in range(20)]
    assert rates[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert rates[5] == 0.5 and rates == [*rates[:5], *sorted(rates[5:], reverse=True)]
    assert rates[-1] == (
        0.5 if schedule == "constant" else pytest.approx(0.5 * {"cosine": 0.0109, "linear": 1 / 15}[schedule], rel=0.01)
    )
