import pytest
from omegaconf import OmegaConf

from data.config import DataConfig, SourceConfig


@pytest.mark.parametrize("weight", [0, -1.0, float("inf"), float("nan")])
def test_weight_must_be_positive(weight: float) -> None:
    with pytest.raises(ValueError, match=rf"data\.sources\[1\]\.weight={weight:g} must be > 0"):
        DataConfig(sources=[SourceConfig(path="a"), SourceConfig(path="b", weight=weight)])


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
