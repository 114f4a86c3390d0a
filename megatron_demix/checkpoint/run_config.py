"""run_config.yaml, which Megatron-Bridge keeps in each checkpoint: from it alone it builds the model, to go on training it or
to export it for Hugging Face."""

from __future__ import annotations

from megatron_demix.checkpoint.layout import CheckpointDir, unreadable
from megatron_demix.errors import CorruptInput

RUN_CONFIG = "run_config.yaml"

# A merged checkpoint has neither, and whoever loads it as an iteration asks here whether to expect them.
_NOT_SAVED = ("save_optim", "save_rng")


def merged_run_config(location: CheckpointDir) -> bytes | None:
    """The file for a merged checkpoint, of its first component's; None where that has none. Raises CorruptInput."""
    path = location.path / RUN_CONFIG
    if not path.is_file():
        return None
    import yaml

    try:
        config = yaml.safe_load(path.read_bytes())
    except OSError as e:
        raise unreadable(path, e) from e
    except yaml.YAMLError as e:
        raise CorruptInput(
            f"{path}: cannot be read ({getattr(e, 'problem', None) or e}). Correct it, or take it away: the merge goes without."
        ) from e
    if not isinstance(config, dict) or not isinstance(config.get("checkpoint", {}), dict):
        raise CorruptInput(f"{path}: not a run's configuration. Correct it, or take it away: the merge goes without.")
    if "checkpoint" in config:
        config["checkpoint"] |= dict.fromkeys(_NOT_SAVED, False)
    return yaml.safe_dump(config, sort_keys=False).encode()
