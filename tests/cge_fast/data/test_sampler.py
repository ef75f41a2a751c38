"""Batches of P identities x K instances."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cge_fast.data.sampler import PKSampler
from cge_fast.errors import UserError


def labels_of(sampler, labels):
    return [[labels[index] for index, _ in batch] for batch in sampler]


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=2, max_size=9),
    identities=st.integers(1, 4),
    instances=st.integers(1, 4),
    seed=st.integers(0, 5),
)
def test_every_batch_has_p_identities_with_k_instances_each(sizes, identities, instances, seed):
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    if identities > len(sizes) or identities * instances > len(labels):
        with pytest.raises(UserError):
            PKSampler(labels, identities, instances, seed)
        return
    sampler = PKSampler(labels, identities, instances, seed)
    batches = list(sampler)
    assert len(batches) == len(sampler) == len(labels) // (identities * instances)
    for batch in batches:
        counts = Counter(labels[index] for index, _ in batch)
        assert len(counts) == identities
        assert set(counts.values()) == {instances}
        for label in counts:
            chosen = [index for index, _ in batch if labels[index] == label]
            if sizes[label] >= instances:
                assert len(set(chosen)) == instances, "without replacement where there are enough images"


@settings(max_examples=30, deadline=None)
@given(count=st.integers(2, 12), identities=st.integers(1, 5), seed=st.integers(0, 5))
def test_each_identity_comes_once_before_any_comes_twice(count, identities, seed):
    if identities > count:
        return
    labels = [label for label in range(count) for _ in range(7)]
    drawn = [label for batch in labels_of(PKSampler(labels, identities, 1, seed), labels) for label in batch]
    for start in range(0, len(drawn) - count, count):
        assert sorted(drawn[: start + count]) == sorted(list(range(count)) * (start // count + 1))


def test_an_epoch_of_the_embedded_set_has_31_batches():
    assert len(PKSampler([label for label in range(200) for _ in range(10)], 16, 4)) == 31


def test_the_same_seed_and_epoch_draw_the_same_and_others_do_not():
    labels = [label for label in range(8) for _ in range(5)]
    first, second, other = PKSampler(labels, 4, 2, 1), PKSampler(labels, 4, 2, 1), PKSampler(labels, 4, 2, 2)
    assert list(first) == list(second)
    assert list(first) != list(other)
    second.epoch = 2
    assert list(first) != list(second)


def test_ranks_share_each_batch_by_identities():
    labels = [label for label in range(8) for _ in range(5)]
    whole = list(PKSampler(labels, 4, 2, 3))
    parts = [list(PKSampler(labels, 4, 2, 3, rank, 2)) for rank in (0, 1)]
    assert [left + right for left, right in zip(*parts, strict=True)] == whole


def test_an_identity_with_fewer_than_k_images_is_drawn_again():
    labels = [0, 1, 1, 1, 1, 2, 2, 2]
    (batch,) = PKSampler(labels, 2, 4)
    counts = Counter(labels[index] for index, _ in batch)
    assert set(counts.values()) == {4}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 0, 1, 1], 3, 1), "data.identities: a batch needs 3, the training split has 2"),
        (([0, 1], 2, 4), "data.instances: a batch needs 2 x 4 images, the training split has 2"),
        (([0, 0, 1, 1], 1, 1, 0, 0, 2), "data.identities: 1 cannot be shared evenly by 2 processes"),
    ],
)
def test_impossible_batches_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        PKSampler(*arguments)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=9),
    identities=st.integers(1, 4),
    instances=st.integers(1, 3),
    law=st.sampled_from(["naive", "random"]),
    epoch=st.integers(1, 4),
)
def test_naive_and_random_draw_each_image_once_until_too_few_identities_have_k_left(
    sizes, identities, instances, law, epoch
):
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    if identities > len(sizes) or identities * instances > len(labels):
        return
    sampler = PKSampler(labels, identities, instances, 3, law=law)
    sampler.epoch = epoch
    batches = list(sampler)
    assert len(sampler) == len(batches)
    for batch in batches:
        counts = Counter(labels[index] for index, _ in batch)
        assert (len(counts), set(counts.values())) == (identities, {instances})
    whole = list(sampler.one_pass(epoch))
    drawn = Counter(index for batch in whole for index, _ in batch)
    assert all(times == 1 or sizes[labels[index]] < instances for index, times in drawn.items())
    times_of = Counter(labels[index] for batch in whole for index, _ in batch)
    left = [label for label, size in enumerate(sizes) if max(size, instances) - times_of[label] >= instances]
    assert len(left) < identities, "a pass goes on as long as it can"
    if law == "random":
        assert batches == whole


def test_epochs_of_naive_are_cut_out_of_one_pass_after_another():
    labels = [label for label in range(7) for _ in range(5)]
    sampler = PKSampler(labels, 4, 2, 1, law="naive")
    passes = [batch for number in range(1, 8) for batch in sampler.one_pass(number)]
    for epoch in range(1, 4):
        sampler.epoch = epoch
        expected = passes[(epoch - 1) * 4 : epoch * 4]
        assert list(sampler) == list(sampler) == expected, "again, too"
        resumed = PKSampler(labels, 4, 2, 1, law="naive")
        resumed.epoch = epoch
        assert list(resumed) == expected, "without the epochs before"


def test_ranks_share_the_batches_of_every_law():
    labels = [label for label in range(8) for _ in range(5)]
    for law in ("naive", "random"):
        whole = list(PKSampler(labels, 4, 2, 3, law=law))
        parts = [list(PKSampler(labels, 4, 2, 3, rank, 2, law)) for rank in (0, 1)]
        assert [left + right for left, right in zip(*parts, strict=True)] == whole


# Measured of the public code on a set with Market-1501's sizes: coverage of an epoch, draws of large identities.
@pytest.mark.parametrize(
    ("law", "coverage", "draws"), [("balanced", 0.60, 4.3), ("naive", 0.83, 9.8), ("random", 0.91, 9.0)]
)
def test_how_much_of_a_market_like_set_an_epoch_sees(law, coverage, draws):
    sizes = np.clip(np.random.default_rng(0).gamma(2.2, 17.2 / 2.2, 751).round().astype(int), 2, 72)
    labels = np.repeat(np.arange(len(sizes)), sizes).tolist()
    sampler, seen, large = PKSampler(labels, 16, 4, law=law), [], []
    for epoch in range(1, 9):
        sampler.epoch = epoch
        drawn = [[index for index, _ in batch] for batch in sampler]
        seen.append(len({index for batch in drawn for index in batch}) / len(labels))
        times = Counter(labels[index] for batch in drawn for index in batch[::4])
        large.append(np.mean([times[label] for label in np.flatnonzero(sizes > 30)]))
    assert np.mean(seen) == pytest.approx(coverage, abs=0.02)
    assert np.mean(large) == pytest.approx(draws, abs=0.4)
