"""The batch of a rank, from the batch of all."""

import pytest

from lazyclip.base.errors import UserError
from training.batchsize import share_batch
from training.params import TrainArgs


def shared(world: int, given: int | None = None, **changes) -> TrainArgs:
    flags = {} if given is None else {"batch_size": given}
    return share_batch(TrainArgs(**{"batch_size": 64, **changes, **flags}), flags, world)


def refusal(world: int, given: int | None = None, **changes) -> str:
    with pytest.raises(UserError) as caught:
        shared(world, given, **changes)
    return str(caught.value)


def test_without_a_global_batch_the_batch_of_a_rank_stays():
    args = TrainArgs(batch_size=7)
    assert share_batch(args, {"batch_size": 7}, 3) is args


@pytest.mark.parametrize(
    ("world", "accum", "each"), [(1, 1, 5376), (8, 1, 672), (64, 1, 84), (8, 4, 168), (128, 1, 42)]
)
def test_ranks_and_pieces_share_the_global_batch(world, accum, each):
    args = shared(world, global_batch=5376, accum_freq=accum)
    assert args.batch_size == each
    assert args.batch_size * accum * world == args.global_batch


def test_a_batch_of_a_rank_that_agrees_is_fine():
    assert shared(8, 672, global_batch=5376).batch_size == 672


def test_ranks_that_cannot_share_it_are_told_what_could():
    assert refusal(5, global_batch=5376) == (
        "--global-batch 5376 cannot be shared by 5 ranks; use 4 or 6 ranks, or --global-batch 5375 "
        "or 5380"
    )
    assert refusal(3, global_batch=8, accum_freq=3) == (
        "--global-batch 8 cannot be shared by 3 ranks x 3 pieces; use --global-batch 9"
    )
    assert "use 8 ranks, or --global-batch 16" in refusal(16, global_batch=8)


def test_a_batch_of_a_rank_that_contradicts_is_refused_with_the_ways_out():
    assert refusal(8, 84, global_batch=5376) == (
        "--batch-size 84 on 8 ranks makes 672, and --global-batch is 5376; leave it out (672 per "
        "rank), add --accum-freq 8, or give --global-batch 672"
    )
    assert "add --accum-freq" not in refusal(1, 100, global_batch=150)
