"""What a model is called with."""

from __future__ import annotations

import pytest
import torch
from families import ids, make
from torch import nn

from secateur.data.calibration import Calibration
from secateur.errors import InvalidParameter, UsageError
from secateur.inputs import batches_of


@pytest.mark.parametrize(("batch_size", "sizes"), [(1, [1] * 6), (4, [4, 2]), (6, [6]), (99, [6])])
def test_ids_are_cut_in_order(batch_size: int, sizes: list[int]) -> None:
    for data in (ids(), Calibration(ids(), {})):
        batches = batches_of(make("llama"), data, batch_size)
        assert [len(batch["input_ids"]) for batch in batches] == sizes
        assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), ids())
        assert all(batch.keys() == {"input_ids"} for batch in batches)


@pytest.mark.parametrize("length", [2, 9, 16])
def test_two_stacks_read_half_each(length: int) -> None:
    """The decoder predicts its half: it reads it shifted by the start token."""
    x, half = ids(3, length), length // 2
    first, second = batches_of(make("t5"), x, batch_size=2)
    assert torch.equal(first["input_ids"], x[:2, :half])
    assert torch.equal(second["decoder_input_ids"][:, 1:], x[2:, half:-1])
    assert second["decoder_input_ids"].shape == (1, length - half)
    assert (second["decoder_input_ids"][:, 0] == 0).all()


def test_two_stacks_with_a_start_token_of_their_own_and_too_short() -> None:
    model = make("t5")
    model.config.decoder_start_token_id = 7
    assert batches_of(model, ids())[0]["decoder_input_ids"][0, 0] == 7
    with pytest.raises(UsageError, match="at least 2 tokens; got 1"):
        batches_of(model, ids(2, 1))


def test_ready_batches_are_passed_through() -> None:
    ready = [{"input_ids": ids(), "attention_mask": torch.ones(6, 16)}, {"input_ids": ids(1, 3)}]
    assert batches_of(make("llama"), ready, batch_size=1) == ready
    assert batches_of(make("llama"), tuple(ready)) == ready


@pytest.mark.parametrize(
    "bad",
    [ids().float(), ids().bool(), ids().to(torch.uint8), ids()[0], ids()[None], ids()[:0], ids()[:, :0]],
    ids=lambda x: f"{x.dtype} {tuple(x.shape)}",
)
def test_ids_of_a_wrong_kind(bad: torch.Tensor) -> None:
    with pytest.raises(UsageError, match=r"\(n, seqlen\) int64, at least one; got torch") as error:
        batches_of(make("llama"), bad)
    assert str(bad.dtype) in str(error.value) and str(tuple(bad.shape)) in str(error.value)


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ("gutenberg", "str with str"),
        (list(ids()), "list with Tensor"),
        ([{"input_ids": [1, 2]}], "list with dict"),
        (ids().numpy(), "ndarray"),
        (42, "int"),
    ],
)
def test_what_is_no_calibration(bad: object, named: str) -> None:
    with pytest.raises(UsageError, match=f"calibration must be made by .*; got {named}"):
        batches_of(make("llama"), bad)  # type: ignore[arg-type]


def test_no_batch() -> None:
    with pytest.raises(UsageError, match="empty"):
        batches_of(make("llama"), [])


@pytest.mark.parametrize(("low", "high"), [(-1, 63), (0, 64), (64, 70)])
def test_ids_outside_the_vocabulary(low: int, high: int) -> None:
    with pytest.raises(UsageError, match=f"from {low} to {high}, but the model embeds 64 tokens"):
        batches_of(make("llama"), torch.tensor([[high, low]]))


def test_the_whole_vocabulary_is_fine() -> None:
    x = torch.tensor([[0, 63]])
    assert batches_of(make("llama"), x.int())[0]["input_ids"].tolist() == [[0, 63]]
    assert batches_of(nn.Linear(1, 1), x + 10**6)  # no embedding to compare with


@pytest.mark.parametrize("bad", [0, -1, 1.0, True, None, "2"])
def test_batch_size(bad: object) -> None:
    with pytest.raises(InvalidParameter, match="'batch_size' of prune"):
        batches_of(make("llama"), ids(), bad)  # type: ignore[arg-type]


def test_padding_is_masked_and_no_wider_than_its_batch() -> None:
    mask = torch.arange(16) < torch.tensor([16, 12, 12, 5, 3, 1])[:, None]
    batches = batches_of(make("llama"), Calibration(ids(), {}, mask), batch_size=2)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 16), (2, 12), (2, 3)]
    assert batches[0]["attention_mask"].sum(1).tolist() == [16, 12]
    assert all(
        torch.equal(b["input_ids"], ids()[2 * i : 2 * i + 2, : b["input_ids"].shape[1]]) for i, b in enumerate(batches)
    )
    alone = batches_of(make("llama"), Calibration(ids(), {}, mask))
    assert [batch.keys() for batch in alone] == [{"input_ids"}] * 6  # nothing is padded


def test_two_stacks_do_not_read_conversations() -> None:
    with pytest.raises(UsageError, match=r"encoder-decoder T5For.*give a plain text"):
        batches_of(make("t5"), Calibration(ids(), {}, torch.ones_like(ids(), dtype=torch.bool)))
