from typing import Any

import pytest
from omegaconf import OmegaConf

from data.config import DataConfig, LongDocuments, Packing, SourceConfig


@pytest.mark.parametrize("weight", [0, -1.0, float("inf"), float("nan")])
def test_weight_must_be_positive(weight: float) -> None:
    with pytest.raises(ValueError, match=rf"data\.sources\[1\]\.weight={weight:g} must be > 0"):
        DataConfig(sources=[SourceConfig(path="a"), SourceConfig(path="b", weight=weight)])


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ({}, r"\[1\] has path=None and dataset=None; give one of them"),
        ({"path": "a", "dataset": "b"}, r"\[1\] has path=a and dataset=b; give one of them"),
        ({"dataset": "b", "max_documents": 0}, r"\[1\]\.max_documents=0 must be at least 1"),
        ({"path": "a", "max_documents": 5}, r"\[1\]\.max_documents=5 has no meaning with path"),
        ({"path": "a", "split": "test"}, r"\[1\]\.split=test has no meaning with path"),
        ({"path": "a", "text_key": "body"}, r"\[1\]\.text_key=body has no meaning with path"),
    ],
)
def test_a_source_is_files_or_text(source: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=rf"data\.sources{text}"):
        DataConfig(sources=[SourceConfig(path="a"), SourceConfig(**source)], tokenizer="t")


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(ValueError, match=r"data\.sources\[0\]\.dataset=b needs data\.tokenizer; name a"):
        DataConfig(sources=[SourceConfig(dataset="b")])


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_eval_fraction_must_leave_training_data(fraction: float) -> None:
    with pytest.raises(ValueError, match=rf"data\.eval_fraction={fraction:g} must be >= 0 and < 1"):
        DataConfig(eval_fraction=fraction)


def test_omegaconf_takes_the_schema() -> None:
    values = {"sources": [{"path": "a", "weight": 2}, {"path": "b"}]}
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), values))
    assert config == DataConfig(sources=[SourceConfig(path="a", weight=2.0), SourceConfig(path="b")])


def test_missing_path_is_left_to_omegaconf() -> None:
    assert DataConfig(sources=[SourceConfig(path="???")]).sources[0].path == "???"


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"window": 0}, r"data\.window=0 must be at least 1"),
        (
            {"long_documents": LongDocuments.truncate},
            r"truncate has no meaning with data\.packing=concatenate",
        ),
        ({"no_loss_tokens": [3, -1]}, r"data\.no_loss_tokens=\[3, -1\] must be token ids"),
        ({"length_bounds": [8, 8]}, r"data\.length_bounds=\[8, 8\] must ascend from 2"),
        ({"length_bounds": [1]}, r"data\.length_bounds=\[1\] must ascend from 2"),
        ({"length_shares": [0.5, 0.5]}, r"data\.length_shares=\[0.5, 0.5\] must have 3 values"),
        ({"length_shares": [0.0, 0.0, 0.0]}, r"data\.length_shares=.* must be >= 0 and not all 0"),
        ({"length_shares": [1.0, -1.0, 2.0]}, r"data\.length_shares=.* must be >= 0 and not all 0"),
        ({"length_shares": [1.0, float("nan"), 2.0]}, r"data\.length_shares=.* must be >= 0 and not all 0"),
    ],
)
def test_packing_and_buckets_are_checked(values: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        DataConfig(**values)


@pytest.mark.parametrize("epochs", [0.0, -1.0, float("inf"), float("nan")])
def test_max_epochs_must_be_positive(epochs: float) -> None:
    with pytest.raises(ValueError, match=rf"data\.sources\[0\]\.max_epochs={epochs:g} must be > 0"):
        DataConfig(sources=[SourceConfig(path="a", max_epochs=epochs)])


def test_omegaconf_takes_packing_and_buckets() -> None:
    values = {
        "packing": "best_fit",
        "long_documents": "truncate",
        "length_shares": [1, 0],
        "length_bounds": [9],
    }
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), values))
    assert config == DataConfig(
        packing=Packing.best_fit,
        long_documents=LongDocuments.truncate,
        length_shares=[1.0, 0.0],
        length_bounds=[9],
    )
