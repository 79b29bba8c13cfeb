"""Which split a file's name says, and that names, links and copies of one file stay one file."""

from __future__ import annotations

import pytest

from bwlm.text.splits import is_split_folder, split_of


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00002.parquet", "train"),
        ("validation-00000-of-00001.parquet", "validation"),
        ("test.parquet", "test"),
        ("Test.b.parquet", "test"),
        ("valid_2.jsonl", "validation"),
        ("val2.jsonl", "validation"),
        ("dev-0.jsonl", "validation"),
        ("eval.parquet", "test"),
        ("auxiliary_train-0.parquet", "train"),
        ("c4-validation.00000-of-00008.parquet", "validation"),
        ("gsm8k_test.jsonl.gz", "test"),
        ("data/test/0.parquet", "test"),
        ("test/train-0.parquet", "train"),
        ("train/test/0.parquet", "test"),
        ("train/dev.parquet", "validation"),
        ("values.parquet", "train"),
        ("testimonials.parquet", "train"),
        ("device.parquet", "train"),
        ("contest.parquet", "train"),
        ("shard_00000.parquet", "train"),
        ("/test/0.parquet", "test"),
    ],
)
def test_the_split_that_a_name_says(name: str, split: str) -> None:
    assert split_of(name) == split


def test_the_folder_of_a_source_counts_beside_a_folder_of_training_files_alone() -> None:
    assert split_of("0.parquet", "test") == "test"
    assert split_of("train.parquet", "test") == "train"
    folders = {"/data/train", "/web/training"}
    assert is_split_folder("/data/test", folders.__contains__)
    assert is_split_folder("/data/Validation/", folders.__contains__)
    assert is_split_folder("/web/dev", folders.__contains__)
    assert not is_split_folder("/home/dev", folders.__contains__)
    assert not is_split_folder("/data/train", folders.__contains__)
    assert not is_split_folder("/data/contest", folders.__contains__)
    assert not is_split_folder("", folders.__contains__)
