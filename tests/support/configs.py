"""Configurations as the command line would compose them."""

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from train.config import (
    CONF_DIR,
    RunConfig,
    load_config,
    register_schema,
    rewrite_conf,
)

register_schema()


def composed(*arguments: str) -> DictConfig:
    """What Hydra makes of a command line, `name` given as its resolver exists in a Hydra job only."""
    args = rewrite_conf(list(arguments), {})
    names = [f"name={arg[4:]}" for arg in args if arg.startswith("run=") and not arg.startswith("run=file-")]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose("pretrain", [*args, *names])


def config(*arguments: str) -> RunConfig:
    return load_config(composed(*arguments))
