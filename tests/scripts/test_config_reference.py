"""docs/reference/configuration.md says what the dataclasses say."""

from scripts.config_reference import TARGET, reference


def test_the_reference_is_up_to_date() -> None:
    text = reference()
    assert TARGET.read_text(encoding="utf-8") == text, "run `python scripts/config_reference.py`"


def test_every_key_has_type_default_and_meaning() -> None:
    text = reference()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) > 100
    assert not [row for row in rows if row[3].strip(" |") == "" or len(row) < 4]
    for row in (
        "| `optimizer.lr` | float | `0.0002` | Peak learning rate. |",
        "| `model.num_layers` | int | none | Blocks. |",
        "| `parallel.zero_stage` | int or null | `null` | What is kept sharded. |",
        "| `train.dtype` | `bf16`, `fp32` | `bf16` | What the model computes in. |",
        "| `data.eval_fraction` | float | `0.01` | Fraction of each source's documents that only the eval "
        "split sees. |",
        "| `max_documents` | int or null | `null` | First documents of dataset that are taken; null = all. |",
    ):
        assert row in text.splitlines()
